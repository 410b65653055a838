//! What the caller of a conversation says after the first prompt: lines of JSON on the run's
//! stdin, see `Prompt` of `polydev.runtime.v1`.

use std::collections::VecDeque;

use polydev_proto::{
    prompt::{self, MAX_TEXT},
    provider::Vendor,
};
use serde::Deserialize;

use crate::lines::Lines;

/// Longest line, in bytes: a prompt of which each byte is escaped, and a model.
const MAX_LINE: usize = 6 * MAX_TEXT + (64 << 10);
/// Prompts that may wait. While there are as many, nothing more is read.
const MAX_WAITING: usize = 8;

/// A line.
#[derive(Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum Line {
    Prompt(Prompt),
    CancelTurn {},
}

/// A prompt. An empty model is that of the prompt before.
#[derive(Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Prompt {
    pub(crate) text: String,
    #[serde(default)]
    pub(crate) model: String,
}

/// What waits for its turn.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Next {
    Prompt(Prompt),
    /// A prompt that was cancelled before its turn.
    Cancelled,
    /// A line that is no prompt, and why.
    Wrong(String),
}

/// The prompts that wait for their turn.
#[derive(Debug)]
pub(crate) struct Conversation {
    provider: Vendor,
    lines: Lines,
    waiting: VecDeque<Next>,
    is_over: bool,
}

impl Conversation {
    pub(crate) fn new(provider: Vendor) -> Self {
        Self {
            provider,
            lines: Lines::of(MAX_LINE),
            waiting: VecDeque::new(),
            is_over: false,
        }
    }

    /// Takes what has come.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.lines.push(bytes);
    }

    /// Nothing more comes. The last line may have no end.
    pub(crate) fn end(&mut self) {
        if !std::mem::replace(&mut self.is_over, true) {
            self.lines.push(b"\n");
        }
    }

    /// Reads what there is room for. Returns whether the turn that goes on is to be cancelled.
    pub(crate) fn read(&mut self) -> bool {
        let mut cancels = false;
        while self.has_room() {
            match self.lines.next_line() {
                Ok(None) => break,
                Ok(Some(line)) if line.trim_ascii().is_empty() => {}
                Ok(Some(line)) => match self.understand(&line) {
                    Ok(None) => match self.waiting.back_mut() {
                        Some(last) => *last = Next::Cancelled,
                        None => cancels = true,
                    },
                    Ok(Some(prompt)) => self.waiting.push_back(Next::Prompt(prompt)),
                    Err(reason) => self.waiting.push_back(Next::Wrong(reason)),
                },
                Err(too_long) => {
                    self.waiting.push_back(Next::Wrong(too_long.to_string()));
                    self.is_over = true;
                    self.lines = Lines::of(MAX_LINE);
                }
            }
        }
        cancels
    }

    /// `None` for a turn that is to be cancelled.
    fn understand(&self, line: &[u8]) -> Result<Option<Prompt>, String> {
        let line = serde_json::from_slice(line)
            .map_err(|error| format!("a line of stdin is no prompt: {error}"))?;
        let Line::Prompt(Prompt { text, model }) = line else {
            return Ok(None);
        };
        prompt::check(&text, &model).map_err(|error| error.to_string())?;
        if prompt::is_command_to_agent(self.provider, &text) {
            return Err(
                "`prompt.text` begins with `/` or `$`: the CLI would take it for a command".into(),
            );
        }
        let text = prompt::as_text(self.provider, text);
        Ok(Some(Prompt { text, model }))
    }

    pub(crate) fn has_room(&self) -> bool {
        self.waiting.len() < MAX_WAITING
    }

    /// Whether more may come.
    pub(crate) fn is_open(&self) -> bool {
        !self.is_over
    }

    pub(crate) fn next(&mut self) -> Option<Next> {
        self.waiting.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(provider: Vendor, lines: &str) -> (Vec<Next>, bool) {
        let mut conversation = Conversation::new(provider);
        conversation.push(lines.as_bytes());
        let cancels = conversation.read();
        (
            std::iter::from_fn(|| conversation.next()).collect(),
            cancels,
        )
    }

    fn prompt(text: &str, model: &str) -> Next {
        Next::Prompt(Prompt {
            text: text.into(),
            model: model.into(),
        })
    }

    #[test]
    fn each_line_is_a_prompt_or_ends_a_turn() {
        let lines = "{\"prompt\":{\"text\":\"a\\nb\"}}\n\n{\"prompt\":{\"text\":\"/c\",\"model\":\"m\"}}\n{\"prompt\":";
        let (prompts, cancels) = said(Vendor::Anthropic, lines);
        assert_eq!(prompts, [prompt("a\nb", ""), prompt(" /c", "m")]);
        assert!(!cancels);
        assert_eq!(
            said(Vendor::OpenAi, "{\"cancel_turn\":{}}\n"),
            (vec![], true)
        );
        // It is for the prompt before it, whose turn has not begun.
        let early = "{\"prompt\":{\"text\":\"a\"}}\n{\"cancel_turn\":{}}\n";
        assert_eq!(said(Vendor::OpenAi, early), (vec![Next::Cancelled], false));
    }

    #[test]
    fn a_turn_that_is_ended_twice_is_ended_once_however_the_lines_come() {
        let lines = b"{\"cancel_turn\":{}}\n{\"cancel_turn\":{}}\n";
        let whole = crate::conversed(Vendor::OpenAi, lines, lines.len());
        assert_eq!(whole, crate::conversed(Vendor::OpenAi, lines, 5));
        assert_eq!(whole.1.len(), 1);
    }

    #[test]
    fn what_is_no_prompt_says_why() {
        for (line, why) in [
            ("hello", "a line of stdin is no prompt: "),
            ("{\"prompt\":{\"txt\":\"a\"}}", "unknown field `txt`"),
            ("{\"prompt\":{\"text\":\"\"}}", "`prompt.text` is empty"),
            ("{\"prompt\":{\"text\":\"/clear\"}}", "`prompt.text` begins"),
            (
                "{\"prompt\":{\"text\":\"a\",\"model\":\"-m\"}}",
                "`prompt.model`",
            ),
        ] {
            let (prompts, _) = said(Vendor::Google, &format!("{line}\n"));
            let Some(Next::Wrong(reason)) = prompts.first() else {
                panic!("{line}: {prompts:?}");
            };
            assert!(reason.contains(why), "{reason}");
        }
    }

    #[test]
    fn the_last_line_needs_no_end() {
        let mut conversation = Conversation::new(Vendor::OpenAi);
        conversation.push(b"{\"prompt\":{\"text\":\"a\"}}");
        conversation.read();
        assert_eq!(conversation.next(), None);
        for _ in 0..2 {
            conversation.end();
        }
        conversation.read();
        assert_eq!(conversation.next(), Some(prompt("a", "")));
        assert_eq!(conversation.next(), None);
    }

    #[test]
    fn what_waits_is_bounded() {
        let mut conversation = Conversation::new(Vendor::OpenAi);
        conversation.push(
            "{\"prompt\":{\"text\":\"a\"}}\n"
                .repeat(MAX_WAITING + 1)
                .as_bytes(),
        );
        conversation.read();
        assert!(!conversation.has_room());
        conversation.next();
        conversation.read();
        assert!(!conversation.has_room(), "the last one has come");
        conversation.push(&vec![b'x'; MAX_LINE + 1]);
        while conversation.next().is_some() {}
        conversation.read();
        assert!(!conversation.is_open());
        assert!(matches!(conversation.next(), Some(Next::Wrong(_))));
    }
}
