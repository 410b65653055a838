//! Claude Code, by the protocol of its `stream-json` formats: lines with a `type`.
//!
//! Facts of Claude Code 2.1.332, tried out.

use serde_json::{Value, json};

use crate::cli::{Cli, Event, REHEARSAL};

/// Claude Code, and what it was asked.
#[derive(Debug, Default)]
pub(crate) struct Claude {
    is_taken: bool,
}

/// The names of our requests.
const INITIALIZE: &str = "initialize";
const REHEARSE: &str = "rehearse";
const CHECK: &str = "check";
const MODEL: &str = "model";

impl Claude {
    fn control(name: &str, request: Value, out: &mut Vec<Value>) {
        out.push(json!({ "type": "control_request", "request_id": name, "request": request }));
    }
}

impl Cli for Claude {
    fn argv(&self) -> &'static [&'static str] {
        &[
            "claude",
            "-p",
            "--input-format",
            "stream-json",
            "--output-format",
            "stream-json",
            "--verbose",
            // Both are as in the one-shot form; with streams it would be `updates`.
            "--thinking-display",
            "omitted",
            "--dangerously-skip-permissions",
        ]
    }

    fn env(&self) -> &'static [(&'static str, &'static str)] {
        &[("CLAUDE_CODE_THINKING_DISPLAY_UPDATES", "0")]
    }

    fn begin(&mut self, out: &mut Vec<Value>) {
        Self::control(INITIALIZE, json!({ "subtype": "initialize" }), out);
    }

    /// It is answered within a millisecond, without a request to the model.
    fn check(&mut self, out: &mut Vec<Value>) {
        Self::control(CHECK, json!({ "subtype": "mcp_status" }), out);
    }

    /// It takes the day when it makes a request.
    fn renew(&mut self, out: &mut Vec<Value>) {
        self.check(out);
    }

    fn prompt(&mut self, text: &str, model: &str, out: &mut Vec<Value>) {
        self.is_taken = true;
        if !model.is_empty() {
            Self::control(
                MODEL,
                json!({ "subtype": "set_model", "model": model }),
                out,
            );
        }
        out.push(json!({
            "type": "user",
            "message": { "role": "user", "content": text },
            "parent_tool_use_id": null,
            "session_id": "",
        }));
    }

    fn on_line(&mut self, line: &Value, out: &mut Vec<Value>) -> Option<Event> {
        match line["type"].as_str()? {
            "control_response" => {
                let response = &line["response"];
                let name = response["request_id"].as_str()?;
                if response["subtype"] != "success" {
                    let error = response["error"].as_str().unwrap_or("it says no more");
                    return Some(Event::Failed(format!("`{name}`: {error}")));
                }
                match name {
                    // It leaves no trace in the conversation.
                    INITIALIZE => {
                        let question = json!({ "subtype": "side_question", "question": REHEARSAL });
                        Self::control(REHEARSE, question, out);
                        None
                    }
                    REHEARSE => Some(Event::Ready),
                    CHECK => Some(Event::Checked),
                    _ => None,
                }
            }
            "control_request" => {
                let error = "polydev-agent does not answer it";
                let response = json!({
                    "subtype": "error", "request_id": line["request_id"], "error": error,
                });
                out.push(json!({ "type": "control_response", "response": response }));
                None
            }
            "result" if self.is_taken => {
                let is_error = line["is_error"].as_bool().unwrap_or(true);
                let text = line["result"].as_str();
                let text = text.map_or_else(|| "Execution error".to_owned(), str::to_owned);
                Some(Event::Done {
                    text: format!("{text}\n"),
                    error: String::new(),
                    code: is_error.into(),
                })
            }
            _ => None,
        }
    }
}
