//! Relays between the caller and the driver until the command has ended. When a driver goes away
//! and comes back, the relay attaches to the run again where its stream broke. When the caller
//! goes away, the run continues.

mod agent;
mod encode;

pub(crate) use encode::{encode_destinations, encode_end, encode_errors, encode_usage};

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use futures_util::{StreamExt, stream::BoxStream};
use polydev_proto::{
    id::RunId,
    init::TerminalSize,
    node::{self, RunInput, run_event as driver, run_input},
    runtime::{self, Accepted, ApiErrors, EgressDenied, Lost, RunEvent, Stage, run_event},
    stream::{PerStream, Stream},
    workspace,
};
use tokio::{
    sync::mpsc,
    time::{sleep_until, timeout_at},
};
use tonic::{Code, Status};

use super::{
    Connection, Error, Events,
    attach::{self, Name, attach_again},
    input::{self, Input},
    request::{Invalid, Own},
};
use crate::pool::View;
use encode::{encode_artifacts, encode_output, encode_started, new_part};

/// Events that may wait for a caller; each at most 64 KiB. When that many wait, the relay stops
/// reading from the driver, and finally the command waits.
pub const MAX_EVENTS: usize = 4;
/// How long the end of a caller's input is held back: at first, a cancelled call looks as if its
/// caller had closed the input.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(50);
/// The caller's messages. An error means that the caller is gone.
pub type Inputs = BoxStream<'static, Result<Option<runtime::RunInput>, Status>>;

/// A run and the caller that gets its events.
pub struct Relay {
    pub view: View,
    pub name: Name,
    /// When the shim received the call.
    pub received: Instant,
    /// Where each stream goes on.
    pub offsets: PerStream<u64>,
    /// The input that the shim itself gives the command.
    pub own_input: Option<Own>,
    /// How long after the claim the relay waits for a driver that is gone. After this time
    /// nothing is left of the run.
    pub longest: Duration,
    pub caller: mpsc::Sender<Result<RunEvent, Error>>,
}

/// Where the run is: for a caller, the event after `queued`.
pub fn accepted(run_id: RunId, connection: &Connection) -> Accepted {
    Accepted {
        run_id: run_id.into(),
        slot_id: connection.slot_id.clone().into(),
        generation: connection.generation.0,
        node_id: connection.node_id.clone(),
        warm: !connection.on_demand,
        stdin_offset: connection
            .stdin_offset
            .saturating_sub(connection.files_bytes),
        files_offset: connection.stdin_offset.min(connection.files_bytes),
    }
}

impl Relay {
    /// Sends a run's events to the caller until the run ends, and the caller's input to the run.
    /// Also returns when the caller is gone.
    ///
    /// # Errors
    /// [`Error::Invalid`] for input that is not allowed, [`Error::NotRun`] if the command did not
    /// start after all, [`Error::Lost`] if the driver does not come back.
    pub async fn run(mut self, connection: Connection, requests: Inputs) -> Result<(), Error> {
        let accepted = accepted(self.name.run_id, &connection);
        let accepted = run_event::Event::Accepted(accepted);
        let mut carried = Carried {
            claimed: connection.sent,
            timeline: match connection.events {
                Events::Claimed(_) => Timeline::new(self.received, &connection),
                Events::Attached(_) => Timeline::default(),
            },
            input: Input::new(&connection, self.own_input.take()),
            to_caller: Some(accepted),
            to_driver: VecDeque::new(),
            started: false,
            artifacts: false,
            agent: agent::Reader::default(),
            api_errors: 0,
            egress_denied: 0,
            relay: self,
            connection,
            requests: Some(requests),
            closes: None,
        };
        let end = carried.carry().await;
        if !carried.timeline.ended && carried.input.has_own() {
            // The caller is gone, but sent this input with its start message.
            let Carried {
                mut connection,
                input,
                to_driver,
                ..
            } = carried;
            input::feed(&mut connection, input, to_driver).await;
        }
        end
    }
}

struct Carried {
    relay: Relay,
    connection: Connection,
    /// When the granted claim, or the attach, was sent.
    claimed: Instant,
    timeline: Timeline,
    /// `None` when the caller has closed its side.
    requests: Option<Inputs>,
    /// When the end of the caller's input is sent to the driver.
    closes: Option<Instant>,
    input: Input,
    /// Messages on their way to each side. Meanwhile nothing more is read from the other side.
    to_caller: Option<run_event::Event>,
    to_driver: VecDeque<run_input::Input>,
    started: bool,
    artifacts: bool,
    agent: agent::Reader,
    /// How many the caller was told of: the driver repeats them after each attach.
    api_errors: u64,
    /// The same for destinations that are not allowed.
    egress_denied: usize,
}

enum Wake {
    Caller(bool),
    Driver(Result<Option<node::RunEvent>, Status>),
    Request(Option<Result<Option<runtime::RunInput>, Status>>),
    Closes,
    /// The shim's own input is next.
    Own,
    Sent,
}

impl Carried {
    async fn carry(&mut self) -> Result<(), Error> {
        loop {
            match self.wait().await {
                // The caller may come back through another shim.
                Wake::Caller(false) | Wake::Request(Some(Err(_))) => return Ok(()),
                Wake::Caller(true) if self.timeline.ended => return Ok(()),
                Wake::Caller(true) | Wake::Sent => {}
                Wake::Request(None) => {
                    self.requests = None;
                    self.closes = Some(Instant::now() + CLOSE_TIMEOUT);
                }
                Wake::Request(Some(Ok(input))) => {
                    if let Err(invalid) = self.on_request(input) {
                        self.give_up().await;
                        return Err(invalid.into());
                    }
                }
                // The command reads end of file.
                Wake::Closes => {
                    self.closes = None;
                    self.to_driver.extend(self.input.close());
                }
                Wake::Own => {
                    let own = self.input.take_own();
                    self.to_driver.push_back(own);
                }
                Wake::Driver(Ok(Some(event))) => self.on_event(event),
                Wake::Driver(Ok(None)) => self.attach("the driver ended the stream").await?,
                Wake::Driver(Err(status)) => match status.code() {
                    // A definite refusal after all: the driver died before the command started.
                    Code::FailedPrecondition | Code::Aborted => {
                        return Err(Error::NotRun {
                            reason: status.message().to_owned(),
                        });
                    }
                    _ => self.attach(status.message()).await?,
                },
            }
        }
    }

    async fn wait(&mut self) -> Wake {
        let caller = &self.relay.caller;
        let takes_input = self.to_driver.is_empty() && self.input.is_open();
        let request = async {
            match &mut self.requests {
                Some(requests) => requests.next().await,
                None => std::future::pending().await,
            }
        };
        let closes = async {
            match self.closes {
                Some(closes) => sleep_until(closes.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            permit = caller.reserve(), if self.to_caller.is_some() => {
                let event = self.to_caller.take();
                Wake::Caller(permit.map(|permit| permit.send(Ok(RunEvent { event }))).is_ok())
            }
            () = caller.closed() => Wake::Caller(false),
            event = self.connection.events.next(), if self.to_caller.is_none() => {
                Wake::Driver(event)
            }
            permit = self.connection.inputs.reserve(), if !self.to_driver.is_empty() => {
                match permit {
                    Ok(permit) => {
                        let input = self.to_driver.pop_front();
                        permit.send(RunInput { input });
                    }
                    // The driver accepts no more: the run is over, or the stream breaks.
                    Err(_) => self.to_driver.clear(),
                }
                Wake::Sent
            }
            () = std::future::ready(()), if takes_input && self.input.own_is_due() => Wake::Own,
            request = request, if takes_input && !self.input.own_is_due() => Wake::Request(request),
            () = closes => Wake::Closes,
        }
    }

    /// Cancels a run whose files will not arrive: its command cannot start.
    async fn give_up(&mut self) {
        if self.input.lacks_files()
            && let Err(error) = attach::cancel(&self.relay.view, &self.relay.name).await
        {
            tracing::info!(run_id = %self.relay.name.run_id, %error, "cannot cancel a run");
        }
    }

    fn on_request(&mut self, input: Option<runtime::RunInput>) -> Result<(), Invalid> {
        let input = input.and_then(|input| input.input);
        let input = input.ok_or(Invalid::NotStarted)?;
        let input = match input {
            runtime::run_input::Input::Files(data) => self.input.file_bytes(data)?,
            runtime::run_input::Input::Stdin(data) => self.input.stdin(data)?,
            runtime::run_input::Input::CloseStdin(_) => {
                self.to_driver.extend(self.input.close());
                return Ok(());
            }
            runtime::run_input::Input::Resize(size) => {
                let runtime::TerminalSize { rows, columns } = size;
                let size = TerminalSize { rows, columns };
                workspace::check_size("resize", size)?;
                run_input::Input::Resize(size)
            }
            runtime::run_input::Input::Signal(signal) => {
                if !(1..=31).contains(&signal.number) {
                    return Err(Invalid::Value {
                        field: "signal.number",
                        given: signal.number.to_string(),
                        allowed: "a signal number, 1 to 31",
                    });
                }
                run_input::Input::Signal(node::Signal {
                    number: signal.number,
                })
            }
        };
        self.to_driver.push_back(input);
        Ok(())
    }

    fn on_event(&mut self, event: node::RunEvent) {
        let Some(event) = event.event else { return };
        let offsets = &mut self.relay.offsets;
        self.to_caller = match event {
            driver::Event::Attached(_) => None,
            driver::Event::Granted(granted) => {
                self.timeline.driver("granted", granted.granted_after);
                self.timeline
                    .driver("limits_raised", granted.limits_raised_after);
                None
            }
            driver::Event::Started(started) => {
                // The driver repeats it after each attach.
                let first = !std::mem::replace(&mut self.started, true);
                first.then(|| {
                    self.timeline.driver("started", started.after);
                    run_event::Event::Started(encode_started(started.form))
                })
            }
            driver::Event::StdinTaken(taken) => {
                self.input.taken(taken.offset);
                None
            }
            driver::Event::Stdout(output) => {
                let new = new_part(&mut offsets[Stream::Stdout], output);
                new.map(|output| run_event::Event::Stdout(encode_output(output)))
            }
            driver::Event::Stderr(output) => {
                let new = new_part(&mut offsets[Stream::Stderr], output);
                new.map(|output| run_event::Event::Stderr(encode_output(output)))
            }
            driver::Event::Lost(lost) => {
                // A newer driver may have streams that this API does not.
                let stream = Stream::of_number(lost.stream.cast_signed());
                stream.and_then(|stream| {
                    let offset = &mut offsets[stream];
                    let is_new = lost.to > *offset;
                    if is_new && stream == Stream::Events {
                        self.agent.lost();
                    }
                    *offset = lost.to.max(*offset);
                    is_new.then(|| {
                        run_event::Event::Lost(Lost {
                            stream: stream.number(),
                            from: lost.from,
                            to: lost.to,
                        })
                    })
                })
            }
            driver::Event::Artifacts(found) => {
                // The driver repeats it after each attach.
                let first = !std::mem::replace(&mut self.artifacts, true);
                first.then(|| run_event::Event::Artifacts(encode_artifacts(found)))
            }
            driver::Event::ArtifactData(output) => {
                let new = new_part(&mut offsets[Stream::Artifacts], output);
                new.map(|output| run_event::Event::ArtifactData(encode_output(output)))
            }
            driver::Event::AgentEvents(output) => {
                let new = new_part(&mut offsets[Stream::Events], output);
                let told = new.and_then(|output| self.agent.read(&output));
                told.map(run_event::Event::AgentEvents)
            }
            driver::Event::ApiErrors(errors) => {
                let count: u64 = errors.errors.iter().map(|error| error.count).sum();
                let is_new = count > self.api_errors;
                self.api_errors = count.max(self.api_errors);
                is_new.then(|| {
                    run_event::Event::ApiErrors(ApiErrors {
                        errors: encode_errors(errors.errors),
                    })
                })
            }
            driver::Event::EgressDenied(denied) => {
                let count = denied.destinations.len();
                let is_new = count > self.egress_denied;
                self.egress_denied = count.max(self.egress_denied);
                is_new.then(|| {
                    run_event::Event::EgressDenied(EgressDenied {
                        destinations: encode_destinations(denied.destinations),
                    })
                })
            }
            driver::Event::Ended(ended) => {
                self.timeline
                    .driver("first_output", ended.first_output_after);
                self.timeline.driver("exited", ended.after);
                self.timeline.ended = true;
                let stages = std::mem::take(&mut self.timeline.stages);
                let warm = !self.connection.on_demand;
                Some(run_event::Event::Exited(encode_end(ended, stages, warm)))
            }
        };
    }

    /// Attaches to the run again where its stream broke.
    async fn attach(&mut self, reason: &str) -> Result<(), Error> {
        let Relay {
            view,
            name,
            offsets,
            longest,
            caller,
            ..
        } = &self.relay;
        let until = self.claimed + *longest;
        tracing::info!(run_id = %name.run_id, reason, "attaching again");
        let again = attach_again(view, &self.connection.node_id, name, *offsets);
        let attached = tokio::select! {
            attached = timeout_at(until.into(), again) => attached,
            // The next wait notices that the caller is gone.
            () = caller.closed() => return Ok(()),
        };
        let lost = |reason: String| Error::Lost {
            slot_id: self.connection.slot_id.clone(),
            reason,
        };
        match attached {
            Ok(Ok(connection)) => {
                self.to_driver = self.input.resend(connection.stdin_offset);
                self.connection = connection;
                Ok(())
            }
            Ok(Err(Error::NotStarted { reason })) => Err(Error::NotRun { reason }),
            Ok(Err(error)) => Err(lost(crate::chain(&error))),
            Err(_) => Err(lost(reason.to_owned())),
        }
    }
}

/// When each stage was reached. The driver counts from the claim's arrival. The shim takes this as
/// the moment at which it sent the claim, so the times are off by the network delay.
#[derive(Default)]
struct Timeline {
    /// `None` for a caller that came back: the stages were reached before its call.
    claimed: Option<Duration>,
    stages: Vec<Stage>,
    ended: bool,
}

impl Timeline {
    fn new(received: Instant, connection: &Connection) -> Self {
        let claimed = connection.sent - received;
        let dispatched = connection
            .dispatched
            .map(|at| stage("dispatched", at - received));
        let stages = [stage("received", Duration::ZERO)].into_iter();
        let stages = stages
            .chain(dispatched)
            .chain([stage("claimed", claimed)])
            .collect();
        Self {
            claimed: Some(claimed),
            stages,
            ended: false,
        }
    }

    fn driver(&mut self, name: &str, after: Option<prost_types::Duration>) {
        let known = self.stages.iter().any(|stage| stage.name == name);
        let after = after.and_then(|after| Duration::try_from(after).ok());
        if let (Some(claimed), Some(after), false) = (self.claimed, after, known) {
            self.stages.push(stage(name, claimed + after));
        }
    }
}

fn stage(name: &str, at: Duration) -> Stage {
    Stage {
        name: name.to_owned(),
        at: at.try_into().ok(),
    }
}
