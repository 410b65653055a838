//! The command's output and artifacts: stores them in the run's windows, then acknowledges them.

use std::time::{Duration, Instant};

use polydev_proto::{
    init::{Collected, Data, DataAck, to_init},
    stream::Stream,
};

use super::{Carrier, Ending, Stop};

/// How long after the command's end a caller may take to fetch the artifacts.
const FETCH_TIMEOUT: Duration = Duration::from_secs(5 * 60);

impl Carrier<'_> {
    pub(super) async fn output(&mut self, data: Data) -> Result<(), Stop> {
        let ack = DataAck {
            stream: data.stream,
            offset: data.offset + data.data.len() as u64,
        };
        let ack = to_init::Message::DataAck(ack);
        let Some(stream) = Stream::of_number(data.stream) else {
            return self.send(ack).await; // Of a newer init.
        };
        let window = &self.run.output[stream];
        // What an agent does must not slow it, and not even if nobody listens.
        let drops = match stream {
            Stream::Stdout | Stream::Stderr => self.run.claimed.drop_oldest,
            Stream::Artifacts => false,
            Stream::Events => true,
        };
        if drops {
            window.drop_oldest(data.data.len() as u64);
        }
        if let Err(error) = window.append(data.offset, &data.data) {
            let run_id = self.run.claimed.run_id;
            tracing::debug!(%run_id, %error, "output waits for memory");
            self.runs.make_room();
            self.starved = Some(data);
            return Ok(());
        }
        let after = self.run.arrived.elapsed();
        self.run.update(|progress| {
            if matches!(stream, Stream::Stdout | Stream::Stderr) {
                progress.first_output.get_or_insert(after);
            }
        });
        self.send(ack).await
    }

    /// The command is dead, and its artifacts are read now, which has a time limit of its own.
    pub(super) fn collected(&mut self, Collected { artifacts, exited }: Collected) {
        if let Some(artifacts) = artifacts {
            self.run.manifest.keep(&artifacts);
            self.run
                .update(|progress| progress.artifacts = Some(artifacts.into()));
        }
        // Init sends it before its search for artifacts, after it with their size, and again on
        // each connection. The time counts from the first.
        let is_first = self.collected.is_none();
        self.collected = exited;
        if !is_first {
            return;
        }
        self.end_at = Instant::now()
            + match self.ending {
                Ending::No => FETCH_TIMEOUT,
                // A caller that ends a run does not wait for long.
                Ending::Asked { .. } | Ending::Killed => self.run.claimed.kill_timeout,
            };
        if let Ending::Asked { .. } = self.ending {
            self.ending = Ending::Killed;
        }
    }
}
