//! What an agent knows of a provider's CLI: how it waits, and the protocol of its lines.

use polydev_proto::provider::Provider;
use serde_json::Value;

use crate::{anthropic::Claude, google::Gemini, openai::Codex};

/// What an agent asks before it knows a user. The broker answers it.
pub(crate) const REHEARSAL: &str = "Reply with the word ready.";

/// What a line of the CLI means to the agent.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// It has answered the rehearsal, and waits for a prompt.
    Ready,
    /// It has answered [`Cli::check`].
    Checked,
    /// A part of the answer, as the one-shot form prints it.
    Text(String),
    /// The prompt is done: the rest of the answer, a message for stderr, and the exit status.
    Done {
        text: String,
        error: String,
        code: u8,
    },
    /// It does not do what it was asked; the reason is for people.
    Failed(String),
}

/// One provider's CLI in the form in which it waits. Knows what it has asked, and sends nothing
/// itself: `out` gets the lines to send.
pub(crate) trait Cli {
    /// Its program and arguments.
    fn argv(&self) -> &'static [&'static str];

    /// What its environment has beside what every run's has.
    fn env(&self) -> &'static [(&'static str, &'static str)] {
        &[]
    }

    /// Sends what leads to [`Event::Ready`].
    fn begin(&mut self, out: &mut Vec<Value>);

    /// Asks something that costs it nothing, to see that it lives.
    fn check(&mut self, out: &mut Vec<Value>);

    /// As [`Cli::check`], and forgets what it took from the day and from its folder when its
    /// session began. Leads to [`Event::Checked`] too.
    fn renew(&mut self, out: &mut Vec<Value>);

    /// Sends the prompt. An empty model is the CLI's choice.
    fn prompt(&mut self, text: &str, model: &str, out: &mut Vec<Value>);

    /// Reads a line.
    fn on_line(&mut self, line: &Value, out: &mut Vec<Value>) -> Option<Event>;
}

/// The provider's CLI, which works in the folder `work_dir`.
pub(crate) fn of(provider: Provider, work_dir: String) -> Box<dyn Cli> {
    match provider {
        Provider::Anthropic => Box::new(Claude::default()),
        Provider::OpenAi => Box::new(Codex::new(work_dir)),
        Provider::Google => Box::new(Gemini::new(work_dir)),
    }
}

/// JSON-RPC, as Codex and Gemini CLI speak it: requests with numbers.
#[derive(Debug, Default)]
pub(crate) struct Calls {
    last: u64,
}

impl Calls {
    /// Sends a request; returns its number.
    pub(crate) fn request(&mut self, method: &str, params: Value, out: &mut Vec<Value>) -> u64 {
        self.last += 1;
        let id = self.last;
        out.push(
            serde_json::json!({ "jsonrpc": "2.0", "id": id, "method": method, "params": params }),
        );
        id
    }

    /// What a line is. Something that the CLI asks is refused, because nobody is there to answer.
    pub(crate) fn read<'a>(line: &'a Value, out: &mut Vec<Value>) -> Option<Message<'a>> {
        let id = line.get("id").filter(|id| !id.is_null());
        match (line["method"].as_str(), id) {
            (Some(method), Some(id)) => {
                let message = format!("polydev-agent does not answer `{method}`");
                let error = serde_json::json!({ "code": -32601, "message": message });
                out.push(serde_json::json!({ "jsonrpc": "2.0", "id": id, "error": error }));
                None
            }
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
}

/// A line of JSON-RPC.
pub(crate) enum Message<'a> {
    /// The answer to the request of this number, or the error.
    Answer(u64, Result<&'a Value, &'a str>),
    /// Something that nobody has asked.
    Notice(&'a str, &'a Value),
}
