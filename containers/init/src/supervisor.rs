//! The loop: waits for whatever comes first and keeps the container's one state.
//!
//! `Waiting -> Running -> Exited`, or `Waiting -> NotStarted`; never back.

use std::{
    fs::File,
    io::{self, ErrorKind, Read},
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
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};
use polydev_proto::{
    frame::MAX_DATA,
    init::{
        Data, Exited, Hello, NotStarted, PROTOCOL_VERSION, Running, Started, Stream, ToInit,
        Waiting, exited, from_init, hello, to_init,
    },
    sealed::ContainerKey,
};

use crate::{
    command::{Command, kill_everything},
    drain::Drain,
    link::Link,
    output::Output,
};

/// How often to look whether what a plain task wrote has been read.
const IS_READ: Duration = Duration::from_millis(5);
const STREAMS: [Stream; 2] = [Stream::Stdout, Stream::Stderr];
/// Most that a driver may ask to be buffered for one stream.
const OUTPUT_BUFFER_MOST: usize = 8 << 20;
/// Signals that are passed on to the command.
const FORWARDED: [Signal; 6] = [
    Signal::SIGTERM,
    Signal::SIGINT,
    Signal::SIGHUP,
    Signal::SIGQUIT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
];

enum State {
    /// With the key that opens the secrets of the one run.
    Waiting(ContainerKey),
    Running(Box<Command>),
    Exited(Exited),
    NotStarted(NotStarted),
}

/// Owns everything in the container that has a life.
pub(crate) struct Supervisor {
    state: State,
    public_key: Bytes,
    /// Outlive the command: what is not acknowledged can be asked for again.
    outputs: [Output; 2],
    /// Of a plain task, in place of `outputs`; they may outlive the command too.
    drains: Vec<Drain>,
    /// The command is a plain task, whose status is the container's.
    is_plain: bool,
    /// The driver needs nothing more.
    released: bool,
    /// Whether this connection has been told how the command ended.
    end_is_told: bool,
    link: Link,
    signals: SignalFd,
    oom_score: Option<File>,
}

impl Supervisor {
    pub(crate) fn new(socket: &Path, oom_score: Option<File>) -> io::Result<Self> {
        let mut caught: SigSet = FORWARDED.into_iter().collect();
        caught.add(Signal::SIGCHLD);
        caught.thread_block()?;
        let key = ContainerKey::generate();
        Ok(Self {
            public_key: key.public(),
            state: State::Waiting(key),
            outputs: [Output::default(), Output::default()],
            drains: Vec::new(),
            is_plain: false,
            released: false,
            end_is_told: false,
            link: Link::new(socket, Instant::now()),
            signals: SignalFd::with_flags(&caught, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?,
            oom_score,
        })
    }

    /// Serves to the end; the status to exit with.
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
            if self.link.connect_if_due(now) {
                self.greet();
            }
            // A dockerd that is killed while it starts a container may forget it.
            if matches!(self.state, State::Waiting(_)) && self.link.is_forsaken(now) {
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
                    None => {} // A message of a newer driver: its answer is awaited there.
                }
            }
            self.finish();
            if self.released && self.drains.iter().all(Drain::is_read) {
                return Ok(self.status());
            }
        }
    }

    /// Blocks until something can be done: a signal, a pipe, the driver, a deadline.
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
                self.link.has_output() || self.has_unsent(),
            );
            polled.push(PollFd::new(stream.as_fd(), events));
        }
        if let State::Running(command) = &self.state {
            if let Some(deadline) = command.deadline.filter(|_| command.status.is_none()) {
                wake(deadline.remaining(now));
            }
            for (pipe, output) in command.pipes.iter().zip(&self.outputs) {
                if let Some(pipe) = pipe.as_ref().filter(|_| output.room() > 0) {
                    polled.push(PollFd::new(pipe.as_fd(), PollFlags::POLLIN));
                }
            }
            if let Some(pipe) = command.input.pending() {
                polled.push(PollFd::new(pipe.as_fd(), PollFlags::POLLOUT));
            }
        }
        for (descriptor, events) in self.drains.iter().filter_map(Drain::interest) {
            polled.push(PollFd::new(descriptor, events));
        }
        if self.released {
            wake(IS_READ); // The kernel does not tell when a FIFO has been read empty.
        }
        // Rounded up: waking a little early would only spin until the time has come.
        let timeout = timeout.map_or(PollTimeout::NONE, |left| {
            PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
        });
        match poll(&mut polled, timeout) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// The first message of a connection, and the output it may have missed.
    fn greet(&mut self) {
        for output in &mut self.outputs {
            output.rewind();
        }
        let state = match &self.state {
            State::Waiting(_) => hello::State::Waiting(Waiting {}),
            State::Running(command) => hello::State::Running(Running {
                run_id: command.run_id.clone(),
                stdin_offset: command.input.offset(),
            }),
            State::Exited(exited) => hello::State::Exited(exited.clone()),
            State::NotStarted(not_started) => hello::State::NotStarted(not_started.clone()),
        };
        // An end is told again after the output, which may be sent again too.
        self.end_is_told = false;
        self.link.send(from_init::Message::Hello(Hello {
            protocol_version: PROTOCOL_VERSION,
            state: Some(state),
            public_key: self.public_key.clone(),
        }));
    }

    /// Frames what the link has room for; the end follows the last byte.
    fn send_output(&mut self) {
        for (output, stream) in self.outputs.iter_mut().zip(STREAMS) {
            while self.link.has_room()
                && let Some((offset, data)) = output.take_unsent(MAX_DATA)
            {
                let stream = stream.into();
                self.link.send(from_init::Message::Data(Data {
                    stream,
                    offset,
                    data,
                }));
            }
        }
        if self.end_is_told || !self.link.has_room() || self.has_unsent() {
            return;
        }
        let message = match &self.state {
            State::Waiting(_) | State::Running(_) => return,
            State::Exited(exited) => from_init::Message::Exited(exited.clone()),
            State::NotStarted(refused) => from_init::Message::NotStarted(refused.clone()),
        };
        self.end_is_told = true;
        self.link.send(message);
    }

    fn read_output(&mut self, chunk: &mut [u8]) -> io::Result<()> {
        let State::Running(command) = &mut self.state else {
            return Ok(());
        };
        for (slot, output) in command.pipes.iter_mut().zip(&mut self.outputs) {
            let Some(pipe) = slot else { continue };
            let room = output.room().min(chunk.len());
            if room == 0 {
                continue;
            }
            match pipe.read(&mut chunk[..room]) {
                Ok(0) => *slot = None,
                Ok(count) => output.push(&chunk[..count]),
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
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

    fn on_message(&mut self, message: to_init::Message, now: Instant) {
        match (message, &mut self.state) {
            (to_init::Message::Start(start), State::Waiting(key)) => {
                let capacity = OUTPUT_BUFFER_MOST.min(start.output_buffer_bytes as usize);
                self.outputs = [Output::new(capacity), Output::new(capacity)];
                self.is_plain = start.task.is_some();
                let descriptors = self.link.take_descriptors();
                let oom_score = self.oom_score.as_mut();
                let drains = &mut self.drains;
                match Command::start(&start, key, descriptors, drains, oom_score, now) {
                    Ok(command) => {
                        let pid = command.pid.as_raw().cast_unsigned();
                        self.link.send(from_init::Message::Started(Started { pid }));
                        self.state = State::Running(Box::new(command));
                        self.reap();
                    }
                    Err(refused) => self.state = State::NotStarted(refused),
                }
            }
            // One Start in a life: a second one is a driver's mistake, and it is not run.
            (to_init::Message::Start(_), _) => self.link.disconnect(now),
            (to_init::Message::DataAck(ack), _) => {
                for (output, stream) in self.outputs.iter_mut().zip(STREAMS) {
                    if ack.stream == i32::from(stream) {
                        output.acknowledge(ack.offset);
                    }
                }
            }
            (to_init::Message::Stdin(frame), State::Running(command)) => {
                if command.input.accept(&frame).is_err() {
                    return self.link.disconnect(now);
                }
                let ack = command.input.flush();
                self.link.send(from_init::Message::StdinAck(ack));
            }
            (to_init::Message::Signal(signal), State::Running(command)) => {
                if let Ok(signal) = Signal::try_from(signal.number) {
                    command.signal(signal);
                }
            }
            // Too late for what has ended, or, for Release, too early.
            (
                to_init::Message::Stdin(_)
                | to_init::Message::Signal(_)
                | to_init::Message::Release(_),
                _,
            ) => {}
        }
    }

    /// False if init should end.
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

    /// Collects every process that has ended, orphans too.
    fn reap(&mut self) {
        loop {
            match waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG)) {
                Ok(status @ (WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, _, _))) => {
                    if let State::Running(command) = &mut self.state
                        && command.pid == pid
                    {
                        command.status = Some(status);
                        command.input.abandon();
                    }
                }
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => break,
                Ok(_) | Err(_) => {}
            }
        }
        if let State::Running(command) = &self.state
            && command.status.is_some()
        {
            kill_everything(command.pid);
        }
    }

    /// `Running -> Exited` when the command has ended and its pipes are drained.
    fn finish(&mut self) {
        let State::Running(command) = &self.state else {
            return;
        };
        let (true, Some(status)) = (command.is_drained(), command.status) else {
            return;
        };
        let status = match status {
            WaitStatus::Signaled(_, signal, _) => exited::Status::Signal(signal as i32),
            WaitStatus::Exited(_, code) => exited::Status::Code(code),
            _ => unreachable!("only an end of the process is recorded as its status"),
        };
        self.state = State::Exited(Exited {
            run_id: command.run_id.clone(),
            status: Some(status),
            deadline_exceeded: command
                .deadline
                .is_some_and(|deadline| deadline.has_passed()),
            stdout_bytes: self.outputs[0].end(),
            stderr_bytes: self.outputs[1].end(),
        });
    }

    /// As a shell tells it; what never ran has been told to the driver.
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
        !self.outputs.iter().all(Output::is_sent)
    }

    fn is_running(&self) -> bool {
        matches!(self.state, State::Running(_))
    }
}
