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
mod cli;
mod control;
mod google;
mod lines;
mod openai;
mod process;

use nix::sys::signal::{Signal, raise};
use polydev_proto::provider::Provider;

pub use lines::{Lines, MAX_LINE, TooLong};

/// How an agent ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Code(u8),
    Signal(Signal),
}

/// Starts the provider's CLI, tells init on stdin when it waits, and gives it the prompt that
/// comes from there. Writes the answer to stdout as the CLI's one-shot form does. Returns the
/// status that that form exits with; ends by the signal that has ended the CLI.
#[must_use]
pub fn run(provider: Provider) -> u8 {
    match agent::run(provider) {
        End::Code(code) => code,
        End::Signal(signal) => {
            process::let_signals_through();
            // A signal that does not end a process has not ended the CLI.
            let _ended = raise(signal);
            128 + u8::try_from(signal as i32).unwrap_or_default()
        }
    }
}
