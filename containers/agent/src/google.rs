//! Gemini CLI, by the Agent Client Protocol of `gemini --acp`.
//!
//! Facts of Gemini CLI 0.61, tried out.

use std::time::Instant;

use serde_json::{Value, json};

use crate::{
    asks::{Answer, Question},
    cli::{Calls, Cli, Event, Message, Out, REHEARSAL},
    told::Told,
};

/// Gemini CLI, and what it was asked.
#[derive(Debug, Default)]
pub(crate) struct Gemini {
    work_dir: String,
    rehearses: bool,
    calls: Calls,
    asked: Asked,
    /// The session of the prompt. A rehearsal has one of its own.
    session: String,
    /// What comes after the model is set.
    text: String,
    /// Whether the answer ends a line.
    ends_line: bool,
    is_cancelled: bool,
    /// Whether each call of a tool waits for an answer.
    asks: bool,
}

/// The number of the request that the agent waits for.
#[derive(Debug, Default, Clone, Copy)]
enum Asked {
    #[default]
    Nothing,
    Initialize(u64),
    RehearsalSession(u64),
    Rehearsal(u64),
    Session(u64),
    Renewal(u64),
    Check(u64),
    Model(u64),
    Prompt(u64),
}

impl Gemini {
    pub(crate) fn new(work_dir: String, asks: bool) -> Self {
        Self {
            work_dir,
            asks,
            ..Self::default()
        }
    }

    fn new_session(&mut self, out: &mut Out) -> u64 {
        let params = json!({ "cwd": self.work_dir, "mcpServers": [] });
        self.calls.request("session/new", params, out)
    }

    fn ask(&mut self, session: &str, text: &str, out: &mut Out) -> u64 {
        let prompt = json!([{ "type": "text", "text": text }]);
        let params = json!({ "sessionId": session, "prompt": prompt });
        self.calls.request("session/prompt", params, out)
    }

    fn on_answer(&mut self, id: u64, answer: Result<&Value, &str>, out: &mut Out) -> Option<Event> {
        let failed = |what: &str, error: &str| Some(Event::Failed(format!("`{what}`: {error}")));
        let session_id = |answer: &Value| answer["sessionId"].as_str().map(str::to_owned);
        match self.asked {
            Asked::Initialize(asked) if asked == id => match answer {
                Ok(_) => {
                    let session = self.new_session(out);
                    self.asked = match self.rehearses {
                        true => Asked::RehearsalSession(session),
                        false => Asked::Session(session),
                    };
                    None
                }
                Err(error) => failed("initialize", error),
            },
            Asked::RehearsalSession(asked) if asked == id => match answer.map(session_id) {
                Ok(Some(session)) => {
                    self.asked = Asked::Rehearsal(self.ask(&session, REHEARSAL, out));
                    None
                }
                Ok(None) => failed("session/new", "it names no session"),
                Err(error) => failed("session/new", error),
            },
            Asked::Rehearsal(asked) if asked == id => match answer {
                Ok(_) => {
                    self.asked = Asked::Session(self.new_session(out));
                    None
                }
                Err(error) => failed("session/prompt", error),
            },
            Asked::Session(asked) | Asked::Renewal(asked) if asked == id => {
                match answer.map(session_id) {
                    Ok(Some(session)) => {
                        self.session = session;
                        Some(match self.asked {
                            Asked::Session(_) => Event::Ready,
                            _ => Event::Checked,
                        })
                    }
                    Ok(None) => failed("session/new", "it names no session"),
                    Err(error) => failed("session/new", error),
                }
            }
            // An error is an answer too.
            Asked::Check(asked) if asked == id => Some(Event::Checked),
            Asked::Model(asked) if asked == id => match answer {
                Ok(_) if self.is_cancelled => Some(Event::Cancelled),
                Ok(_) => {
                    let (session, text) = (self.session.clone(), std::mem::take(&mut self.text));
                    self.asked = Asked::Prompt(self.ask(&session, &text, out));
                    None
                }
                Err(error) => Some(Self::done(error, out)),
            },
            Asked::Prompt(asked) if asked == id => Some(match answer {
                Ok(answer) if self.is_cancelled && answer["stopReason"] == "cancelled" => {
                    Event::Cancelled
                }
                Ok(answer) => {
                    let used = &answer["_meta"]["quota"]["token_count"];
                    let tokens = |name: &str| used[name].as_u64().unwrap_or_default();
                    out.tell(Told::Usage {
                        input_tokens: tokens("input_tokens"),
                        output_tokens: tokens("output_tokens"),
                    });
                    Event::Done {
                        text: if self.ends_line { "" } else { "\n" }.into(),
                        error: String::new(),
                        code: 0,
                    }
                }
                Err(error) => Self::done(error, out),
            }),
            _ => None,
        }
    }

    fn on_update(&mut self, update: &Value, out: &mut Out) -> Option<Event> {
        let text = || update["content"]["text"].as_str().map(str::to_owned);
        let id = || update["toolCallId"].as_str().unwrap_or_default().to_owned();
        match update["sessionUpdate"].as_str()? {
            "agent_message_chunk" => {
                let text = text()?;
                self.ends_line = text.ends_with('\n');
                out.tell(Told::Text(text.clone()));
                return Some(Event::Print(text));
            }
            "agent_thought_chunk" => out.tell(Told::Thinking(text()?)),
            "tool_call" => {
                let name = update["kind"].as_str().unwrap_or("tool");
                let arguments = match update.get("rawInput") {
                    Some(arguments) => arguments.clone(),
                    None => json!({ "title": update["title"] }),
                };
                out.tell(Told::ToolCall {
                    id: id(),
                    name: name.to_owned(),
                    arguments: arguments.to_string(),
                });
                // Commands of a list of its own, which only read.
                if self.asks {
                    return Some(Event::Calls(question(Value::Null, update)));
                }
            }
            "tool_call_update" => {
                let is_error = update["status"] == "failed";
                if is_error || update["status"] == "completed" {
                    let parts = update["content"].as_array().into_iter().flatten();
                    let texts = parts.filter_map(|part| part["content"]["text"].as_str());
                    let output: String = texts.collect();
                    let id = id();
                    out.tell(Told::ToolResult {
                        id,
                        output,
                        is_error,
                    });
                }
            }
            _ => {}
        }
        None
    }

    fn done(error: &str, out: &mut Out) -> Event {
        out.tell(Told::Error(error.to_owned()));
        Event::Done {
            text: String::new(),
            error: format!("{error}\n"),
            code: 1,
        }
    }
}

impl Cli for Gemini {
    fn argv(&self) -> &'static [&'static str] {
        match self.asks {
            false => &["gemini", "--skip-trust", "--yolo", "--acp"],
            // It does not trust the folder, whose settings could start programs.
            true => &["gemini", "--acp"],
        }
    }

    fn begin(&mut self, rehearses: bool, out: &mut Out) {
        self.rehearses = rehearses;
        let files = json!({ "readTextFile": false, "writeTextFile": false });
        let params = json!({ "protocolVersion": 1, "clientCapabilities": { "fs": files } });
        self.asked = Asked::Initialize(self.calls.request("initialize", params, out));
    }

    /// No method of this protocol costs nothing, so it is asked for one that it does not have.
    fn check(&mut self, out: &mut Out) {
        self.asked = Asked::Check(self.calls.request("polydev/check", json!({}), out));
    }

    fn renew(&mut self, out: &mut Out) {
        self.asked = Asked::Renewal(self.new_session(out));
    }

    fn prompt(&mut self, text: &str, model: &str, out: &mut Out) {
        self.is_cancelled = false;
        self.ends_line = false;
        if model.is_empty() {
            let session = self.session.clone();
            self.asked = Asked::Prompt(self.ask(&session, text, out));
            return;
        }
        self.text = text.to_owned();
        let params = json!({ "sessionId": self.session, "modelId": model });
        self.asked = Asked::Model(self.calls.request("session/set_model", params, out));
    }

    fn cancel(&mut self, out: &mut Out) {
        self.is_cancelled = true;
        let params = json!({ "sessionId": self.session });
        out.send(json!({ "jsonrpc": "2.0", "method": "session/cancel", "params": params }));
    }

    fn answer(&mut self, question: &Question, answer: &Answer, out: &mut Out) {
        let option = match answer.allowed {
            true => "proceed_once",
            false => "cancel",
        };
        let outcome = json!({ "outcome": "selected", "optionId": option });
        Calls::answer(&question.id, &json!({ "outcome": outcome }), out);
    }

    fn on_line(&mut self, line: &Value, out: &mut Out) -> Option<Event> {
        match Calls::read(line)? {
            Message::Answer(id, answer) => self.on_answer(id, answer, out),
            Message::Request {
                id,
                method: "session/request_permission",
                params,
            } if self.asks => Some(Event::Asks(question(id.clone(), &params["toolCall"]))),
            Message::Request { id, method, .. } => {
                Calls::refuse(id, method, out);
                None
            }
            Message::Notice("session/update", params)
                if matches!(self.asked, Asked::Prompt(_))
                    && params["sessionId"] == self.session.as_str() =>
            {
                self.on_update(&params["update"], out)
            }
            Message::Notice(..) => None,
        }
    }
}

/// A call, from what is shown of it: the protocol has no arguments.
fn question(id: Value, call: &Value) -> Question {
    let call_id = call["toolCallId"].as_str().unwrap_or_default();
    let name = call_id.split_once("__").map_or("", |(name, _)| name);
    let paths = call["locations"].as_array().into_iter().flatten();
    let paths: Vec<_> = paths.filter_map(|place| place["path"].as_str()).collect();
    let mut arguments = json!({ "title": call["title"] });
    match name {
        "run_shell_command" => arguments["command"] = call["title"].clone(),
        "web_fetch" | "google_web_search" => arguments["prompt"] = call["title"].clone(),
        _ if !paths.is_empty() => arguments["path"] = paths.join("\n").into(),
        _ => {}
    }
    if let Some(diff) = call["content"].as_array().into_iter().flatten().next() {
        arguments["content"] = diff.clone();
    }
    Question {
        id,
        call_id: call_id.to_owned(),
        name: name.to_owned(),
        arguments,
        asked_at: Instant::now(),
    }
}
