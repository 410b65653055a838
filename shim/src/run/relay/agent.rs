//! What an agent does: from the lines of its stream to messages for the caller.

use std::time::Duration;

use bytes::{Buf, BytesMut};
use polydev_proto::{
    agent::MAX_LINE,
    node,
    runtime::{
        AgentEvent, AgentEvents, AgentUsage, ToolApprovalRequired, ToolCall, ToolDecision,
        ToolResult, TurnEnded, agent_event::Event,
    },
};
use serde::Deserialize;

/// A line, as `proto/src/agent.rs` describes it.
#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    Text(String),
    Thinking(String),
    ToolCall {
        id: String,
        name: String,
        arguments: String,
    },
    ToolResult {
        id: String,
        output: String,
        is_error: bool,
    },
    ToolApprovalRequired {
        id: String,
        name: String,
        reason: String,
        timeout_seconds: u64,
    },
    ToolDecision {
        id: String,
        name: String,
        allowed: bool,
        reason: String,
        waited_us: u64,
    },
    Usage {
        input_tokens: u64,
        output_tokens: u64,
    },
    Error(String),
    Retry(String),
    TurnEnded {
        exit_code: i32,
        cancelled: bool,
        stdout_bytes: u64,
    },
}

impl From<Line> for Event {
    fn from(line: Line) -> Self {
        match line {
            Line::Text(text) => Self::Text(text),
            Line::Thinking(text) => Self::Thinking(text),
            Line::ToolCall {
                id,
                name,
                arguments,
            } => Self::ToolCall(ToolCall {
                id,
                name,
                arguments,
            }),
            Line::ToolResult {
                id,
                output,
                is_error,
            } => Self::ToolResult(ToolResult {
                id,
                output,
                is_error,
            }),
            Line::ToolApprovalRequired {
                id,
                name,
                reason,
                timeout_seconds,
            } => Self::ToolApprovalRequired(ToolApprovalRequired {
                id,
                name,
                reason,
                timeout: Duration::from_secs(timeout_seconds).try_into().ok(),
            }),
            Line::ToolDecision {
                id,
                name,
                allowed,
                reason,
                waited_us,
            } => Self::ToolDecision(ToolDecision {
                id,
                name,
                allowed,
                reason,
                waited: Duration::from_micros(waited_us).try_into().ok(),
            }),
            Line::Usage {
                input_tokens,
                output_tokens,
            } => Self::Usage(AgentUsage {
                input_tokens,
                output_tokens,
            }),
            Line::Error(error) => Self::Error(error),
            Line::Retry(reason) => Self::Retry(reason),
            Line::TurnEnded {
                exit_code,
                cancelled,
                stdout_bytes,
            } => Self::TurnEnded(TurnEnded {
                exit_code,
                cancelled,
                stdout_bytes,
            }),
        }
    }
}

/// The bytes of the stream that are not a whole line yet.
#[derive(Debug, Default)]
pub(super) struct Reader {
    waiting: BytesMut,
    /// The beginning of a line is lost: its rest is passed over.
    is_within: bool,
}

impl Reader {
    /// Reads what continues the stream. `None` if it has no line that this shim knows.
    pub(super) fn read(&mut self, output: &node::Output) -> Option<AgentEvents> {
        self.waiting.extend_from_slice(&output.data);
        let mut events = Vec::new();
        while let Some(at) = memchr::memchr(b'\n', &self.waiting) {
            let line = self.waiting.split_to(at);
            self.waiting.advance(1);
            if std::mem::take(&mut self.is_within) {
                continue;
            }
            // An agent of a newer build may do other things.
            if let Ok(line) = serde_json::from_slice::<Line>(&line) {
                let event = Some(line.into());
                events.push(AgentEvent { event });
            }
        }
        // The stream comes from a container, which may be hostile.
        if self.waiting.len() > MAX_LINE {
            self.lost();
        }
        let end = output.offset + output.data.len() as u64;
        (!events.is_empty()).then(|| AgentEvents {
            events,
            end_offset: end - self.waiting.len() as u64,
        })
    }

    /// The bytes that come next do not continue the stream.
    pub(super) fn lost(&mut self) {
        self.waiting.clear();
        self.is_within = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn output(offset: usize, data: &[u8]) -> node::Output {
        node::Output {
            offset: offset as u64,
            data: data.to_vec().into(),
        }
    }

    fn texts(told: Option<AgentEvents>) -> Vec<String> {
        let events = told.into_iter().flat_map(|told| told.events);
        let texts = events.map(|event| match event.event {
            Some(Event::Text(text)) => text,
            other => panic!("{other:?}"),
        });
        texts.collect()
    }

    proptest! {
        #[test]
        fn lines_are_the_same_in_pieces_of_any_size(
            given in prop::collection::vec("[a-z]{0,9}", 0..9),
            cuts in prop::collection::vec(1usize..40, 0..60),
        ) {
            let lines = given.iter().map(|text| format!("{{\"text\":\"{text}\"}}\n"));
            let stream: String = lines.collect();
            let (mut reader, mut read, mut at) = (Reader::default(), Vec::new(), 0);
            let mut end = 0;
            for cut in cuts.into_iter().chain([stream.len()]) {
                let next = stream.len().min(at + cut);
                if let Some(told) = reader.read(&output(at, &stream.as_bytes()[at..next])) {
                    prop_assert!(told.end_offset > end && told.end_offset <= next as u64);
                    end = told.end_offset;
                    prop_assert!(stream[..usize::try_from(end).unwrap()].ends_with('\n'));
                    read.extend(texts(Some(told)));
                }
                at = next;
            }
            prop_assert_eq!(read, given);
        }
    }

    #[test]
    fn after_a_gap_the_next_whole_line_is_read() {
        let mut reader = Reader::default();
        assert_eq!(reader.read(&output(0, b"{\"text\":\"lo")), None);
        reader.lost();
        let told = reader.read(&output(900, b"st\"}\n{\"text\":\"next\"}\n{\"new\":1}\n"));
        assert_eq!(texts(told), ["next"]);
        assert_eq!(reader.read(&output(950, &[b'x'; MAX_LINE + 1])), None);
        let told = reader.read(&output(90_000, b"\n{\"text\":\"on\"}\n"));
        assert_eq!(texts(told), ["on"]);
    }
}
