//! A conversation at the command line: each line of stdin is a prompt, and SIGINT ends the answer.

use std::{
    io::IsTerminal,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use polydev_client::Input;
use polydev_proto::runtime::{agent_event, run_event::Event};
use tokio::io::{AsyncBufReadExt, BufReader};

/// The prompts that are not answered.
#[derive(Clone)]
pub(super) struct Conversation {
    input: Input,
    open: Arc<AtomicUsize>,
}

impl Conversation {
    /// `has_first` is whether the run starts with a prompt.
    pub(super) fn new(input: Input, has_first: bool) -> Self {
        Self {
            input,
            open: Arc::new(usize::from(has_first).into()),
        }
    }

    /// Sends the lines of stdin until its end.
    pub(super) async fn forward_stdin(self) {
        self.mark();
        let mut lines = BufReader::new(tokio::io::stdin()).lines();
        loop {
            let line = match lines.next_line().await {
                Ok(Some(line)) if line.trim().is_empty() => continue,
                Ok(Some(line)) => line,
                Ok(None) => break,
                Err(error) => {
                    eprintln!("polydev-shim: cannot read a prompt from stdin: {error}");
                    break;
                }
            };
            self.open.fetch_add(1, Ordering::Relaxed);
            if self.input.prompt(&line, "").await.is_err() {
                return;
            }
        }
        self.input.close();
    }

    /// Ends the answer that goes on. Returns whether there is one.
    pub(super) fn cancel(&self) -> bool {
        let is_open = self.open.load(Ordering::Relaxed) > 0;
        if is_open {
            let input = self.input.clone();
            tokio::spawn(async move { input.cancel_turn().await });
        }
        is_open
    }

    pub(super) fn on(&self, event: &Event) {
        let Event::AgentEvents(told) = event else {
            return;
        };
        let is_end = |event: &Option<agent_event::Event>| {
            matches!(event, Some(agent_event::Event::TurnEnded(_)))
        };
        let ended = told
            .events
            .iter()
            .filter(|told| is_end(&told.event))
            .count();
        if ended > 0 {
            let less = |open: usize| Some(open.saturating_sub(ended));
            let _always = self
                .open
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
            self.mark();
        }
    }

    /// Asks a person for the next prompt.
    fn mark(&self) {
        if std::io::stdin().is_terminal() && self.open.load(Ordering::Relaxed) == 0 {
            eprint!("> ");
        }
    }
}
