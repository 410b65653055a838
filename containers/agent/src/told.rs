//! What an agent does, for its caller: the same for all CLIs.

use std::time::Duration;

use polydev_proto::agent::{MAX_LINE, MAX_TEXT};
use serde_json::{Value, json};

/// One thing that an agent does; see `AgentEvent` of `polydev.runtime.v1`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Told {
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
        wait: Duration,
    },
    ToolDecision {
        id: String,
        name: String,
        allowed: bool,
        reason: String,
        waited: Duration,
    },
    Usage {
        input_tokens: u64,
        output_tokens: u64,
    },
    Error(String),
    Retry(String),
    TurnEnded {
        exit_code: u8,
        cancelled: bool,
        stdout_bytes: u64,
    },
}

impl Told {
    /// As lines. A text that is too long for one has several.
    pub(crate) fn lines(&self) -> Vec<Vec<u8>> {
        let values: Vec<Value> = match self {
            Self::Text(text) => pieces(text).map(|text| json!({ "text": text })).collect(),
            Self::Thinking(text) => pieces(text)
                .map(|text| json!({ "thinking": text }))
                .collect(),
            Self::ToolCall {
                id,
                name,
                arguments,
            } => vec![json!({ "tool_call": {
                "id": cut(id), "name": cut(name), "arguments": cut(arguments),
            } })],
            Self::ToolResult {
                id,
                output,
                is_error,
            } => vec![json!({ "tool_result": {
                "id": cut(id), "output": cut(output), "is_error": is_error,
            } })],
            Self::ToolApprovalRequired {
                id,
                name,
                reason,
                wait,
            } => vec![json!({ "tool_approval_required": {
                "id": cut(id), "name": cut(name), "reason": cut(reason),
                "timeout_seconds": wait.as_secs(),
            } })],
            Self::ToolDecision {
                id,
                name,
                allowed,
                reason,
                waited,
            } => vec![json!({ "tool_decision": {
                "id": cut(id), "name": cut(name), "allowed": allowed, "reason": cut(reason),
                "waited_us": u64::try_from(waited.as_micros()).unwrap_or(u64::MAX),
            } })],
            Self::Usage {
                input_tokens,
                output_tokens,
            } => vec![json!({ "usage": {
                "input_tokens": input_tokens, "output_tokens": output_tokens,
            } })],
            Self::Error(error) => vec![json!({ "error": cut(error) })],
            Self::Retry(reason) => vec![json!({ "retry": cut(reason) })],
            Self::TurnEnded {
                exit_code,
                cancelled,
                stdout_bytes,
            } => vec![json!({ "turn_ended": {
                "exit_code": exit_code, "cancelled": cancelled, "stdout_bytes": stdout_bytes,
            } })],
        };
        let lines = values.iter().map(|value| format!("{value}\n").into_bytes());
        // Three texts of which each byte is escaped do not fit; no CLI has such names.
        lines.filter(|line| line.len() <= MAX_LINE).collect()
    }
}

/// The text in pieces that fit into a line.
fn pieces(mut text: &str) -> impl Iterator<Item = &str> {
    std::iter::from_fn(move || {
        let (piece, rest) = text.split_at(text.floor_char_boundary(MAX_TEXT));
        text = rest;
        (!piece.is_empty()).then_some(piece)
    })
}

/// The beginning of a text, with how much is missing.
fn cut(text: &str) -> String {
    let (kept, rest) = text.split_at(text.floor_char_boundary(MAX_TEXT));
    match rest.len() {
        0 => kept.to_owned(),
        more => format!("{kept}\n[{more} more bytes]"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_text_of_any_length_is_whole_in_its_lines(text in "\\PC{0,40}", times in 1usize..900) {
            let text = text.repeat(times);
            let mut read = String::new();
            for line in Told::Text(text.clone()).lines() {
                prop_assert!(line.len() <= MAX_LINE && line.ends_with(b"\n"));
                let line: Value = serde_json::from_slice(&line).unwrap();
                read.push_str(line["text"].as_str().unwrap());
            }
            prop_assert_eq!(read, text);
        }
    }

    #[test]
    fn what_a_tool_prints_is_cut_and_says_so() {
        let told = Told::ToolResult {
            id: "1".into(),
            output: "\u{1}".repeat(1 << 20),
            is_error: false,
        };
        let lines = told.lines();
        let line: Value = serde_json::from_slice(&lines[0]).unwrap();
        let output = line["tool_result"]["output"].as_str().unwrap();
        assert!(
            output.ends_with("\n[1040384 more bytes]"),
            "{}",
            output.len()
        );
    }
}
