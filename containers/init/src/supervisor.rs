//! The loop: waits for whatever comes first and keeps the container's one state.
//!
//! `Waiting -> (Receiving ->) Running -> Exited`, or `NotStarted` from before it runs; never
//! back.

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
        Artifacts, Collected, Data, Exited, Hello, NotStarted, PROTOCOL_VERSION, Running, Start,
        Started, Stdin, StdinAck, Stream, ToInit, Waiting, exited, from_init, hello,
        not_started::Reason, to_init,
    },
    sealed::ContainerKey,
};

use crate::{
    command::{Command, kill_everything},
    drain::Drain,
    link::Link,
    output::Output,
    workspace::{self, Incoming, Outgoing},
};

/// How often to look whether what a plain task wrote has been read.
const IS_READ: Duration = Duration::from_millis(5);
const STREAMS: [Stream; 3] = [Stream::Stdout, Stream::Stderr, Stream::Artifacts];
/// Which of them the artifacts are.
const ARTIFACTS: usize = 2;
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

/// Signals that end a run whose command has not begun.
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
    /// Bytes of input that have come.
    taken: u64,
}

/// What the command left, once it has ended.
struct Left {
    artifacts: Artifacts,
    /// Whether this connection has been told of them.
    is_told: bool,
    /// `None` when all of it is in the outputs.
    outgoing: Option<Outgoing>,
}

/// Owns everything in the container that has a life.
pub(crate) struct Supervisor {
    state: State,
    /// Opens the secrets of the one run; gone when it has.
    key: Option<ContainerKey>,
    public_key: Bytes,
    /// Outlive the command: what is not acknowledged can be asked for again.
    outputs: [Output; 3],
    /// Of a plain task, in place of `outputs`; they may outlive the command too.
    drains: Vec<Drain>,
    left: Option<Left>,
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
            state: State::Waiting,
            key: Some(key),
            outputs: Default::default(),
            drains: Vec::new(),
            left: None,
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
            self.finish(now);
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
                self.link.has_output() || self.can_send(),
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
            State::Waiting => hello::State::Waiting(Waiting {}),
            State::Receiving(receiving) => {
                hello::State::Receiving(polydev_proto::init::Receiving {
                    run_id: receiving.start.run_id.clone(),
                    stdin_offset: receiving.taken,
                })
            }
            State::Running(command) => hello::State::Running(Running {
                run_id: command.run_id.clone(),
                stdin_offset: command.input.offset(),
            }),
            State::Exited(exited) => hello::State::Exited(exited.clone()),
            State::NotStarted(not_started) => hello::State::NotStarted(not_started.clone()),
        };
        // An end is told again after the output, which may be sent again too.
        self.end_is_told = false;
        if let Some(left) = &mut self.left {
            left.is_told = false;
        }
        self.link.send(from_init::Message::Hello(Hello {
            protocol_version: PROTOCOL_VERSION,
            state: Some(state),
            public_key: self.public_key.clone(),
        }));
    }

    /// Frames what the link has room for; the end follows the last byte.
    fn send_output(&mut self) {
        for (output, stream) in self.outputs.iter_mut().zip(STREAMS) {
            if stream == Stream::Artifacts
                && self.link.has_room()
                && let Some(left) = self.left.as_mut().filter(|left| !left.is_told)
            {
                left.is_told = true;
                self.link.send(from_init::Message::Collected(Collected {
                    artifacts: Some(left.artifacts.clone()),
                    exited: match &self.state {
                        State::Exited(exited) => Some(exited.clone()),
                        _ => None,
                    },
                }));
            }
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
            State::Waiting | State::Receiving(_) | State::Running(_) => return,
            State::Exited(exited) => from_init::Message::Exited(exited.clone()),
            State::NotStarted(refused) => from_init::Message::NotStarted(refused.clone()),
        };
        self.end_is_told = true;
        self.link.send(message);
    }

    fn read_output(&mut self, chunk: &mut [u8]) -> io::Result<()> {
        self.read_artifacts(chunk);
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
                // A terminal whose last user is gone.
                Err(error) if error.raw_os_error() == Some(Errno::EIO as i32) => *slot = None,
                Ok(count) => output.push(&chunk[..count]),
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// What cannot be read is missing, and told as such by its length.
    fn read_artifacts(&mut self, chunk: &mut [u8]) {
        let output = &mut self.outputs[ARTIFACTS];
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
                    eprintln!("polydev-init: artifacts are lost: {error}");
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

    fn on_message(&mut self, message: to_init::Message, now: Instant) {
        match (message, &mut self.state) {
            (to_init::Message::Start(start), State::Waiting) => {
                let capacity = OUTPUT_BUFFER_MOST.min(start.output_buffer_bytes as usize);
                self.outputs = [(); 3].map(|()| Output::new(capacity));
                self.is_plain = start.task.is_some();
                match Incoming::new(workspace::path(), &start.files) {
                    Ok(files) if files.is_complete() => self.start(*start, now),
                    Ok(files) => {
                        self.state = State::Receiving(Box::new(Receiving {
                            start: *start,
                            files,
                            taken: 0,
                        }));
                    }
                    Err(message) => self.refuse(start.run_id, message),
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
            (to_init::Message::Stdin(frame), State::Receiving(_)) => self.receive(&frame, now),
            (to_init::Message::Signal(signal), State::Receiving(receiving)) => {
                let signal = Signal::try_from(signal.number);
                if !signal.is_ok_and(|signal| ENDING.contains(&signal)) {
                    return;
                }
                let run_id = receiving.start.run_id.clone();
                self.refuse(run_id, "it was ended before its files had come".into());
            }
            (to_init::Message::Resize(size), State::Running(command)) => command.resize(size),
            (to_init::Message::Resize(size), State::Receiving(receiving)) => {
                if let Some(terminal) = &mut receiving.start.terminal {
                    *terminal = size;
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
                | to_init::Message::Resize(_)
                | to_init::Message::Release(_),
                _,
            ) => {}
        }
    }

    /// Bytes of the files, and maybe the first ones of stdin.
    fn receive(&mut self, frame: &Stdin, now: Instant) {
        let State::Receiving(receiving) = &mut self.state else {
            return;
        };
        let known = receiving.taken.checked_sub(frame.offset);
        let Some(known) = known.and_then(|known| usize::try_from(known).ok()) else {
            return self.link.disconnect(now); // A gap is a driver's mistake.
        };
        let new = frame.data.get(known..).unwrap_or_default();
        let (taken, problem) = match receiving.files.write(new) {
            Ok(taken) => (taken as u64, None),
            Err(message) => (0, Some(message)),
        };
        receiving.taken += taken;
        let (taken, total) = (receiving.taken, receiving.files.total());
        let is_complete = receiving.files.is_complete();
        let ended = (frame.close && !is_complete)
            .then(|| format!("its files ended after {taken} of {total} bytes"));
        if let Some(message) = problem.or(ended) {
            let run_id = receiving.start.run_id.clone();
            return self.refuse(run_id, message);
        }
        if is_complete {
            let start = std::mem::take(&mut receiving.start);
            self.start(start, now);
        }
        match &mut self.state {
            // The rest of it is the command's.
            State::Running(_) => self.on_message(to_init::Message::Stdin(frame.clone()), now),
            _ => self.link.send(from_init::Message::StdinAck(StdinAck {
                offset: taken,
                closed: false,
            })),
        }
    }

    fn start(&mut self, start: Start, now: Instant) {
        let key = self.key.take().expect("one Start is accepted in a life");
        let descriptors = self.link.take_descriptors();
        let (oom_score, drains) = (self.oom_score.as_mut(), &mut self.drains);
        match Command::start(start, &key, descriptors, drains, oom_score, now) {
            Ok(command) => {
                let pid = command.pid.as_raw().cast_unsigned();
                self.link.send(from_init::Message::Started(Started { pid }));
                self.state = State::Running(Box::new(command));
                self.reap();
            }
            Err(refused) => self.state = State::NotStarted(refused),
        }
    }

    /// The command does not run.
    fn refuse(&mut self, run_id: String, message: String) {
        self.state = State::NotStarted(NotStarted {
            run_id,
            reason: Reason::Invalid.into(),
            message,
        });
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

    /// `Running -> Exited` when the command has ended and its pipes are drained. What it left is
    /// looked for then.
    fn finish(&mut self, now: Instant) {
        let State::Running(command) = &mut self.state else {
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
        let mut exited = Exited {
            artifact_bytes: 0,
            run_id: command.run_id.clone(),
            status: Some(status),
            deadline_exceeded: command
                .deadline
                .is_some_and(|deadline| deadline.has_passed()),
            stdout_bytes: self.outputs[0].end(),
            stderr_bytes: self.outputs[1].end(),
        };
        if let Some(rules) = command.artifacts.take() {
            // The driver should not take the time of the search for the command's.
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
        let is_left = |left: &Left| !left.is_told || left.outgoing.is_some();
        !self.outputs.iter().all(Output::is_sent) || self.left.as_ref().is_some_and(is_left)
    }

    /// Whether it is the link alone that output waits for, and not an acknowledgement.
    fn can_send(&self) -> bool {
        self.has_unsent()
            && (self.outputs[ARTIFACTS].room() > 0 || !self.outputs.iter().all(Output::is_sent))
    }

    fn is_running(&self) -> bool {
        matches!(self.state, State::Running(_))
    }
}
