//! A conversation at the command line: each line of stdin is a prompt, and SIGINT ends the answer.

use std::io::IsTerminal;

use polydev_client::Input;
use polydev_proto::runtime::{Stream, agent_event, run_event::Event};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    sync::watch,
};

/// One prompt at a time, so that SIGINT ends the answer that goes on.
#[derive(Clone)]
pub(super) struct Conversation {
    input: Input,
    /// Whether an answer is awaited.
    is_open: watch::Sender<bool>,
}

impl Conversation {
    /// `has_first` is whether the run starts with a prompt.
    pub(super) fn new(input: Input, has_first: bool) -> Self {
        let is_open = watch::Sender::new(has_first);
        Self { input, is_open }
    }

    /// Sends the lines of stdin until its end, each when the one before is answered.
    pub(super) async fn forward_stdin(self) {
        let mut answered = self.is_open.subscribe();
        let mut lines = BufReader::new(tokio::io::stdin()).lines();
        loop {
            // The sender is in `self`.
            drop(answered.wait_for(|is_open| !is_open).await);
            if std::io::stdin().is_terminal() {
                eprint!("> ");
            }
            let line = match lines.next_line().await {
                Ok(Some(line)) if line.trim().is_empty() => continue,
                Ok(Some(line)) => line,
                Ok(None) => return self.input.close(),
                Err(error) => {
                    eprintln!("polydev-shim: cannot read a prompt from stdin: {error}");
                    return self.input.close();
                }
            };
            self.is_open.send_replace(true);
            if self.input.prompt(&line, "").await.is_err() {
                return;
            }
        }
    }

    /// Ends the answer that goes on. Returns whether there is one.
    pub(super) fn cancel(&self) -> bool {
        let is_open = *self.is_open.borrow();
        if is_open {
            let input = self.input.clone();
            tokio::spawn(async move { input.cancel_turn().await });
        }
        is_open
    }

    pub(super) fn on(&self, event: &Event) {
        let is_end = match event {
            Event::AgentEvents(told) => told
                .events
                .iter()
                .any(|told| matches!(told.event, Some(agent_event::Event::TurnEnded(_)))),
            // The end may be lost, too.
            Event::Lost(lost) => lost.stream() == Stream::Events,
            _ => false,
        };
        if is_end {
            self.is_open.send_replace(false);
        }
    }
}
