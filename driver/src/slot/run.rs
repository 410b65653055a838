//! One run: from a granted claim to the end of its command.
//!
//! Neither Docker nor Nomad is asked for anything here.

use std::time::{Duration, Instant};

use polydev_proto::{
    init::{
        Data, DataAck, Exited, NotStarted, Signal, Stdin, exited, from_init, not_started, to_init,
    },
    node::ended::Reason,
};
use tokio::{sync::mpsc, time::sleep_until};
use tokio_util::sync::CancellationToken;

use super::{
    claim::{Claim, Ended, Event, Input, Refusal},
    fill::Container,
};
use crate::{limits::Limits, link};

/// Bytes of stdin on their way to the command; init holds at most twice as much.
const STDIN_WINDOW: u64 = 128 << 10;
/// What init gets on top of the deadline before the driver ends the container itself.
const GRACE: Duration = Duration::from_secs(1);

/// How long the end of a run waits for a caller that does not read.
const DELIVER: Duration = Duration::from_secs(10 * 60);

const SIGTERM: i32 = 15;
const SIGKILL: i32 = 9;

/// Serves one claim to its end. The container is of no further use afterwards.
/// Cancelling `kill` ends it at once.
pub(super) async fn serve(
    container: &mut Container,
    claim: Claim,
    limits: &Limits,
    kill: &CancellationToken,
) {
    let Claim {
        arrived,
        start_by,
        start,
        timeout,
        kill_timeout,
        events,
        inputs,
        ..
    } = claim;
    let granted_after = arrived.elapsed();
    let refusal = if Instant::now() >= start_by {
        Some(Refusal::TooLate)
    } else if let Err(error) = container.limits.set(limits) {
        tracing::error!(
            error = &error as &dyn std::error::Error,
            "cannot raise limits"
        );
        Some(Refusal::Broken {
            reason: error.to_string(),
        })
    } else {
        None
    };
    if let Some(refusal) = refusal {
        let _gone = events.send(Err(refusal)).await;
        return;
    }
    let granted = Event::Granted {
        granted_after,
        limits_raised_after: arrived.elapsed(),
    };
    if events.send(Ok(granted)).await.is_err() {
        return; // Nobody waits for it any more, and nothing has been started.
    }

    let mut run = Run {
        container,
        arrived,
        caller: Caller::Present(events),
        inputs: Some(inputs),
        kill_timeout,
        stdin: StdinWindow::default(),
        received: [0; 2],
        first_output_after: None,
        end_at: Instant::now() + timeout + kill_timeout + GRACE,
        cancelled: Cancelled::No,
    };
    let ended = match run
        .container
        .link
        .writer
        .send(to_init::Message::Start(start))
        .await
    {
        Ok(()) => run.carry(kill).await,
        Err(error) => run.lost(&error),
    };
    if let Caller::Present(events) = run.caller {
        // A caller that does not read must not hold the slot: its container goes now.
        tokio::spawn(async move {
            let _gone = tokio::time::timeout(DELIVER, events.send(Ok(Event::Ended(ended)))).await;
        });
    }
}

struct Run<'a> {
    container: &'a mut Container,
    arrived: Instant,
    caller: Caller,
    /// `None` when the caller has said all it will.
    inputs: Option<mpsc::Receiver<Input>>,
    kill_timeout: Duration,
    stdin: StdinWindow,
    /// Bytes of stdout and stderr so far.
    received: [u64; 2],
    first_output_after: Option<Duration>,
    /// When the driver stops waiting for init.
    end_at: Instant,
    cancelled: Cancelled,
}

enum Caller {
    Present(mpsc::Sender<Result<Event, Refusal>>),
    Gone,
}

#[derive(Clone, Copy, PartialEq)]
enum Cancelled {
    No,
    /// SIGTERM is sent, SIGKILL follows.
    Asked {
        kill_at: Instant,
    },
    Killed,
}

#[derive(Default)]
struct StdinWindow {
    sent: u64,
    taken: u64,
    closed: bool,
}

enum Wake {
    FromInit(Result<from_init::Message, link::Error>),
    Input(Option<Input>),
    CallerGone,
    Kill,
    Time,
}

impl Run<'_> {
    /// Carries streams both ways until the command has ended.
    async fn carry(&mut self, kill: &CancellationToken) -> Ended {
        loop {
            let (wake, permit) = self.wait(kill).await;
            let sent = match wake {
                Wake::FromInit(Ok(from_init::Message::Data(data))) => {
                    let ack = self.output(data, permit);
                    self.container
                        .link
                        .writer
                        .send(to_init::Message::DataAck(ack))
                        .await
                }
                Wake::FromInit(Ok(from_init::Message::Started(_))) => {
                    if let Some(permit) = permit {
                        permit.send(Ok(Event::Started {
                            after: self.arrived.elapsed(),
                        }));
                    }
                    Ok(())
                }
                Wake::FromInit(Ok(from_init::Message::StdinAck(ack))) => {
                    self.stdin.taken = ack.offset;
                    self.stdin.closed |= ack.closed;
                    Ok(())
                }
                Wake::FromInit(Ok(from_init::Message::Exited(exited))) => {
                    return self.exited(&exited);
                }
                Wake::FromInit(Ok(from_init::Message::NotStarted(refused))) => {
                    return self.not_started(refused);
                }
                Wake::FromInit(Ok(from_init::Message::Hello(_))) => Ok(()),
                Wake::FromInit(Err(error)) => return self.lost(&error),
                Wake::Input(input) => {
                    drop(permit);
                    self.input(input).await
                }
                Wake::CallerGone => {
                    self.caller = Caller::Gone;
                    self.inputs = None;
                    let kill_at = Instant::now() + self.kill_timeout;
                    self.cancelled = Cancelled::Asked { kill_at };
                    self.signal(SIGTERM).await
                }
                Wake::Kill => return self.ended(Reason::Cancelled, "the slot was destroyed"),
                Wake::Time => match self.cancelled {
                    Cancelled::Asked { kill_at } if kill_at <= Instant::now() => {
                        self.cancelled = Cancelled::Killed;
                        self.end_at = self.end_at.min(Instant::now() + GRACE);
                        self.signal(SIGKILL).await
                    }
                    Cancelled::No => {
                        return self.ended(Reason::Deadline, "its deadline passed; output that its caller had not read by then is lost");
                    }
                    Cancelled::Asked { .. } | Cancelled::Killed => {
                        return self.ended(Reason::Cancelled, "its caller went away");
                    }
                },
            };
            if let Err(error) = sent {
                return self.lost(&error);
            }
        }
    }

    /// Waits for whatever comes first. Init is read only when there is room for what
    /// it says: a caller that reads slowly slows the command.
    async fn wait(&mut self, kill: &CancellationToken) -> (Wake, Option<Permit>) {
        let wake_at = match self.cancelled {
            Cancelled::Asked { kill_at } => kill_at.min(self.end_at),
            Cancelled::No | Cancelled::Killed => self.end_at,
        };
        let window_open = self.stdin.sent - self.stdin.taken < STDIN_WINDOW;
        let reader = &mut self.container.link.reader;
        let caller = match &self.caller {
            Caller::Present(events) => Some(events),
            Caller::Gone => None,
        };
        let from_init = async {
            let permit = match caller {
                // Closing is told by its own arm.
                Some(events) => match events.clone().reserve_owned().await {
                    Ok(permit) => Some(permit),
                    Err(_) => std::future::pending().await,
                },
                None => None,
            };
            (reader.next().await, permit)
        };
        let input = async {
            match &mut self.inputs {
                Some(inputs) => inputs.recv().await,
                None => std::future::pending().await,
            }
        };
        let gone = async {
            match caller {
                Some(events) => events.closed().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = kill.cancelled() => (Wake::Kill, None),
            () = gone => (Wake::CallerGone, None),
            (message, permit) = from_init => (Wake::FromInit(message), permit),
            input = input, if window_open => (Wake::Input(input), None),
            () = sleep_until(wake_at.into()) => (Wake::Time, None),
        }
    }

    fn output(&mut self, data: Data, permit: Option<Permit>) -> DataAck {
        let Data {
            stream,
            offset,
            data: bytes,
        } = data;
        self.first_output_after
            .get_or_insert_with(|| self.arrived.elapsed());
        let end = offset + bytes.len() as u64;
        let kind = polydev_proto::init::Stream::try_from(stream).unwrap_or_default();
        self.received[usize::from(kind == polydev_proto::init::Stream::Stderr)] = end;
        if let Some(permit) = permit {
            permit.send(Ok(Event::Output {
                stream: kind,
                offset,
                data: bytes,
            }));
        }
        DataAck {
            stream,
            offset: end,
        }
    }

    async fn input(&mut self, input: Option<Input>) -> Result<(), link::Error> {
        let (data, close) = match input {
            Some(Input::Signal(number)) => return self.signal(number).await,
            Some(Input::Stdin(data)) => (data, false),
            Some(Input::CloseStdin) => (bytes::Bytes::new(), true),
            None => {
                self.inputs = None;
                (bytes::Bytes::new(), true)
            }
        };
        if self.stdin.closed {
            return Ok(());
        }
        self.stdin.closed = close;
        let offset = self.stdin.sent;
        self.stdin.sent += data.len() as u64;
        let stdin = Stdin {
            offset,
            data,
            close,
        };
        self.container
            .link
            .writer
            .send(to_init::Message::Stdin(stdin))
            .await
    }

    async fn signal(&mut self, number: i32) -> Result<(), link::Error> {
        self.container
            .link
            .writer
            .send(to_init::Message::Signal(Signal { number }))
            .await
    }

    fn exited(&self, exited: &Exited) -> Ended {
        let (exit_code, signal) = match exited.status {
            Some(exited::Status::Code(code)) => (code, 0),
            Some(exited::Status::Signal(signal)) => (128 + signal, signal),
            None => return self.ended(Reason::Lost, "init did not say how the command ended"),
        };
        let killed = exit_code == 128 + SIGKILL;
        let (reason, message) = if self.cancelled != Cancelled::No {
            (Reason::Cancelled, "its caller went away".into())
        } else if killed && self.container.limits.oom_kills() > 0 {
            (
                Reason::OutOfMemory,
                "the kernel killed it: it needed more memory than it may have".into(),
            )
        } else if exited.deadline_exceeded {
            (Reason::Deadline, "its deadline passed".into())
        } else if signal != 0 {
            (Reason::Signaled, format!("signal {signal} ended it"))
        } else {
            (Reason::Exited, String::new())
        };
        let [stdout_bytes, stderr_bytes] = [exited.stdout_bytes, exited.stderr_bytes];
        Ended {
            exit_code,
            signal,
            stdout_bytes,
            stderr_bytes,
            ..self.ended(reason, &message)
        }
    }

    fn not_started(&self, refused: NotStarted) -> Ended {
        let exit_code = match refused.reason() {
            not_started::Reason::NotFound => 127,
            not_started::Reason::NotExecutable
            | not_started::Reason::Invalid
            | not_started::Reason::Unspecified => 126,
        };
        Ended {
            exit_code,
            ..self.ended(Reason::NotStarted, &refused.message)
        }
    }

    fn lost(&self, error: &link::Error) -> Ended {
        tracing::warn!(
            error = error as &dyn std::error::Error,
            "a run's container was lost"
        );
        if self.container.limits.oom_kills() > 0 {
            return self.ended(Reason::OutOfMemory, "the container ran out of memory");
        }
        self.ended(Reason::Lost, "its container ended")
    }

    fn ended(&self, reason: Reason, message: &str) -> Ended {
        let [stdout_bytes, stderr_bytes] = self.received;
        Ended {
            reason,
            // Docker's status for what it killed.
            exit_code: 128 + SIGKILL,
            signal: 0,
            message: message.to_owned(),
            after: self.arrived.elapsed(),
            first_output_after: self.first_output_after,
            stdout_bytes,
            stderr_bytes,
        }
    }
}

type Permit = mpsc::OwnedPermit<Result<Event, Refusal>>;
