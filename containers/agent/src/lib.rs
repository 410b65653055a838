//! A provider's CLI that is started before anybody knows who will use it, and is given one
//! prompt. polydev-init runs this as a process of its own: `polydev-init agent PROVIDER`.
//!
//! ```text
//!  init <-- control (stdin, both ways) --> agent <-- lines of JSON --> CLI (own process group)
//!       <-- the run's stdout and stderr --
//! ```
//!
//! [`agent`] is the life of an agent, from its start to its answer. [`cli`] is what it knows of
//! a CLI; each provider's module has the facts of one. The CLIs' lines may be anything a model
//! can write, and this process is where they are read: init reads none of them.

mod agent;
mod anthropic;
mod asks;
mod cli;
mod control;
mod conversation;
mod google;
mod lines;
mod openai;
mod process;
mod quiet;
mod told;

use std::collections::BTreeSet;

use nix::sys::signal::{Signal, raise};
use polydev_proto::provider::Vendor;

pub use lines::{Lines, MAX_LINE, TooLong};
pub use process::FORWARDED;

/// What a caller hears of an agent whose CLI writes these bytes, from its start to the end of its
/// prompt, and asks about tools or does not. For the fuzz target.
#[doc(hidden)]
#[must_use]
pub fn rehearsed(provider: Vendor, asks: bool, said: &[u8]) -> Vec<Vec<u8>> {
    let mut cli = agent::cli_of(provider, "/workspace".into(), asks);
    let (mut out, mut lines) = (cli::Out::default(), Lines::default());
    cli.begin(true, &mut out);
    lines.push(said);
    while let Ok(Some(line)) = lines.next_line() {
        let Ok(line) = serde_json::from_slice(&line) else {
            continue;
        };
        match cli.on_line(&line, &mut out) {
            Some(cli::Event::Ready) => cli.check(&mut out),
            Some(cli::Event::Checked) => cli.prompt("hello", "", &mut out),
            Some(cli::Event::Asks(question) | cli::Event::Calls(question)) => {
                let answer = asks::Answer {
                    allowed: question.name.len() % 2 == 0,
                    reason: "because".into(),
                };
                cli.answer(&question, &answer, &mut out);
            }
            Some(cli::Event::Done { .. } | cli::Event::Cancelled) => break,
            _ => {}
        }
    }
    out.told.iter().flat_map(told::Told::lines).collect()
}

/// What an agent makes of these bytes on the stdin of its run, if they come in pieces of so many
/// bytes: each prompt's text, or why a line is none; and after how many of them a turn that goes
/// on is ended. Ending it twice is ending it. For the fuzz target.
#[doc(hidden)]
#[must_use]
pub fn conversed(
    provider: Vendor,
    said: &[u8],
    piece: usize,
) -> (Vec<Result<String, String>>, BTreeSet<usize>) {
    use conversation::{Conversation, Next, Prompt};

    let mut conversation = Conversation::new(provider);
    let (mut heard, mut cancelled) = (Vec::new(), BTreeSet::new());
    let mut pieces = said.chunks(piece.max(1));
    while conversation.is_open() {
        match pieces.next() {
            Some(piece) => conversation.push(piece),
            None => conversation.end(),
        }
        loop {
            if conversation.read() {
                cancelled.insert(heard.len());
            }
            let is_full = !conversation.has_room();
            if is_full || !conversation.is_open() {
                heard.extend(
                    std::iter::from_fn(|| conversation.next()).map(|next| match next {
                        Next::Prompt(Prompt { text, .. }) => Ok(text),
                        Next::Cancelled => Err("cancelled".into()),
                        Next::Wrong(reason) => Err(reason),
                    }),
                );
            }
            if !is_full {
                break;
            }
        }
    }
    (heard, cancelled)
}

/// How an agent ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Code(u8),
    Signal(Signal),
}

/// Starts the provider's CLI, tells init on stdin when it waits, and gives it the prompt that
/// comes from there. If the CLI asks, each call of a tool waits for an answer of init's. Writes the
/// answer to stdout as the CLI's one-shot form does. Returns the
/// status that that form exits with; ends by the signal that has ended the CLI.
#[must_use]
pub fn run(provider: Vendor, asks: bool) -> u8 {
    match agent::run(provider, asks) {
        End::Code(code) => code,
        End::Signal(signal) => {
            process::let_signals_through();
            // A signal that does not end a process has not ended the CLI.
            let _ended = raise(signal);
            128 + u8::try_from(signal as i32).unwrap_or_default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same lines are the seeds of the fuzz target.
    #[test]
    fn every_cli_is_understood_from_its_start_to_its_answer() {
        for (provider, said, kinds) in [
            (
                Vendor::Anthropic,
                include_bytes!("../../../tests/fuzz/seeds/agent/anthropic").as_slice(),
                vec!["text", "tool_call", "tool_result", "retry", "usage"],
            ),
            (
                Vendor::OpenAi,
                include_bytes!("../../../tests/fuzz/seeds/agent/openai"),
                vec!["text", "tool_call", "tool_result", "usage", "retry"],
            ),
            (
                Vendor::Google,
                include_bytes!("../../../tests/fuzz/seeds/agent/google"),
                vec!["text", "tool_call", "tool_result", "usage"],
            ),
        ] {
            let told = rehearsed(provider, false, said);
            let kind = |line: &Vec<u8>| {
                let line: serde_json::Value = serde_json::from_slice(line).unwrap();
                line.as_object().unwrap().keys().next().unwrap().clone()
            };
            let heard: Vec<String> = told.iter().map(kind).collect();
            assert_eq!(heard, kinds, "{provider}");
        }
    }
}
