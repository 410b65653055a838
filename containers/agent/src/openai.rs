//! Codex, by the JSON-RPC of `codex app-server`.
//!
//! Facts of Codex 0.171, tried out.

use std::{collections::BTreeMap, time::Instant};

use serde_json::{Value, json};

use crate::{
    asks::{Answer, Question},
    cli::{Calls, Cli, Event, Message, Out, REHEARSAL},
    told::Told,
};

/// Codex, and what it was asked.
#[derive(Debug, Default)]
pub(crate) struct Codex {
    work_dir: String,
    rehearses: bool,
    calls: Calls,
    asked: Asked,
    /// The thread that is listened to. A rehearsal has one of its own, and so have agents of the
    /// model's.
    thread: String,
    /// The last message of the model in this turn.
    answer: String,
    /// The last error that was reported, which Codex may get over.
    error: String,
    /// The turn of the prompt, once it has a name.
    turn: String,
    is_cancelled: bool,
    /// Whether each call of a tool waits for an answer.
    asks: bool,
    /// The changes of files that wait for an answer, by their items: the question has none.
    changes: BTreeMap<String, Value>,
}

/// The number of the request that the agent waits for.
#[derive(Debug, Default, Clone, Copy)]
enum Asked {
    #[default]
    Nothing,
    Initialize(u64),
    RehearsalThread(u64),
    Rehearsal(u64),
    Thread(u64),
    Renewal(u64),
    Check(u64),
    Prompt(u64),
}

impl Codex {
    pub(crate) fn new(work_dir: String, asks: bool) -> Self {
        Self {
            work_dir,
            asks,
            ..Self::default()
        }
    }

    /// As `codex exec --dangerously-bypass-approvals-and-sandbox` asks for one.
    fn start_thread(&mut self, out: &mut Out) -> u64 {
        let params = json!({
            "cwd": self.work_dir,
            "approvalPolicy": if self.asks { "untrusted" } else { "never" },
            "sandbox": "danger-full-access",
            "threadSource": "user",
        });
        self.calls.request("thread/start", params, out)
    }

    fn start_turn(&mut self, text: &str, model: &str, out: &mut Out) -> u64 {
        let mut params = json!({
            "threadId": self.thread,
            "input": [{ "type": "text", "text": text }],
        });
        if !model.is_empty() {
            params["model"] = model.into();
        }
        self.answer.clear();
        self.calls.request("turn/start", params, out)
    }

    fn on_answer(&mut self, id: u64, answer: Result<&Value, &str>, out: &mut Out) -> Option<Event> {
        let failed = |what: &str, error: &str| Some(Event::Failed(format!("`{what}`: {error}")));
        let thread_id = |answer: &Value| answer["thread"]["id"].as_str().map(str::to_owned);
        match (self.asked, answer) {
            (Asked::Initialize(asked), answer) if asked == id => match answer {
                Ok(_) => {
                    out.send(json!({ "jsonrpc": "2.0", "method": "initialized" }));
                    let thread = self.start_thread(out);
                    self.asked = match self.rehearses {
                        true => Asked::RehearsalThread(thread),
                        false => Asked::Thread(thread),
                    };
                    None
                }
                Err(error) => failed("initialize", error),
            },
            (Asked::RehearsalThread(asked), answer) if asked == id => match answer.map(thread_id) {
                Ok(Some(thread)) => {
                    self.thread = thread;
                    self.asked = Asked::Rehearsal(self.start_turn(REHEARSAL, "", out));
                    None
                }
                Ok(None) => failed("thread/start", "it names no thread"),
                Err(error) => failed("thread/start", error),
            },
            (Asked::Thread(asked) | Asked::Renewal(asked), answer) if asked == id => {
                match answer.map(thread_id) {
                    Ok(Some(thread)) => {
                        self.thread = thread;
                        Some(match self.asked {
                            Asked::Thread(_) => Event::Ready,
                            _ => Event::Checked,
                        })
                    }
                    Ok(None) => failed("thread/start", "it names no thread"),
                    Err(error) => failed("thread/start", error),
                }
            }
            (Asked::Check(asked), answer) if asked == id => match answer {
                Ok(_) => Some(Event::Checked),
                Err(error) => failed("thread/loaded/list", error),
            },
            (Asked::Rehearsal(asked), Err(error)) if asked == id => failed("turn/start", error),
            (Asked::Prompt(asked), Err(error)) if asked == id => Some(Event::Done {
                text: String::new(),
                error: format!("ERROR: {error}\n"),
                code: 1,
            }),
            _ => None,
        }
    }

    /// Codex asks, by the approvals of its protocol.
    fn on_request(
        &mut self,
        id: &Value,
        method: &str,
        params: &Value,
        out: &mut Out,
    ) -> Option<Event> {
        let item = text_of(&params["itemId"]);
        let (name, arguments) = match method {
            "item/commandExecution/requestApproval" if self.asks && params["kind"] == "command" => {
                let arguments = json!({ "command": params["command"], "cwd": params["cwd"] });
                ("shell", arguments)
            }
            "item/fileChange/requestApproval" if self.asks && self.changes.contains_key(&item) => {
                let changes = self.changes.remove(&item).unwrap_or_default();
                let paths = changes.as_array().into_iter().flatten();
                let both = |change: &Value| {
                    let to = change["kind"]["move_path"].as_str().map(str::to_owned);
                    [Some(text_of(&change["path"])), to]
                };
                let paths: Vec<_> = paths.flat_map(both).flatten().collect();
                let arguments = json!({ "path": paths.join("\n"), "changes": changes });
                ("apply_patch", arguments)
            }
            _ => {
                Calls::refuse(id, method, out);
                return None;
            }
        };
        Some(Event::Asks(Question {
            id: id.clone(),
            call_id: item,
            name: name.to_owned(),
            arguments,
            asked_at: Instant::now(),
        }))
    }

    /// Ends the turn, if it has begun.
    fn interrupt(&mut self, out: &mut Out) {
        if !self.turn.is_empty() {
            let params = json!({ "threadId": self.thread, "turnId": self.turn });
            self.calls.request("turn/interrupt", params, out);
        }
    }

    fn on_notice(&mut self, name: &str, params: &Value, out: &mut Out) {
        let text = |name: &str| params[name].as_str().unwrap_or_default().to_owned();
        let item = &params["item"];
        match name {
            "turn/started" => {
                self.turn = params["turn"]["id"].as_str().unwrap_or_default().to_owned();
                if self.is_cancelled {
                    self.interrupt(out);
                }
            }
            "item/agentMessage/delta" => out.tell(Told::Text(text("delta"))),
            "item/reasoning/summaryTextDelta" | "item/reasoning/textDelta" => {
                out.tell(Told::Thinking(text("delta")));
            }
            "item/started" => tell_call(item, out),
            "item/completed" if item["type"] == "agentMessage" => {
                self.answer = item["text"].as_str().unwrap_or_default().to_owned();
            }
            "item/completed" => tell_result(item, out),
            "thread/tokenUsage/updated" => {
                let last = &params["tokenUsage"]["last"];
                let tokens = |name: &str| last[name].as_u64().unwrap_or_default();
                out.tell(Told::Usage {
                    input_tokens: tokens("inputTokens"),
                    output_tokens: tokens("outputTokens"),
                });
            }
            "error" => {
                let error = params["error"]["message"].as_str();
                self.error = error.unwrap_or_default().to_owned();
                out.tell(match params["willRetry"] == true {
                    true => Told::Retry(self.error.clone()),
                    false => Told::Error(self.error.clone()),
                });
            }
            _ => {}
        }
    }

    fn on_turn_completed(&mut self, turn: &Value, out: &mut Out) -> Option<Event> {
        let error = match turn["status"].as_str() {
            Some("completed") => None,
            Some("interrupted") if self.is_cancelled => return Some(Event::Cancelled),
            status => {
                let error = turn["error"]["message"].as_str();
                let error = error.or(Some(&*self.error).filter(|error| !error.is_empty()));
                Some(
                    error
                        .or(status)
                        .unwrap_or("the turn has no status")
                        .to_owned(),
                )
            }
        };
        match (self.asked, error) {
            (Asked::Rehearsal(_), None) => {
                self.asked = Asked::Thread(self.start_thread(out));
                None
            }
            (Asked::Rehearsal(_), Some(error)) => Some(Event::Failed(error)),
            (Asked::Prompt(_), None) => Some(Event::Done {
                text: format!("{}\n", std::mem::take(&mut self.answer)),
                error: String::new(),
                code: 0,
            }),
            (Asked::Prompt(_), Some(error)) => Some(Event::Done {
                text: String::new(),
                error: format!("ERROR: {error}\n"),
                code: 1,
            }),
            _ => None,
        }
    }
}

impl Cli for Codex {
    fn argv(&self) -> &'static [&'static str] {
        &["codex", "app-server"]
    }

    fn begin(&mut self, rehearses: bool, out: &mut Out) {
        self.rehearses = rehearses;
        // The name of `codex exec`: it is in the requests to the model.
        let client = json!({ "name": "codex_exec", "title": null, "version": "0.0.0" });
        let params = json!({ "clientInfo": client });
        self.asked = Asked::Initialize(self.calls.request("initialize", params, out));
    }

    fn check(&mut self, out: &mut Out) {
        self.asked = Asked::Check(self.calls.request("thread/loaded/list", json!({}), out));
    }

    fn renew(&mut self, out: &mut Out) {
        self.asked = Asked::Renewal(self.start_thread(out));
    }

    fn prompt(&mut self, text: &str, model: &str, out: &mut Out) {
        self.error.clear();
        self.turn.clear();
        self.changes.clear();
        self.is_cancelled = false;
        self.asked = Asked::Prompt(self.start_turn(text, model, out));
    }

    fn cancel(&mut self, out: &mut Out) {
        self.is_cancelled = true;
        self.interrupt(out);
    }

    fn answer(&mut self, question: &Question, answer: &Answer, out: &mut Out) {
        let decision = match answer.allowed {
            true => "accept",
            false => "decline",
        };
        Calls::answer(&question.id, &json!({ "decision": decision }), out);
    }

    fn on_line(&mut self, line: &Value, out: &mut Out) -> Option<Event> {
        match Calls::read(line)? {
            Message::Answer(id, answer) => self.on_answer(id, answer, out),
            Message::Request { id, method, params } => self.on_request(id, method, params, out),
            // Also of an agent that the model has started.
            Message::Notice("item/started", params)
                if self.asks && params["item"]["type"] == "fileChange" =>
            {
                let item = &params["item"];
                let id = item["id"].as_str().unwrap_or_default();
                self.changes.insert(id.to_owned(), item["changes"].clone());
                if params["threadId"] == self.thread.as_str() {
                    tell_call(item, out);
                }
                None
            }
            Message::Notice("item/started", params)
                if self.asks && UNASKED.iter().any(|kind| params["item"]["type"] == *kind) =>
            {
                tell_call(&params["item"], out);
                let (name, arguments) = call_of(&params["item"]);
                Some(Event::Calls(Question {
                    id: Value::Null,
                    call_id: text_of(&params["item"]["id"]),
                    name,
                    arguments,
                    asked_at: Instant::now(),
                }))
            }
            Message::Notice(_, params) if params["threadId"] != self.thread.as_str() => None,
            Message::Notice("turn/completed", params) => {
                self.on_turn_completed(&params["turn"], out)
            }
            Message::Notice(name, params) => {
                self.on_notice(name, params, out);
                None
            }
        }
    }
}

/// The uses of tools that Codex does not ask about.
const UNASKED: [&str; 6] = [
    "collabAgentToolCall",
    "dynamicToolCall",
    "imageGeneration",
    "imageView",
    "mcpToolCall",
    "webSearch",
];
/// The items of a turn that are no uses of tools.
const WORDS: [&str; 3] = ["agentMessage", "reasoning", "userMessage"];

fn tell_call(item: &Value, out: &mut Out) {
    let kind = item["type"].as_str().unwrap_or_default();
    if WORDS.contains(&kind) {
        return;
    }
    let (name, arguments) = call_of(item);
    out.tell(Told::ToolCall {
        id: text_of(&item["id"]),
        name,
        arguments: arguments.to_string(),
    });
}

/// The name and the arguments of a use of a tool.
fn call_of(item: &Value) -> (String, Value) {
    let kind = text_of(&item["type"]);
    match &*kind {
        "commandExecution" => (kind, json!({ "command": item["command"] })),
        "mcpToolCall" => {
            let name = format!("{}/{}", text_of(&item["server"]), text_of(&item["tool"]));
            (name, item["arguments"].clone())
        }
        _ => (kind, item.clone()),
    }
}

fn text_of(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn tell_result(item: &Value, out: &mut Out) {
    let kind = item["type"].as_str().unwrap_or_default();
    if WORDS.contains(&kind) {
        return;
    }
    let output = match item["aggregatedOutput"].as_str() {
        Some(output) => output.to_owned(),
        None => item.to_string(),
    };
    out.tell(Told::ToolResult {
        id: item["id"].as_str().unwrap_or_default().to_owned(),
        output,
        is_error: ["failed", "declined"]
            .iter()
            .any(|status| item["status"] == *status),
    });
}
