//! What an agent knows of a provider's CLI: how it waits, and the protocol of its lines.

use serde_json::Value;

use crate::{
    asks::{Answer, Question},
    told::Told,
};

/// What an agent asks before it knows a user. The broker answers it.
pub(crate) const REHEARSAL: &str = "Reply with the word ready.";

/// What a line of the CLI means to the agent.
#[derive(Debug, PartialEq)]
pub(crate) enum Event {
    /// It has answered the rehearsal, and waits for a prompt.
    Ready,
    /// It has answered [`Cli::check`].
    Checked,
    /// A part of the answer, as the one-shot form prints it.
    Print(String),
    /// The prompt is done: the rest of the answer, a message for stderr, and the exit status.
    Done {
        text: String,
        error: String,
        code: u8,
    },
    /// The turn is over because of [`Cli::cancel`].
    Cancelled,
    /// It wants to make a call, and waits for [`Cli::answer`].
    Asks(Question),
    /// It makes a call that it does not ask about.
    Calls(Question),
    /// It does not do what it was asked; the reason is for people.
    Failed(String),
}

/// What comes of a line: lines to send to the CLI, and what its caller hears.
#[derive(Debug, Default)]
pub(crate) struct Out {
    pub(crate) lines: Vec<Value>,
    pub(crate) told: Vec<Told>,
}

impl Out {
    pub(crate) fn send(&mut self, line: Value) {
        self.lines.push(line);
    }

    pub(crate) fn tell(&mut self, told: Told) {
        self.told.push(told);
    }
}

/// One provider's CLI in the form in which it waits. Knows what it has asked, and sends nothing
/// itself.
pub(crate) trait Cli {
    /// Its program and arguments.
    fn argv(&self) -> &'static [&'static str];

    /// What its environment has beside what every run's has.
    fn env(&self) -> &'static [(&'static str, &'static str)] {
        &[]
    }

    /// Sends what leads to [`Event::Ready`], with a rehearsal or without one.
    fn begin(&mut self, rehearses: bool, out: &mut Out);

    /// Asks something that costs it nothing, to see that it lives.
    fn check(&mut self, out: &mut Out);

    /// As [`Cli::check`], and forgets what it took from the day and from its folder when its
    /// session began. Leads to [`Event::Checked`] too.
    fn renew(&mut self, out: &mut Out);

    /// Sends the next prompt of its session. An empty model is the CLI's choice, or that of the prompt
    /// before.
    fn prompt(&mut self, text: &str, model: &str, out: &mut Out);

    /// Ends the turn of the prompt. It leads to [`Event::Cancelled`], unless the answer is there already.
    fn cancel(&mut self, out: &mut Out);

    /// Answers [`Event::Asks`].
    fn answer(&mut self, question: &Question, answer: &Answer, out: &mut Out);

    /// Reads a line.
    fn on_line(&mut self, line: &Value, out: &mut Out) -> Option<Event>;
}

/// JSON-RPC, as Codex and Gemini CLI speak it: requests with numbers.
#[derive(Debug, Default)]
pub(crate) struct Calls {
    last: u64,
}

impl Calls {
    /// Sends a request; returns its number.
    pub(crate) fn request(&mut self, method: &str, params: Value, out: &mut Out) -> u64 {
        self.last += 1;
        let id = self.last;
        out.send(
            serde_json::json!({ "jsonrpc": "2.0", "id": id, "method": method, "params": params }),
        );
        id
    }

    /// What a line is.
    pub(crate) fn read(line: &Value) -> Option<Message<'_>> {
        let id = line.get("id").filter(|id| !id.is_null());
        match (line["method"].as_str(), id) {
            (Some(method), Some(id)) => Some(Message::Request {
                id,
                method,
                params: &line["params"],
            }),
            (Some(method), None) => Some(Message::Notice(method, &line["params"])),
            (None, Some(id)) => Some(Message::Answer(
                id.as_u64()?,
                match line.get("error") {
                    Some(error) => Err(error["message"].as_str().unwrap_or("it says no more")),
                    None => Ok(&line["result"]),
                },
            )),
            (None, None) => None,
        }
    }

    /// Answers a request of the CLI.
    pub(crate) fn answer(id: &Value, result: &Value, out: &mut Out) {
        out.send(serde_json::json!({ "jsonrpc": "2.0", "id": id, "result": result }));
    }

    /// Refuses a request of the CLI that nobody is there to answer.
    pub(crate) fn refuse(id: &Value, method: &str, out: &mut Out) {
        let message = format!("polydev-agent does not answer `{method}`");
        let error = serde_json::json!({ "code": -32601, "message": message });
        out.send(serde_json::json!({ "jsonrpc": "2.0", "id": id, "error": error }));
    }
}

/// A line of JSON-RPC.
pub(crate) enum Message<'a> {
    /// The answer to the request of this number, or the error.
    Answer(u64, Result<&'a Value, &'a str>),
    /// Something that the CLI asks.
    Request {
        id: &'a Value,
        method: &'a str,
        params: &'a Value,
    },
    /// Something that nobody has asked.
    Notice(&'a str, &'a Value),
}
