//! An init that reconnects after its connection broke. It reports its progress, and the
//! driver resends what may not have arrived.

use polydev_proto::{
    init::{hello, to_init},
    node::ended::Reason,
};
use tokio::time::timeout;

use super::{Carrier, Connection, DESTROYED, End, Ending, RETURN_TIMEOUT, SIGTERM, Stop};
use crate::{link::Greeted, run::claim::Refusal};

impl Carrier<'_> {
    /// Waits until init reconnects, and continues at the point that init reports.
    pub(super) async fn reconnect(&mut self) -> Result<(), Stop> {
        let Connection {
            listener,
            init,
            pid,
            link,
        } = &mut *self.connection;
        let greeted = tokio::select! {
            biased;
            () = self.run.kill.cancelled() => {
                return Err(match self.collected {
                    Some(_) => self.lost(),
                    None => self.end(Reason::Cancelled, DESTROYED),
                });
            }
            () = init.ended() => None,
            greeted = timeout(RETURN_TIMEOUT, listener.accept(|peer| peer == *pid)) => {
                greeted.ok().and_then(Result::ok)
            }
        };
        let Some(Greeted {
            link: new,
            state,
            requests,
            ..
        }) = greeted
        else {
            return Err(self.lost());
        };
        if let Some(requests) = requests {
            self.opened.listens(requests);
        }
        *link = Some(new);
        self.starved = None; // Init resends it.
        self.run.update(|progress| progress.connected = true);
        let run_id = self.run.claimed.run_id;
        let is_it = |text: &str| text.parse() == Ok(run_id);
        match state {
            hello::State::Waiting(_) => Err(Stop::End(End::NotStarted(Refusal::NotReached))),
            hello::State::Receiving(receiving) if is_it(&receiving.run_id) => {
                self.go_on(receiving.stdin_offset).await
            }
            hello::State::Running(running) if is_it(&running.run_id) => {
                self.started(running.form);
                self.go_on(running.stdin_offset).await
            }
            // Init reports the end again, after the output.
            hello::State::Exited(exited) if is_it(&exited.run_id) => {
                self.started(None);
                Ok(())
            }
            hello::State::NotStarted(refused) if is_it(&refused.run_id) => Ok(()),
            _ => Err(self.end(Reason::Lost, "its container has another run")),
        }
    }

    /// Resends what may not have arrived. Init already has the input before `stdin_offset`.
    async fn go_on(&mut self, stdin_offset: u64) -> Result<(), Stop> {
        self.taken(stdin_offset, false);
        if self.ending != Ending::No {
            // The signal may have been lost with the connection.
            self.signal(SIGTERM).await?;
        }
        if let Some(size) = self.terminal {
            self.send(to_init::Message::Resize(size)).await?;
        }
        self.stdin.sent = self.stdin.sent.max(stdin_offset);
        for stdin in self.stdin.kept.clone() {
            self.send(to_init::Message::Stdin(stdin)).await?;
        }
        Ok(())
    }
}
