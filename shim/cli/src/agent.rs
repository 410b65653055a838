//! What the agent of a prompt does, on a screen and as JSON.

use std::{
    collections::VecDeque,
    io::{IsTerminal, Write},
};

use polydev_proto::runtime::{AgentEvent, agent_event, run_event::Event, started::Agent};
use serde_json::json;

use super::{Output, stream};

/// An answer that is shown as it comes. Elsewhere than at a terminal, only what the CLI prints is
/// shown.
pub(super) struct Screen {
    is_conversation: bool,
    /// Whether there are events: what the CLI prints is shown after them, as far as it is new.
    has_agent: bool,
    /// The text of the turn that is shown already.
    shown: String,
    /// The turns that have ended, and what of them is shown, until what they have printed has come.
    ended: VecDeque<(u64, String)>,
    /// What the CLI has printed since the last turn: the same text, or the last part of it.
    printed: Vec<u8>,
    /// Where that begins in stdout.
    begin: u64,
}

impl Screen {
    /// `None` if stdout is not a screen for people.
    pub(super) fn new(output: Output, is_conversation: bool) -> Option<Self> {
        let is_screen = output == Output::Text && std::io::stdout().is_terminal();
        is_screen.then(|| Self {
            is_conversation,
            has_agent: false,
            shown: String::new(),
            ended: VecDeque::new(),
            printed: Vec::new(),
            begin: 0,
        })
    }

    pub(super) fn print(&mut self, event: &Event) -> anyhow::Result<()> {
        match event {
            Event::AgentEvents(told) => {
                self.show(told.events.iter())?;
                self.end_turns()?;
            }
            Event::Started(started) => {
                self.has_agent = self.is_conversation || started.agent() == Agent::Parked;
            }
            Event::Stdout(output) if self.has_agent => {
                self.printed.extend_from_slice(&output.data);
                self.end_turns()?;
            }
            Event::Exited(_) => {
                std::io::stdout().write_all(rest(&self.shown, &self.printed))?;
                stream::print_event(event, Output::Text)?;
            }
            event => stream::print_event(event, Output::Text)?,
        }
        Ok(())
    }

    /// Shows what is missing of the turns that have ended.
    fn end_turns(&mut self) -> anyhow::Result<()> {
        while let Some((end, shown)) = self.ended.pop_front() {
            let length = usize::try_from(end.saturating_sub(self.begin))?;
            if self.printed.len() < length {
                self.ended.push_front((end, shown));
                break;
            }
            let printed: Vec<u8> = self.printed.drain(..length).collect();
            self.begin += length as u64;
            let mut stdout = std::io::stdout().lock();
            stdout.write_all(rest(&shown, &printed))?;
            stdout.flush()?;
        }
        Ok(())
    }

    fn show<'a>(&mut self, events: impl Iterator<Item = &'a AgentEvent>) -> anyhow::Result<()> {
        let (mut stdout, mut stderr) = (std::io::stdout().lock(), std::io::stderr().lock());
        for event in events {
            match &event.event {
                Some(agent_event::Event::Text(text)) => {
                    stdout.write_all(text.as_bytes())?;
                    stdout.flush()?;
                    self.shown.push_str(text);
                }
                Some(agent_event::Event::ToolCall(call)) => {
                    writeln!(stderr, "[{}] {:.200}", call.name, call.arguments)?;
                }
                Some(agent_event::Event::ToolApprovalRequired(required)) => {
                    writeln!(
                        stderr,
                        "[{}] waits for an approval: {}",
                        required.name, required.reason
                    )?;
                }
                Some(agent_event::Event::ToolDecision(decision)) if !decision.allowed => {
                    writeln!(
                        stderr,
                        "[{}] not allowed: {}",
                        decision.name, decision.reason
                    )?;
                }
                Some(agent_event::Event::Retry(reason)) => {
                    writeln!(stderr, "polydev-shim: the CLI tries again: {reason}")?;
                }
                Some(agent_event::Event::TurnEnded(ended)) => {
                    let shown = std::mem::take(&mut self.shown);
                    self.ended.push_back((ended.stdout_bytes, shown));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// What of the CLI's output is not shown yet.
fn rest<'a>(shown: &str, printed: &'a [u8]) -> &'a [u8] {
    let text = printed.trim_ascii();
    match shown.trim_end().as_bytes().ends_with(text) {
        true if shown.is_empty() || shown.ends_with('\n') => b"",
        // Also that of a turn that was cancelled.
        true => b"\n",
        false => printed,
    }
}

/// `None` for what a newer shim knows.
pub(super) fn to_json(event: &AgentEvent) -> Option<serde_json::Value> {
    use agent_event::Event as Told;
    Some(match event.event.as_ref()? {
        Told::Text(text) => json!({ "text": text }),
        Told::Thinking(text) => json!({ "thinking": text }),
        Told::ToolCall(call) => json!({ "tool_call": {
            "id": call.id, "name": call.name, "arguments": call.arguments,
        } }),
        Told::ToolResult(result) => json!({ "tool_result": {
            "id": result.id, "output": result.output, "is_error": result.is_error,
        } }),
        Told::ToolApprovalRequired(required) => json!({ "tool_approval_required": {
            "id": required.id, "name": required.name, "reason": required.reason,
            "timeout": required.timeout.map(|timeout| timeout.to_string()),
        } }),
        Told::ToolDecision(decision) => json!({ "tool_decision": {
            "id": decision.id, "name": decision.name, "allowed": decision.allowed,
            "reason": decision.reason,
            "waited": decision.waited.map(|waited| waited.to_string()),
        } }),
        Told::Usage(usage) => json!({ "usage": {
            "input_tokens": usage.input_tokens, "output_tokens": usage.output_tokens,
        } }),
        Told::Error(error) => json!({ "error": error }),
        Told::Retry(reason) => json!({ "retry": reason }),
        Told::TurnEnded(ended) => json!({ "turn_ended": {
            "exit_code": ended.exit_code,
            "cancelled": ended.cancelled,
            "stdout_bytes": ended.stdout_bytes,
        } }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_is_not_printed_again() {
        let rest = |shown, printed: &'static str| {
            String::from_utf8(rest(shown, printed.as_bytes()).to_vec()).unwrap()
        };
        assert_eq!(rest("hello", "hello\n"), "\n");
        assert_eq!(rest("hello\n", "hello\n"), "");
        assert_eq!(rest("I look.The answer", "The answer\n"), "\n");
        assert_eq!(rest("I look", "API Error\n"), "API Error\n");
    }
}
