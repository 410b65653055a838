//! Carries one run, from a waiting container to the end of its command.
//!
//! This needs neither Docker nor Nomad. The driver acknowledges the command's output to
//! init once it is in the run's windows. On every new connection init resends what was not
//! acknowledged. So neither a broken connection nor a restart of this process loses any
//! output.

mod again;
mod end;
mod output;
mod signed;
mod stdin;

use std::time::{Duration, Instant};

use bytes::Bytes;
use polydev_proto::{
    broker::Policy,
    frame::MAX_DATA,
    init::{
        Data, Exited, Form, NotStarted, Signal, Start, TerminalSize, ToolAnswer, from_init, to_init,
    },
    node::ended::Reason,
    stream::Stream,
};
use tokio::{
    sync::mpsc,
    task::{JoinHandle, spawn_blocking},
    time::{sleep, sleep_until},
};

use signed::Signed;
use stdin::StdinWindow;

use super::{Ended, Granted, Input, Run, book::Runs, claim::Refusal, window::MAX_WAITING};
use crate::{
    broker::Opened,
    limits::{self, Limits},
    link::{self, Connection},
    traces::Traced,
};

/// How long past the deadline the driver waits for init, before it ends the container
/// itself.
const GRACE_TIMEOUT: Duration = Duration::from_secs(1);
/// How long after the claim the command's files may take to arrive.
const FILES_TIMEOUT: Duration = Duration::from_secs(2 * 60);
/// How long an init with a broken connection may take to reconnect.
const RETURN_TIMEOUT: Duration = Duration::from_secs(10);
/// How often to check whether memory for output is available again.
const MEMORY_INTERVAL: Duration = Duration::from_millis(100);
/// Room beyond the caller's window for the last output of a run that is asked to end: it
/// fits what init and the command's pipes hold.
const MAX_LAST_OUTPUT: u64 = 2 << 20;

const SIGTERM: i32 = 15;
const SIGKILL: i32 = 9;

/// A run to start, and its input.
#[derive(Debug)]
pub(crate) struct Order {
    pub(crate) start: Start,
    /// For the broker. Empty if the run has no keys there.
    pub(crate) sealed_keys: Bytes,
    pub(crate) policy: Option<Policy>,
    /// The command must not start after this time.
    pub(crate) start_by: Instant,
    pub(crate) inputs: mpsc::Receiver<Input>,
}

/// Raises the limits, gives the keys to the broker, starts the command and carries it to its
/// end. Afterwards the container is no longer needed.
///
/// Bandwidth is raised during the start, but lowered before it. The change can take long,
/// because the kernel holds the same lock while it creates or removes other containers'
/// interfaces.
pub(crate) async fn start(
    runs: &Runs,
    run: &Run,
    connection: &mut Connection,
    limits: &limits::Handle,
    opened: &Opened,
    class: &Limits,
    order: Order,
) {
    let granted_after = run.arrived.elapsed();
    let traced = Traced {
        parent: order.start.trace.clone(),
        arrived: run.arrived,
        run_id: run.claimed.run_id,
        slot_id: run.claimed.slot_id.clone(),
    };
    // They are on their way while the limits are raised.
    let rate = class.bytes_per_second();
    let keys = opened.grant(run.claimed.run_id, order.sealed_keys, order.policy, rate);
    let mut shaping = Some(spawn_blocking(limits.shaping(class)));
    let lowered = match limits.is_lowered_by(class) {
        true => shaped(&mut shaping).await,
        false => Ok(()),
    };
    let ready = async {
        let broken = |reason| Refusal::Broken { reason };
        lowered.map_err(broken)?;
        let set = limits.set(class);
        set.map_err(|error| broken(crate::chain(&error)))?;
        if let Some(keys) = keys {
            let granted = keys.done().await;
            granted.map_err(|error| broken(crate::chain(&error)))?;
        }
        // Last, because all of this takes time.
        if Instant::now() >= order.start_by {
            return Err(Refusal::TooLate);
        }
        Ok(())
    };
    if let Err(refusal) = ready.await {
        tracing::warn!(
            run_id = %run.claimed.run_id,
            error = crate::chain(&refusal),
            "the run is not started"
        );
        return runs.aborted(run, refusal);
    }
    let granted = Granted {
        granted_after,
        limits_raised_after: run.arrived.elapsed(),
    };
    run.update(|progress| {
        progress.connected = true;
        progress.granted = Some(granted);
    });
    let mut carrier = Carrier::new(runs, run, connection, Some(limits), opened, order.inputs);
    carrier.shaping = shaping;
    // If the connection breaks, init reports whether the message arrived.
    let start = to_init::Message::Start(order.start.into());
    let _told_below = carrier.send(start).await;
    carrier.carry().await;
    traced.end(run.form().is_some_and(|form| form.parked));
}

/// Continues a run from an earlier life of the driver.
pub(crate) async fn resume(
    runs: &Runs,
    run: &Run,
    connection: &mut Connection,
    limits: Option<&limits::Handle>,
    opened: &Opened,
    inputs: mpsc::Receiver<Input>,
) {
    Carrier::new(runs, run, connection, limits, opened, inputs)
        .carry()
        .await;
}

struct Carrier<'a> {
    runs: &'a Runs,
    run: &'a Run,
    connection: &'a mut Connection,
    limits: Option<&'a limits::Handle>,
    opened: &'a Opened,
    /// Set until the run's bandwidth is in force.
    shaping: Option<JoinHandle<Result<(), limits::Error>>>,
    inputs: mpsc::Receiver<Input>,
    stdin: StdinWindow,
    /// What of the input must be as it was signed.
    signed: Option<Signed>,
    /// The size from the caller's last resize.
    terminal: Option<TerminalSize>,
    /// How the command ended, while its artifacts are being read.
    collected: Option<Exited>,
    /// When the driver stops waiting for init.
    end_at: Instant,
    ending: Ending,
    /// The command is dead: accept all its output, even if the caller's window is full.
    overdraft: bool,
    /// Output for which there was no memory. It is not acknowledged, and nothing more is
    /// read meanwhile.
    starved: Option<Data>,
}

#[derive(Clone, Copy, PartialEq)]
enum Ending {
    No,
    /// SIGTERM is sent; SIGKILL follows.
    Asked {
        kill_at: Instant,
    },
    Killed,
}

enum Wake {
    FromInit(Result<from_init::Message, link::Error>),
    Input(Input),
    Shaped(Result<(), String>),
    Room,
    /// An API has answered.
    Answered,
    /// A shim has decided about a call of a tool.
    Tool(ToolAnswer),
    /// Memory may be available again.
    Memory,
    /// Init has ended while its remaining output could not be read.
    Died,
    Cancel,
    Kill,
    Time,
}

/// What interrupts the run, temporarily or for good.
enum Stop {
    Link(link::Error),
    End(End),
}

impl From<link::Error> for Stop {
    fn from(error: link::Error) -> Self {
        Self::Link(error)
    }
}

/// How carrying a run ended.
enum End {
    Ended(Ended),
    NotStarted(Refusal),
}

impl<'a> Carrier<'a> {
    fn new(
        runs: &'a Runs,
        run: &'a Run,
        connection: &'a mut Connection,
        limits: Option<&'a limits::Handle>,
        opened: &'a Opened,
        inputs: mpsc::Receiver<Input>,
    ) -> Self {
        Self {
            runs,
            run,
            connection,
            limits,
            opened,
            shaping: None,
            inputs,
            stdin: StdinWindow::default(),
            signed: Signed::of(run),
            terminal: None,
            collected: None,
            end_at: end_at(run),
            ending: Ending::No,
            overdraft: false,
            starved: None,
        }
    }

    async fn carry(mut self) {
        let end = loop {
            match self.step().await {
                Ok(()) => {}
                Err(Stop::End(end)) => break end,
                Err(Stop::Link(error)) => {
                    let (run_id, error) = (self.run.claimed.run_id, crate::chain(&error));
                    tracing::debug!(%run_id, error, "lost the connection to init");
                    self.connection.link = None;
                }
            }
        };
        if let Some(seen) = self.opened.finish().await {
            self.runs.answered(self.run, seen);
        }
        match end {
            End::Ended(ended) => {
                let ended = self.run.with_answers(ended);
                self.runs.ended(self.run, ended);
            }
            End::NotStarted(refusal) => self.runs.aborted(self.run, refusal),
        }
    }

    async fn step(&mut self) -> Result<(), Stop> {
        if self.connection.link.is_none() {
            return self.reconnect().await;
        }
        match self.wait().await {
            Wake::FromInit(message) => self.on_message(message?).await,
            Wake::Input(input) => self.on_input(input).await,
            Wake::Tool(answer) => self.send(to_init::Message::ToolAnswer(answer)).await,
            Wake::Shaped(Ok(())) | Wake::Room | Wake::Answered => Ok(()),
            Wake::Shaped(Err(error)) => Err(self.broken(&error)),
            Wake::Memory => match self.starved.take() {
                Some(data) => self.output(data).await,
                None => Ok(()),
            },
            Wake::Died => {
                self.overdraft = true;
                Ok(())
            }
            // The command has already ended; only files remain to be fetched.
            Wake::Cancel | Wake::Kill if self.collected.is_some() => Err(self.lost()),
            Wake::Cancel => {
                let kill_at = Instant::now() + self.run.claimed.kill_timeout;
                self.ending = Ending::Asked { kill_at };
                self.signal(SIGTERM).await
            }
            Wake::Kill => Err(self.end(Reason::Cancelled, DESTROYED)),
            Wake::Time => self.on_time().await,
        }
    }

    /// Waits for the next event. Init's messages are read only while there is room for
    /// them, so a slow caller slows down the command.
    async fn wait(&mut self) -> Wake {
        let wake_at = match self.ending {
            Ending::Asked { kill_at } => kill_at.min(self.end_at),
            Ending::No => self
                .api_deadline()
                .map_or(self.end_at, |at| at.min(self.end_at)),
            Ending::Killed => self.end_at,
        };
        let most = match self.ending {
            Ending::No => MAX_WAITING,
            // The command's end should be seen before the kill timeout.
            Ending::Asked { .. } | Ending::Killed => MAX_WAITING + MAX_LAST_OUTPUT,
        };
        let is_starved = self.starved.is_some();
        let fits = |stream| self.run.output[stream].waiting() + MAX_DATA as u64 <= most;
        let takes_all = self.overdraft || self.run.claimed.drop_oldest;
        let has_room = !is_starved
            && fits(Stream::Artifacts)
            && (takes_all || (fits(Stream::Stdout) && fits(Stream::Stderr)));
        let window_open = self.stdin.is_open();
        let is_asked = self.ending != Ending::No;
        let Connection { init, link, .. } = &mut *self.connection;
        let message = async {
            match link {
                Some(link) => link.reader.next().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = self.run.kill.cancelled() => Wake::Kill,
            () = self.run.cancel.asked(), if !is_asked => Wake::Cancel,
            message = message, if has_room => Wake::FromInit(message),
            () = self.run.room.notified(), if !has_room => Wake::Room,
            () = self.run.answered.notified() => Wake::Answered,
            answer = self.run.tools.answer() => Wake::Tool(answer),
            () = sleep(MEMORY_INTERVAL), if is_starved => Wake::Memory,
            () = init.ended(), if !has_room && !self.overdraft => Wake::Died,
            shaped = shaped(&mut self.shaping) => Wake::Shaped(shaped),
            Some(input) = self.inputs.recv(), if window_open => Wake::Input(input),
            () = sleep_until(wake_at.into()) => Wake::Time,
        }
    }

    async fn on_message(&mut self, message: from_init::Message) -> Result<(), Stop> {
        match message {
            from_init::Message::Data(data) => return self.output(data).await,
            from_init::Message::Started(started) => self.started(started.form),
            from_init::Message::StdinAck(ack) => self.taken(ack.offset, ack.closed),
            from_init::Message::Exited(exited) => return Err(self.exited(&exited)),
            from_init::Message::Collected(collected) => self.collected(collected),
            from_init::Message::Refreshed(refreshed) => {
                self.runs.refreshed(self.run, &refreshed);
            }
            from_init::Message::ToolCall(call) => self.runs.tool_called(self.run, call),
            from_init::Message::NotStarted(refused) => return Err(self.not_started(&refused)),
            // Only sent first on a connection, and handled there.
            from_init::Message::Hello(_) => {}
            // It has ended before the claim arrived, and init starts the command itself.
            from_init::Message::Agent(_) => {}
        }
        Ok(())
    }

    async fn on_time(&mut self) -> Result<(), Stop> {
        let now = Instant::now();
        match self.ending {
            Ending::Asked { kill_at } if kill_at <= now => {
                self.ending = Ending::Killed;
                self.overdraft = true;
                self.end_at = self.end_at.min(now + GRACE_TIMEOUT);
                self.signal(SIGKILL).await
            }
            // Asked to end now, it wakes up as one that is cancelled.
            Ending::No if self.api_deadline().is_some_and(|at| at <= now) => {
                self.runs.cancel(self.run, self.run.api_unavailable());
                Ok(())
            }
            // The API has answered in the meantime.
            Ending::No if now < self.end_at => Ok(()),
            Ending::No if self.waits_for_files() => Err(self.not_started(&NotStarted {
                message: format!(
                    "its files did not arrive within {} s",
                    FILES_TIMEOUT.as_secs()
                ),
                ..NotStarted::default()
            })),
            // Init has ended the command, and its last output waits for room.
            _ if !self.overdraft => {
                self.overdraft = true;
                self.end_at = now + GRACE_TIMEOUT;
                Ok(())
            }
            _ if self.collected.is_some() => Err(self.lost()),
            Ending::No => Err(self.end(Reason::Deadline, "its deadline passed")),
            Ending::Asked { .. } | Ending::Killed => Err(self.ended_early()),
        }
    }

    fn started(&mut self, form: Option<Form>) {
        if self.run.progress.borrow().started.is_none() {
            self.runs.started(self.run, form);
            self.end_at = end_at(self.run);
        }
    }

    /// When the run should end because of an API; never while the files of a command that has
    /// ended are fetched.
    fn api_deadline(&self) -> Option<Instant> {
        let deadline = self.run.api_deadline();
        deadline.filter(|_| self.collected.is_none())
    }

    fn waits_for_files(&self) -> bool {
        self.run.claimed.files_bytes > 0 && self.run.progress.borrow().started.is_none()
    }

    async fn signal(&mut self, number: i32) -> Result<(), Stop> {
        self.send(to_init::Message::Signal(Signal { number })).await
    }

    async fn send(&mut self, message: to_init::Message) -> Result<(), Stop> {
        let link = self.connection.link.as_mut().ok_or(link::Error::Closed)?;
        Ok(link.writer.send(message).await?)
    }
}

/// When the driver stops waiting for init.
fn end_at(run: &Run) -> Instant {
    let allowed = run.claimed.timeout + run.claimed.kill_timeout + GRACE_TIMEOUT;
    match run.progress.borrow().started {
        Some(after) => run.arrived + after + allowed,
        None if run.claimed.files_bytes > 0 => run.arrived + FILES_TIMEOUT,
        None => run.arrived + allowed,
    }
}

/// Waits until the bandwidth is set, and clears `shaping`.
async fn shaped(shaping: &mut Option<JoinHandle<Result<(), limits::Error>>>) -> Result<(), String> {
    let Some(running) = shaping else {
        return std::future::pending().await;
    };
    let result = running.await;
    *shaping = None;
    match result {
        Ok(result) => result.map_err(|error| crate::chain(&error)),
        Err(error) => Err(crate::chain(&error)),
    }
}

const DESTROYED: &str = "its slot was destroyed";
