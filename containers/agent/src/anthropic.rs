//! Claude Code, by the protocol of its `stream-json` formats: lines with a `type`.
//!
//! Facts of Claude Code 2.1.332, tried out.

use std::{collections::BTreeSet, time::Instant};

use serde_json::{Value, json};

use crate::{
    asks::{Answer, Question},
    cli::{Cli, Event, Out, REHEARSAL},
    told::Told,
};

/// Claude Code, and what it was asked.
#[derive(Debug, Default)]
pub(crate) struct Claude {
    rehearses: bool,
    is_taken: bool,
    /// What comes after the model is set.
    text: String,
    is_cancelled: bool,
    /// Whether each call of a tool waits for an answer.
    asks: bool,
    /// The calls that it has asked about, until their results come.
    asked: BTreeSet<String>,
}

/// The names of our requests.
const INITIALIZE: &str = "initialize";
const REHEARSE: &str = "rehearse";
const CHECK: &str = "check";
const MODEL: &str = "model";
const CANCEL: &str = "cancel";
/// The name of the hook that is called before each call of a tool.
const HOOK: &str = "tool";
/// How long Claude waits for the hook: far longer than any call waits here.
const HOOK_SECONDS: u32 = 3600;

impl Claude {
    pub(crate) fn new(asks: bool) -> Self {
        Self {
            asks,
            ..Self::default()
        }
    }

    fn control(name: &str, request: Value, out: &mut Out) {
        out.send(json!({ "type": "control_request", "request_id": name, "request": request }));
    }

    fn say(text: &str, out: &mut Out) {
        out.send(json!({
            "type": "user",
            "message": { "role": "user", "content": text },
            "parent_tool_use_id": null,
            "session_id": "",
        }));
    }

    fn interrupt(out: &mut Out) {
        Self::control(CANCEL, json!({ "subtype": "interrupt" }), out);
    }

    /// Whether a call has a result that it did not ask about. One that was not made has an error.
    fn has_unasked(&mut self, content: &Value) -> bool {
        let blocks = content.as_array().into_iter().flatten();
        let results = blocks.filter(|block| block["type"] == "tool_result");
        let mut is_unasked = false;
        for result in results {
            let was_asked = self.asked.remove(&text_of(&result["tool_use_id"]));
            is_unasked |= !was_asked && result["is_error"] != true;
        }
        is_unasked
    }

    fn failed(error: &str, out: &mut Out) -> Event {
        out.tell(Told::Error(error.to_owned()));
        Event::Done {
            text: format!("{error}\n"),
            error: String::new(),
            code: 1,
        }
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
            "--include-partial-messages",
        ]
    }

    fn env(&self) -> &'static [(&'static str, &'static str)] {
        &[("CLAUDE_CODE_THINKING_DISPLAY_UPDATES", "0")]
    }

    fn begin(&mut self, rehearses: bool, out: &mut Out) {
        self.rehearses = rehearses;
        let mut request = json!({ "subtype": "initialize" });
        if self.asks {
            let hook =
                json!({ "matcher": null, "hookCallbackIds": [HOOK], "timeout": HOOK_SECONDS });
            request["hooks"] = json!({ "PreToolUse": [hook] });
        }
        Self::control(INITIALIZE, request, out);
    }

    /// It is answered within a millisecond, without a request to the model.
    fn check(&mut self, out: &mut Out) {
        Self::control(CHECK, json!({ "subtype": "mcp_status" }), out);
    }

    /// It takes the day when it makes a request.
    fn renew(&mut self, out: &mut Out) {
        self.check(out);
    }

    fn prompt(&mut self, text: &str, model: &str, out: &mut Out) {
        self.is_taken = true;
        self.is_cancelled = false;
        if model.is_empty() {
            return Self::say(text, out);
        }
        self.text = text.to_owned();
        let request = json!({ "subtype": "set_model", "model": model });
        Self::control(MODEL, request, out);
    }

    fn cancel(&mut self, out: &mut Out) {
        self.is_cancelled = true;
        Self::interrupt(out);
    }

    fn answer(&mut self, question: &Question, answer: &Answer, out: &mut Out) {
        let decision = match answer.allowed {
            true => "allow",
            false => "deny",
        };
        let output = json!({
            "hookEventName": "PreToolUse",
            "permissionDecision": decision,
            "permissionDecisionReason": answer.reason,
        });
        let response = json!({
            "subtype": "success",
            "request_id": question.id,
            "response": { "hookSpecificOutput": output },
        });
        out.send(json!({ "type": "control_response", "response": response }));
    }

    fn on_line(&mut self, line: &Value, out: &mut Out) -> Option<Event> {
        match line["type"].as_str()? {
            "control_response" => {
                let response = &line["response"];
                let name = response["request_id"].as_str()?;
                if name == CANCEL {
                    return None; // The result of the turn says the rest.
                }
                if response["subtype"] != "success" {
                    let error = response["error"].as_str().unwrap_or("it says no more");
                    if name == MODEL {
                        return Some(Self::failed(error, out));
                    }
                    return Some(Event::Failed(format!("`{name}`: {error}")));
                }
                match name {
                    INITIALIZE if !self.rehearses => Some(Event::Ready),
                    // It leaves no trace in the conversation.
                    INITIALIZE => {
                        let question = json!({ "subtype": "side_question", "question": REHEARSAL });
                        Self::control(REHEARSE, question, out);
                        None
                    }
                    REHEARSE => Some(Event::Ready),
                    CHECK => Some(Event::Checked),
                    MODEL if self.is_cancelled => Some(Event::Cancelled),
                    MODEL => {
                        Self::say(&std::mem::take(&mut self.text), out);
                        None
                    }
                    _ => None,
                }
            }
            "control_request" if line["request"]["subtype"] == "hook_callback" => {
                let input = &line["request"]["input"];
                self.asked.insert(text_of(&line["request"]["tool_use_id"]));
                Some(Event::Asks(Question {
                    id: line["request_id"].clone(),
                    call_id: text_of(&line["request"]["tool_use_id"]),
                    name: text_of(&input["tool_name"]),
                    arguments: input["tool_input"].clone(),
                    asked_at: Instant::now(),
                }))
            }
            "control_request" => {
                let error = "polydev-agent does not answer it";
                let response = json!({
                    "subtype": "error", "request_id": line["request_id"], "error": error,
                });
                out.send(json!({ "type": "control_response", "response": response }));
                None
            }
            _ if !self.is_taken => None,
            "user" if self.asks && self.has_unasked(&line["message"]["content"]) => Some(
                Event::Failed("it has used a tool that it did not ask about".into()),
            ),
            // Of an agent that the model has started: its result is the result of a tool.
            "stream_event" | "assistant" | "user" if !line["parent_tool_use_id"].is_null() => None,
            "stream_event" => {
                tell_piece(&line["event"], out);
                None
            }
            "assistant" => {
                tell_calls(&line["message"]["content"], out);
                None
            }
            "user" => {
                tell_results(&line["message"]["content"], out);
                None
            }
            // A turn begins. One that was to be cancelled before has not heard it.
            "system" if line["subtype"] == "init" && self.is_cancelled => {
                Self::interrupt(out);
                None
            }
            "system" if line["subtype"] == "api_retry" => {
                let error = line["error"].as_str().unwrap_or("the API has failed");
                out.tell(Told::Retry(error.to_owned()));
                None
            }
            "result" => {
                if self.is_cancelled && line["subtype"] != "success" {
                    return Some(Event::Cancelled);
                }
                let is_error = line["is_error"].as_bool().unwrap_or(true);
                let usage = |name: &str| line["usage"][name].as_u64().unwrap_or_default();
                out.tell(Told::Usage {
                    input_tokens: usage("input_tokens")
                        + usage("cache_creation_input_tokens")
                        + usage("cache_read_input_tokens"),
                    output_tokens: usage("output_tokens"),
                });
                let text = line["result"].as_str();
                let text = text.map_or_else(|| "Execution error".to_owned(), str::to_owned);
                if is_error {
                    out.tell(Told::Error(text.clone()));
                }
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

/// A piece of an answer, in the form of the API's own events.
fn tell_piece(event: &Value, out: &mut Out) {
    let delta = &event["delta"];
    if let Some(text) = delta["text"].as_str() {
        out.tell(Told::Text(text.to_owned()));
    }
    if let Some(thinking) = delta["thinking"].as_str() {
        out.tell(Told::Thinking(thinking.to_owned()));
    }
}

fn tell_calls(content: &Value, out: &mut Out) {
    for block in content.as_array().into_iter().flatten() {
        if block["type"] == "tool_use" {
            out.tell(Told::ToolCall {
                id: text_of(&block["id"]),
                name: text_of(&block["name"]),
                arguments: block["input"].to_string(),
            });
        }
    }
}

fn tell_results(content: &Value, out: &mut Out) {
    for block in content.as_array().into_iter().flatten() {
        if block["type"] == "tool_result" {
            let parts = block["content"].as_array();
            let texts = parts.into_iter().flatten();
            let texts: String = texts.filter_map(|part| part["text"].as_str()).collect();
            let output = block["content"].as_str().map_or(texts, str::to_owned);
            out.tell(Told::ToolResult {
                id: text_of(&block["tool_use_id"]),
                output,
                is_error: block["is_error"] == true,
            });
        }
    }
}

fn text_of(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}
