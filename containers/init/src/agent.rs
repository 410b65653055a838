//! Who waits for the run, in a process of its own: a CLI that waits for a prompt (polydev-agent),
//! or a Python that waits for a script. Until it has one, init hears of it on a socket; then it is
//! the command of the run.

use std::{
    fs::File,
    io::{self, ErrorKind, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{net::UnixStream, process::CommandExt},
    },
    process::{self, Stdio},
    time::{Duration, Instant},
};

use bytes::BytesMut;
use nix::{
    errno::Errno,
    sys::wait::{WaitPidFlag, waitpid},
    unistd::Pid,
};
use polydev_proto::{
    agent::MAX_LINE,
    descriptors, frame,
    init::{
        self, Form, FromAgent, Go, Offer, Park, Prompt, Script, Taken, ToAgent, agent::State,
        from_agent::Message, to_agent,
    },
    provider::{Provider, Vendor},
};

use crate::{
    asking::Asking,
    command::{kill_everything, set_nonblocking, with_no_signal_blocked, with_oom_score},
    interpreter,
    output::Output,
};

/// A process that the kernel does not let go is left to it.
const END_TIMEOUT: Duration = Duration::from_secs(5);
/// How often to look for the ends of processes that were killed.
const END_INTERVAL: Duration = Duration::from_micros(500);
/// An agent checks its CLI in less time than this, and says so.
const TAKE_TIMEOUT: Duration = Duration::from_millis(2500);

/// The agent of a container that has no command yet.
#[derive(Debug)]
pub(crate) struct Agent {
    pub(crate) pid: Pid,
    /// Whether it waits for a script, and not for a prompt.
    pub(crate) is_interpreter: bool,
    /// Whether each call of a tool waits for an answer.
    pub(crate) asks: bool,
    control: UnixStream,
    input: BytesMut,
    /// Read ends of its stdout and stderr.
    pub(crate) pipes: [Option<File>; 2],
    state: State,
    reason: String,
}

impl Agent {
    /// Starts the agent's program. The one of a CLI is in the same file as this one.
    ///
    /// # Errors
    /// Why there is no agent, for people.
    pub(crate) fn start(park: &Park, oom_score: Option<&mut File>) -> Result<Self, String> {
        let provider = Provider::named(&park.provider)
            .ok_or_else(|| format!("it knows no provider `{}`", park.provider))?;
        let start = || {
            let (control, its_end) = UnixStream::pair()?;
            let mut command = match provider {
                Provider::Cli(vendor) => waiting_cli(vendor, park.asks)?,
                Provider::Python => interpreter::waiting(&park.imports),
            };
            command
                .current_dir(&park.work_dir)
                .process_group(0)
                .stdin(OwnedFd::from(its_end))
                .stdout(Stdio::piped())
                .stderr(Stdio::piped());
            let child = with_oom_score(oom_score, || with_no_signal_blocked(|| command.spawn()))?;
            Ok((child, control))
        };
        let started: io::Result<_> = start();
        let (child, control) = started.map_err(|error| format!("cannot start it: {error}"))?;
        set_nonblocking(&control);
        let pid = Pid::from_raw(child.id().cast_signed());
        let pipes = [
            child.stdout.map(|pipe| File::from(OwnedFd::from(pipe))),
            child.stderr.map(|pipe| File::from(OwnedFd::from(pipe))),
        ];
        pipes.iter().flatten().for_each(set_nonblocking);
        Ok(Self {
            pid,
            is_interpreter: provider == Provider::Python,
            asks: park.asks,
            control,
            input: BytesMut::new(),
            pipes,
            state: State::Starting,
            reason: String::new(),
        })
    }

    /// What the driver is told of an agent that could not be started.
    pub(crate) fn none(reason: String) -> init::Agent {
        init::Agent {
            state: State::Gone.into(),
            reason,
        }
    }

    /// What the driver is told.
    pub(crate) fn told(&self) -> init::Agent {
        init::Agent {
            state: self.state.into(),
            reason: self.reason.clone(),
        }
    }

    /// Where it says something, unless it has said its last.
    pub(crate) fn speaks(&self) -> Option<BorrowedFd<'_>> {
        (self.state != State::Gone).then(|| self.control.as_fd())
    }

    /// Reads what it has said. Returns whether its state is another one.
    pub(crate) fn receive(&mut self) -> bool {
        let before = self.state;
        while self.state != State::Gone {
            match self.next_message() {
                Ok(Some(Message::Ready(_))) => self.state = State::Ready,
                Ok(Some(Message::Failed(failed))) => self.is_gone(failed.reason),
                Ok(Some(Message::Taken(_) | Message::Event(_))) => {
                    self.is_gone("it has taken what nobody gave".into());
                }
                Ok(None) => break,
                Err(reason) => self.is_gone(reason),
            }
        }
        self.state != before
    }

    /// Gives it the prompt, and waits until it has taken it. A short wait, in which nothing else
    /// happens. Returns whether its CLI had waited, and has not been started again; and where its
    /// calls of tools come from, if they wait for answers.
    ///
    /// # Errors
    /// Why it has not taken it, for people.
    pub(crate) fn give(
        &mut self,
        prompt: &Prompt,
        has_files: bool,
        reaches: bool,
    ) -> Result<(Form, Option<Asking>), String> {
        let offer = to_agent::Message::Offer(Offer {
            prompt: Some(prompt.clone()),
            has_files,
        });
        let asking = self
            .asks
            .then(|| Asking::new(has_files && !prompt.trusts_files, reaches));
        let asking = asking.transpose().map_err(|error| error.to_string())?;
        let (asking, its_end) = asking.unzip();
        Ok((self.offer(offer, its_end)?, asking))
    }

    /// As [`Self::give`], for a script and the end of a pipe or a file that is its stdin.
    pub(crate) fn give_script(&mut self, script: Script, stdin: OwnedFd) -> Result<Form, String> {
        self.offer(to_agent::Message::Script(script), Some(stdin))
    }

    fn offer(
        &mut self,
        offer: to_agent::Message,
        descriptor: Option<OwnedFd>,
    ) -> Result<Form, String> {
        match self.state {
            State::Ready => {}
            State::Gone => return Err(self.reason.clone()),
            State::Starting | State::Unspecified => return Err("it is not ready yet".into()),
        }
        let patient = || {
            self.control.set_nonblocking(false)?;
            self.control.set_read_timeout(Some(TAKE_TIMEOUT))?;
            self.control.set_write_timeout(Some(TAKE_TIMEOUT))
        };
        let patient: io::Result<()> = patient();
        patient.map_err(|error| error.to_string())?;
        self.send(offer, descriptor.as_ref().map(AsFd::as_fd))?;
        match self.next_message()? {
            // Until it has heard this, the CLI does not have the prompt.
            Some(Message::Taken(Taken {
                cold_reason: reason,
            })) => {
                self.send(to_agent::Message::Go(Go {}), None)?;
                let parked = reason.is_empty();
                Ok(Form { parked, reason })
            }
            Some(Message::Failed(failed)) => Err(failed.reason),
            Some(Message::Ready(_) | Message::Event(_)) | None => Err("it does not answer".into()),
        }
    }

    fn send(
        &mut self,
        message: to_agent::Message,
        descriptor: Option<BorrowedFd>,
    ) -> Result<(), String> {
        let mut frame = BytesMut::new();
        let message = ToAgent {
            message: Some(message),
        };
        frame::encode(&message, &mut frame).map_err(|error| error.to_string())?;
        // Without a descriptor it is as any write; with one, it belongs to the first byte.
        let first = descriptors::send(&self.control, &frame[..1], descriptor.as_slice());
        let sent = first.and_then(|count| self.control.write_all(&frame[count..]));
        sent.map_err(|error| format!("it takes nothing: {error}"))
    }

    /// What remains of it once it has taken a prompt: where the rest of its input goes, and
    /// where what it does comes from.
    pub(crate) fn into_run(self) -> (Option<File>, Events) {
        set_nonblocking(&self.control);
        let input = self.control.try_clone().ok();
        let events = Events {
            socket: self.control,
            input: self.input,
        };
        (input.map(|input| OwnedFd::from(input).into()), events)
    }

    /// Ends it and everything that it has started, and waits until their memory is free.
    pub(crate) fn end(self) {
        kill_everything(self.pid);
        let give_up = Instant::now() + END_TIMEOUT;
        while waitpid(None, Some(WaitPidFlag::WNOHANG)) != Err(Errno::ECHILD)
            && Instant::now() < give_up
        {
            std::thread::sleep(END_INTERVAL);
        }
    }

    /// Its next message; `None` if it has said nothing more yet.
    fn next_message(&mut self) -> Result<Option<Message>, String> {
        next_message(&mut self.control, &mut self.input)
    }

    fn is_gone(&mut self, reason: String) {
        self.state = State::Gone;
        self.reason = reason;
    }
}

/// The program that drives a vendor's CLI.
fn waiting_cli(vendor: Vendor, asks: bool) -> io::Result<process::Command> {
    let mut command = process::Command::new(std::env::current_exe()?);
    command.args(["agent", vendor.name()]);
    if asks {
        command.arg("asks");
    }
    Ok(command)
}

/// What an agent with a prompt does. Init does not read it, and passes it on like output.
#[derive(Debug)]
pub(crate) struct Events {
    socket: UnixStream,
    input: BytesMut,
}

impl Events {
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Passes on what is there and what there is room for. Returns whether more may come.
    pub(crate) fn receive(&mut self, output: &mut Output) -> bool {
        while output.room() >= MAX_LINE {
            match next_message(&mut self.socket, &mut self.input) {
                Ok(Some(Message::Event(line))) if line.len() <= MAX_LINE => output.push(&line),
                Ok(Some(_)) => {}
                Ok(None) => return true,
                // It has ended. Its exit status says the rest.
                Err(_) => return false,
            }
        }
        true
    }
}

/// The next message from an agent; `None` if it has said nothing more yet.
fn next_message(socket: &mut UnixStream, input: &mut BytesMut) -> Result<Option<Message>, String> {
    loop {
        match next_frame::<FromAgent>(socket, input)? {
            Some(FromAgent {
                message: Some(message),
            }) => return Ok(Some(message)),
            Some(FromAgent { message: None }) => {}
            None => return Ok(None),
        }
    }
}

/// The next frame of a socket; `None` if there is no more yet.
pub(crate) fn next_frame<M: prost::Message + Default>(
    socket: &mut impl Read,
    input: &mut BytesMut,
) -> Result<Option<M>, String> {
    loop {
        if let Some(frame) = frame::decode(input).map_err(|error| error.to_string())? {
            return Ok(Some(frame));
        }
        let mut chunk = [0; 4096];
        match socket.read(&mut chunk) {
            Ok(0) => return Err("it has ended".into()),
            Ok(count) => input.extend_from_slice(&chunk[..count]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error.to_string()),
        }
    }
}
