//! The loop: waits for the next event and keeps the container's state.
//!
//! `Waiting -> (Receiving ->) Running -> Exited`, or `NotStarted` from a state before
//! `Running`; never backwards.

mod messages;
mod telling;

use std::{
    fs::File,
    io::{self, ErrorKind, Read},
    net::TcpListener,
    os::fd::AsFd,
    path::Path,
    time::{Duration, Instant},
};

use bytes::Bytes;
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{SigSet, Signal},
        signalfd::{SfdFlags, SignalFd},
    },
};
use polydev_agent::FORWARDED;
use polydev_proto::{
    agent::MAX_LINE,
    frame::MAX_DATA,
    init::{Artifacts, Collected, Exited, NotStarted, Start, ToInit, exited, from_init, to_init},
    sealed::PrivateKey,
    stream::{PerStream, Stream},
};
use rustix::process::{WaitOptions, wait};

use crate::{
    account::Account,
    agent::Agent,
    artifacts::Outgoing,
    command::{Command, kill_everything},
    drain::Drain,
    link::Link,
    output::Output,
    shown::say,
    workspace::{self, Incoming},
};

/// How often to check whether a plain task's output has been read.
const READ_TIMEOUT: Duration = Duration::from_millis(5);
/// The largest buffer that a driver may request for one stream.
const MAX_OUTPUT_BUFFER: usize = 8 << 20;
/// Signals that end a run whose command has not started.
const ENDING: [Signal; 5] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGKILL,
    Signal::SIGTERM,
];

enum State {
    Waiting,
    /// The command waits for its files.
    Receiving(Box<Receiving>),
    Running(Box<Command>),
    Exited(Exited),
    NotStarted(NotStarted),
}

struct Receiving {
    start: Start,
    files: Incoming,
    /// Bytes of input received.
    taken: u64,
}

/// What the command left, once it has ended.
struct Left {
    artifacts: Artifacts,
    /// Whether they were announced on this connection.
    is_told: bool,
    /// `None` once all of it is in the outputs.
    outgoing: Option<Outgoing>,
}

/// Owns everything in the container that changes.
pub(crate) struct Supervisor {
    state: State,
    /// Waits for a prompt, while there is no command.
    agent: Option<Agent>,
    /// Whether nothing but an agent whose tools wait for answers may have the run.
    asks: bool,
    /// Opens the secrets of the one run; `None` afterwards.
    key: Option<PrivateKey>,
    public_key: Bytes,
    /// Outlive the command, so that unacknowledged bytes can be sent again.
    outputs: PerStream<Output>,
    /// For a plain task, instead of `outputs`; they may outlive the command too.
    drains: Vec<Drain>,
    left: Option<Left>,
    /// The account file that the command may refresh; outlives it too.
    account: Option<Account>,
    /// Whether the command is a plain task, whose status becomes the container's.
    is_plain: bool,
    /// Whether the driver needs nothing more.
    released: bool,
    /// Whether the command's end was reported on this connection.
    end_is_told: bool,
    link: Link,
    signals: SignalFd,
    oom_score: Option<File>,
}

impl Supervisor {
    pub(crate) fn new(
        socket: &Path,
        requests: Option<TcpListener>,
        oom_score: Option<File>,
    ) -> io::Result<Self> {
        let mut caught: SigSet = FORWARDED.into_iter().collect();
        caught.add(Signal::SIGCHLD);
        caught.thread_block()?;
        let key = PrivateKey::generate();
        Ok(Self {
            public_key: key.public(),
            state: State::Waiting,
            agent: None,
            asks: false,
            key: Some(key),
            outputs: PerStream::default(),
            drains: Vec::new(),
            left: None,
            account: None,
            is_plain: false,
            released: false,
            end_is_told: false,
            link: Link::new(socket, requests, Instant::now()),
            signals: SignalFd::with_flags(&caught, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?,
            oom_score,
        })
    }

    /// Serves until the end; returns the exit status.
    pub(crate) fn run(mut self) -> io::Result<u8> {
        let mut chunk = vec![0; MAX_DATA];
        let mut frames: Vec<ToInit> = Vec::new();
        loop {
            let now = Instant::now();
            if let State::Running(command) = &mut self.state
                && command.status.is_none()
                && let Some(signal) = command
                    .deadline
                    .as_mut()
                    .and_then(|deadline| deadline.due(now))
            {
                command.signal(signal);
            }
            if let (State::Running(_), Some(account)) = (&self.state, &mut self.account) {
                account.look_if_due(now);
            }
            if self.link.connect_if_due(now) {
                self.greet();
            }
            // A dockerd that is killed while it starts a container may forget the
            // container.
            if matches!(self.state, State::Waiting) && self.link.is_forsaken(now) {
                return Ok(self.status());
            }
            self.send_output();
            self.link.flush(now);

            self.wait()?;

            let now = Instant::now();
            while let Some(info) = self.signals.read_signal()? {
                if !self.on_signal(info.ssi_signo) {
                    return Ok(self.status());
                }
            }
            if let Some(agent) = &mut self.agent
                && agent.receive()
            {
                self.link.send(from_init::Message::Agent(agent.told()));
            }
            self.read_output(&mut chunk)?;
            for drain in &mut self.drains {
                drain.advance();
            }
            self.flush_input();
            self.link.receive(now, &mut frames);
            for frame in frames.drain(..) {
                match frame.message {
                    Some(to_init::Message::Release(_)) if !self.is_running() => {
                        self.released = true
                    }
                    Some(message) => self.on_message(message, now),
                    None => {} // From a newer driver, which waits for an answer.
                }
            }
            self.finish(now);
            if self.released && self.drains.iter().all(Drain::is_read) {
                return Ok(self.status());
            }
        }
    }

    /// Blocks until there is something to do: a signal, a pipe, the driver or a deadline.
    fn wait(&self) -> io::Result<()> {
        let now = Instant::now();
        let mut timeout = self.link.retry_in(now);
        let mut wake = |after: Duration| {
            timeout = Some(timeout.map_or(after, |before| before.min(after)));
        };
        let mut polled = vec![PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
        if let Some(stream) = self.link.stream() {
            let mut events = PollFlags::POLLIN;
            events.set(
                PollFlags::POLLOUT,
                self.link.has_output() || self.can_send(),
            );
            polled.push(PollFd::new(stream.as_fd(), events));
        }
        let agent = self.agent.as_ref().and_then(Agent::speaks);
        polled.extend(agent.map(|agent| PollFd::new(agent, PollFlags::POLLIN)));
        if let State::Running(command) = &self.state {
            if let Some(deadline) = command.deadline.filter(|_| command.status.is_none()) {
                wake(deadline.remaining(now));
            }
            if let Some(account) = &self.account {
                wake(account.look_in(now));
            }
            for (pipe, (_, output)) in command.pipes.iter().zip(self.outputs.iter()) {
                if let Some(pipe) = pipe.as_ref().filter(|_| output.room() > 0) {
                    polled.push(PollFd::new(pipe.as_fd(), PollFlags::POLLIN));
                }
            }
            if let Some(events) = &command.events
                && self.outputs[Stream::Events].room() >= MAX_LINE
            {
                polled.push(PollFd::new(events.fd(), PollFlags::POLLIN));
            }
            if let Some(asking) = &command.asking {
                polled.push(PollFd::new(asking.fd(), PollFlags::POLLIN));
            }
            if let Some(pipe) = command.input.pending() {
                polled.push(PollFd::new(pipe.as_fd(), PollFlags::POLLOUT));
            }
        }
        for (descriptor, events) in self.drains.iter().filter_map(Drain::interest) {
            polled.push(PollFd::new(descriptor, events));
        }
        if self.released {
            wake(READ_TIMEOUT); // The kernel does not report when a FIFO is empty.
        }
        // Rounded up, because waking early would only spin until it is time.
        let timeout = timeout.map_or(PollTimeout::NONE, |left| {
            PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
        });
        match poll(&mut polled, timeout) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn read_output(&mut self, chunk: &mut [u8]) -> io::Result<()> {
        self.read_artifacts(chunk);
        let State::Running(command) = &mut self.state else {
            return Ok(());
        };
        if let Some(events) = &mut command.events
            && !events.receive(&mut self.outputs[Stream::Events])
        {
            command.events = None;
        }
        if let Some(asking) = &mut command.asking {
            let pass_on = |call| self.link.send(from_init::Message::ToolCall(call));
            if !asking.receive(pass_on) {
                command.asking = None;
            }
        }
        for (slot, (_, output)) in command.pipes.iter_mut().zip(self.outputs.iter_mut()) {
            let Some(pipe) = slot else { continue };
            let room = output.room().min(chunk.len());
            if room == 0 {
                continue;
            }
            match pipe.read(&mut chunk[..room]) {
                Ok(0) => *slot = None,
                // Nobody uses the terminal any longer.
                Err(error) if error.raw_os_error() == Some(Errno::EIO as i32) => *slot = None,
                Ok(count) => output.push(&chunk[..count]),
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Unreadable bytes are missing, which the length reveals.
    fn read_artifacts(&mut self, chunk: &mut [u8]) {
        let output = &mut self.outputs[Stream::Artifacts];
        let Some(left) = &mut self.left else { return };
        while let Some(outgoing) = &mut left.outgoing {
            let room = output.room().min(chunk.len());
            if room == 0 {
                break;
            }
            match outgoing.read(&mut chunk[..room]) {
                Ok(0) => left.outgoing = None,
                Ok(count) => output.push(&chunk[..count]),
                Err(error) => {
                    say(&format!("cannot read artifacts, the rest is lost: {error}"));
                    left.outgoing = None;
                }
            }
        }
    }

    fn flush_input(&mut self) {
        if let State::Running(command) = &mut self.state
            && command.input.pending().is_some()
        {
            let before = command.input.offset();
            let ack = command.input.flush();
            if ack.offset > before || ack.closed {
                self.link.send(from_init::Message::StdinAck(ack));
            }
        }
    }

    /// Returns false if init should end.
    fn on_signal(&mut self, number: u32) -> bool {
        let signal = i32::try_from(number)
            .ok()
            .and_then(|number| Signal::try_from(number).ok());
        match (signal, &self.state) {
            (Some(Signal::SIGCHLD), _) => self.reap(),
            (Some(signal), State::Running(command)) => command.signal(signal),
            (Some(Signal::SIGTERM | Signal::SIGINT), _) => return false,
            _ => {}
        }
        true
    }

    /// Reaps every process that has ended, including orphans.
    fn reap(&mut self) {
        loop {
            // Not with nix, for which a real-time signal is no end.
            match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => {
                    if let State::Running(command) = &mut self.state
                        && command.pid.as_raw() == pid.as_raw_nonzero().get()
                    {
                        let signal = status.terminating_signal().map(exited::Status::Signal);
                        command.status = status.exit_status().map(exited::Status::Code).or(signal);
                        command.input.abandon();
                        command.shown = None;
                    }
                }
                Ok(None) | Err(rustix::io::Errno::CHILD) => break,
                Err(_) => {}
            }
        }
        if let State::Running(command) = &self.state
            && command.status.is_some()
        {
            kill_everything(command.pid);
        }
    }

    /// `Running -> Exited` once the command has ended and its pipes are drained. Then
    /// collects what it left.
    fn finish(&mut self, now: Instant) {
        let State::Running(command) = &mut self.state else {
            return;
        };
        let (true, Some(status)) = (command.is_drained(), command.status) else {
            return;
        };
        let mut exited = Exited {
            artifact_bytes: 0,
            run_id: command.run_id.clone(),
            status: Some(status),
            deadline_exceeded: command
                .deadline
                .is_some_and(|deadline| deadline.has_passed()),
            stdout_bytes: self.outputs[Stream::Stdout].end(),
            stderr_bytes: self.outputs[Stream::Stderr].end(),
            event_bytes: self.outputs[Stream::Events].end(),
        };
        let artifacts = command.artifacts.take();
        // Nothing can change it any longer.
        if let Some(account) = &mut self.account {
            account.look();
        }
        if let Some(rules) = artifacts {
            // Someone who ends the run now does not wait for the search.
            self.send_account();
            // The driver must not count the search as the command's time.
            self.link.send(from_init::Message::Collected(Collected {
                artifacts: None,
                exited: Some(exited.clone()),
            }));
            self.link.flush(now);
            let (artifacts, outgoing) = Outgoing::collect(workspace::path(), &rules);
            exited.artifact_bytes = artifacts.files.iter().map(|file| file.size).sum();
            self.left = Some(Left {
                artifacts,
                is_told: false,
                outgoing: Some(outgoing),
            });
        }
        self.state = State::Exited(exited);
    }

    /// The exit status, as a shell reports it. If the command never ran, the driver already knows.
    fn status(&self) -> u8 {
        let State::Exited(Exited { status, .. }) = &self.state else {
            return 0;
        };
        if !self.is_plain {
            return 0;
        }
        let status = match status {
            Some(exited::Status::Code(code)) => *code,
            Some(exited::Status::Signal(signal)) => 128 + signal,
            None => 0,
        };
        u8::try_from(status).unwrap_or(u8::MAX)
    }

    fn has_unsent(&self) -> bool {
        let is_left = |left: &Left| !left.is_told || left.outgoing.is_some();
        !self.is_all_sent()
            || self.left.as_ref().is_some_and(is_left)
            || self
                .account
                .as_ref()
                .is_some_and(|account| !account.is_told())
    }

    fn is_all_sent(&self) -> bool {
        self.outputs.iter().all(|(_, output)| output.is_sent())
    }

    /// Whether output waits only for the link, and not for an acknowledgement.
    fn can_send(&self) -> bool {
        self.has_unsent() && (self.outputs[Stream::Artifacts].room() > 0 || !self.is_all_sent())
    }

    fn is_running(&self) -> bool {
        matches!(self.state, State::Running(_))
    }
}
