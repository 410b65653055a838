//! The one command of a container: its start, its signals and its results.

use std::{
    ffi::OsStr,
    fs::File,
    io::{self, Read, Seek, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{ffi::OsStrExt, process::CommandExt},
    },
    path::Path,
    process::{self, Stdio},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::{
        prctl,
        signal::{SigSet, Signal, kill, killpg},
    },
    unistd::{Pid, getpid},
};
use polydev_proto::{
    init::{
        ArtifactRules, Form, NotStarted, PlainTask, Secrets, Start, TerminalSize, exited,
        not_started::Reason, plain_task::Output as OutputKind,
    },
    sealed::PrivateKey,
};

use crate::{
    account::Account,
    agent::{Agent, Events},
    asking::Asking,
    deadline::Deadline,
    drain::Drain,
    home,
    shown::{self, Pipes, Shown},
    stdin::Input,
    terminal,
};

/// Added to the command's OOM score, so that the kernel kills it rather than init.
const OOM_SCORE: &[u8] = b"500";

/// Real-time signals that programs may use: `signal(7)`.
const REAL_TIME: std::ops::RangeInclusive<i32> = 34..=64;

/// A started command.
#[derive(Debug)]
pub(crate) struct Command {
    pub(crate) run_id: String,
    pub(crate) pid: Pid,
    /// Read ends of a run's output pipes, or its terminal; `None` after end of file.
    pub(crate) pipes: [Option<File>; 2],
    /// What an agent does; `None` for an argv, and after its end.
    pub(crate) events: Option<Events>,
    /// The calls of tools that wait for an answer; `None` if none does, and after the agent's end.
    pub(crate) asking: Option<Asking>,
    pub(crate) input: Input,
    /// Which of its files to collect when it has ended.
    pub(crate) artifacts: Option<ArtifactRules>,
    /// The account file that it may refresh.
    pub(crate) account: Option<Account>,
    /// `None` for a plain task.
    pub(crate) deadline: Option<Deadline>,
    /// Whether the first pipe is a terminal.
    has_terminal: bool,
    /// Whether signals go to the command alone, rather than to its process group.
    alone: bool,
    /// A plain task's streams as this process's, until its command has ended.
    pub(crate) shown: Option<Shown>,
    /// Set once the command's own process has ended.
    pub(crate) status: Option<exited::Status>,
    /// For a prompt.
    pub(crate) form: Option<Form>,
}

impl Command {
    /// Starts the command, as the user that init runs as. The command gets only the three
    /// standard descriptors, because all of init's own are close-on-exec. The output of a
    /// plain task goes through `drains`, which outlive the command, into the `descriptors`
    /// that came with the request. `key` opens its secrets.
    ///
    /// # Errors
    /// Why the command did not run, for the caller.
    pub(crate) fn start(
        start: Start,
        key: &PrivateKey,
        descriptors: Vec<OwnedFd>,
        drains: &mut Vec<Drain>,
        oom_score: Option<&mut File>,
        now: Instant,
    ) -> Result<Self, NotStarted> {
        let refuse = |reason: Reason, message: String| NotStarted {
            run_id: start.run_id.clone(),
            reason: reason.into(),
            message,
        };
        let Some((program, args)) = start.argv.split_first() else {
            return Err(refuse(Reason::Invalid, "argv is empty".into()));
        };
        if !start.work_dir.is_empty() && !Path::new(&start.work_dir).is_dir() {
            let message = format!("the working directory `{}` is not a folder", start.work_dir);
            return Err(refuse(Reason::Invalid, message));
        }
        let secrets = open(&start, key).map_err(|message| refuse(Reason::Invalid, message))?;
        let home = home::path();
        home::write_files(home.as_deref(), &secrets.files)
            .map_err(|message| refuse(Reason::Invalid, message))?;
        let account = Account::new(home.as_deref(), &secrets, now);

        let mut command = process::Command::new(OsStr::from_bytes(program));
        command.args(args.iter().map(|arg| OsStr::from_bytes(arg)));
        let task = start.task.as_ref();
        let master = attach_streams(&mut command, &start, task)
            .map_err(|error| format!("cannot create a terminal: {error}"))
            .map_err(|message| refuse(Reason::Invalid, message))?;
        surround(&mut command, &start, &secrets);
        let streams = streams(&mut command, task);
        let streams = streams.map_err(|error| format!("cannot make its streams: {error}"));
        let Streams {
            read,
            copies,
            shown,
        } = streams.map_err(|message| refuse(Reason::Invalid, message))?;

        // The job sets a plain task's score.
        let oom_score = oom_score.filter(|_| start.task.is_none());
        let mut child = with_oom_score(oom_score, || with_no_signal_blocked(|| command.spawn()))
            .map_err(|error| {
                let program = String::from_utf8_lossy(program);
                let reason = match error.raw_os_error().map(Errno::from_raw) {
                    Some(Errno::ENOENT | Errno::ENOTDIR) => Reason::NotFound,
                    Some(Errno::E2BIG) | None => Reason::Invalid,
                    Some(_) => Reason::NotExecutable,
                };
                refuse(reason, format!("cannot start `{program}`: {error}"))
            })?;

        let of_child = || {
            let stdout = child.stdout.take().map(OwnedFd::from);
            [stdout, child.stderr.take().map(OwnedFd::from)]
        };
        let pipes = read.map_or_else(of_child, |read| read.map(Some));
        let pipes = pipes.map(|pipe| pipe.map(File::from));
        let stdin = child.stdin.take();
        let mut stdin = stdin.map(|pipe| File::from(OwnedFd::from(pipe)));
        for pipe in pipes.iter().chain([&stdin, &master]).flatten() {
            set_nonblocking(pipe);
        }
        let has_terminal = task.is_none() && master.is_some();
        let pipes = match (task, master) {
            (Some(task), master) => {
                let tty = master.is_some();
                let sources = [master].into_iter().chain(pipes).flatten();
                let copies = copies.into_iter().map(Some);
                let copies = copies.chain(std::iter::repeat_with(|| None));
                let targets = targets(task, descriptors).into_iter().zip(copies);
                drains.extend(
                    sources
                        .zip(targets)
                        .map(|(from, (to, copy))| Drain::new(from, to, copy, tty)),
                );
                [None, None]
            }
            (None, Some(master)) => {
                stdin = master.try_clone().ok();
                [Some(master), None]
            }
            (None, None) => pipes,
        };
        let deadline = deadline(&start, now);
        let mut input = Input::new(stdin, has_terminal, files_bytes(&start));
        if has_terminal && !start.stdin {
            input.close();
        }
        Ok(Self {
            artifacts: start.artifacts,
            account,
            run_id: start.run_id,
            pid: Pid::from_raw(child.id().cast_signed()),
            pipes,
            events: None,
            asking: None,
            input,
            deadline,
            has_terminal,
            alone: task.is_some(),
            shown,
            status: None,
            form: None,
        })
    }

    /// The command of a run whose prompt an agent has taken.
    pub(crate) fn parked(
        agent: Agent,
        (form, asking): (Form, Option<Asking>),
        start: Start,
        now: Instant,
    ) -> Self {
        let deadline = deadline(&start, now);
        let (pid, mut agent) = (agent.pid, agent);
        let pipes = std::mem::take(&mut agent.pipes);
        let (input, events) = agent.into_run();
        let mut input = Input::new(input, false, files_bytes(&start));
        if !start.stdin {
            input.close();
        }
        Self {
            run_id: start.run_id,
            pid,
            pipes,
            events: Some(events),
            asking,
            input,
            artifacts: start.artifacts,
            account: None,
            deadline,
            has_terminal: false,
            alone: false,
            shown: None,
            status: None,
            form: Some(form),
        }
    }

    /// The command of a run whose script an interpreter has taken. `stdin` is where the script's
    /// input goes.
    pub(crate) fn script(
        agent: Agent,
        stdin: Option<File>,
        form: Form,
        start: Start,
        now: Instant,
    ) -> Self {
        stdin.iter().for_each(set_nonblocking);
        Self {
            input: Input::new(stdin, false, files_bytes(&start)),
            events: None,
            ..Self::parked(agent, (form, None), start, now)
        }
    }

    /// Sends `signal` to the command, and for a run to its process group; does nothing if
    /// the command has ended.
    pub(crate) fn signal(&self, signal: Signal) {
        if self.status.is_some() {
            return;
        }
        if signal == Signal::SIGKILL {
            kill_everything(self.pid);
        } else if self.alone || killpg(self.pid, signal).is_err() {
            let _gone = kill(self.pid, signal);
        }
    }

    /// The same by the number, for every signal that Linux has.
    pub(crate) fn signal_number(&self, number: i32) {
        if let Ok(signal) = Signal::try_from(number) {
            return self.signal(signal);
        }
        if self.status.is_some() || !REAL_TIME.contains(&number) {
            return;
        }
        // SAFETY: it is not for this process, whose libc keeps some numbers for itself.
        #[expect(unsafe_code, reason = "real-time signals have no names")]
        let signal = unsafe { rustix::process::Signal::from_raw_unchecked(number) };
        let pid = rustix::process::Pid::from_raw(self.pid.as_raw());
        let pid = pid.expect("a child's number is not 0");
        let is_sent = match self.alone {
            true => false,
            false => rustix::process::kill_process_group(pid, signal).is_ok(),
        };
        if !is_sent {
            let _gone = rustix::process::kill_process(pid, signal);
        }
    }

    /// Sets the size of its terminal; does nothing without a terminal or after its end.
    pub(crate) fn resize(&self, size: TerminalSize) {
        if let [Some(terminal), _] = &self.pipes
            && self.has_terminal
        {
            let _gone = terminal::resize(terminal, size);
        }
    }

    /// Whether the output is complete.
    pub(crate) fn is_drained(&self) -> bool {
        self.pipes.iter().all(Option::is_none) && self.events.is_none()
    }
}

/// When the command must end; `None` for one that may go on.
fn deadline(start: &Start, now: Instant) -> Option<Deadline> {
    let [timeout, kill_timeout] =
        [start.timeout_ms, start.kill_timeout_ms].map(Duration::from_millis);
    (start.timeout_ms > 0).then(|| Deadline::new(now, timeout, kill_timeout))
}

/// How much of the input is not for the command.
fn files_bytes(start: &Start) -> u64 {
    start.files.iter().map(|file| file.size).sum()
}

/// The run's secrets; empty if none were sent.
fn open(start: &Start, key: &PrivateKey) -> Result<Secrets, String> {
    if start.sealed_secrets.is_empty() {
        return Ok(Secrets::default());
    }
    let opened = key.open(&start.sealed_secrets, &start.run_id);
    opened.map_err(|error| error.to_string())
}

/// Sets the command's environment and working directory.
fn surround(command: &mut process::Command, start: &Start, secrets: &Secrets) {
    if start.terminal.is_some() {
        command.env("TERM", "xterm"); // Like Docker.
    }
    for variable in start.env.iter().chain(&secrets.env) {
        let (name, value) = (&variable.name, &variable.value);
        command.env(OsStr::from_bytes(name), OsStr::from_bytes(value));
    }
    let trace = start.trace.as_ref();
    if let Some(trace) = trace.filter(|trace| !trace.traceparent.is_empty()) {
        command.env("TRACEPARENT", &trace.traceparent);
        command.env("TRACESTATE", &trace.tracestate);
    }
    if !start.work_dir.is_empty() {
        command.current_dir(&start.work_dir);
    }
}

/// Connects the command's three standard descriptors. Returns the terminal's other end, if
/// the command has one.
fn attach_streams(
    command: &mut process::Command,
    start: &Start,
    task: Option<&PlainTask>,
) -> io::Result<Option<File>> {
    if task.is_some_and(|task| task.tty) || start.terminal.is_some() {
        return terminal::attach(command, start.terminal).map(Some);
    }
    command.process_group(0);
    command.stdin(if start.stdin {
        Stdio::piped()
    } else {
        Stdio::null()
    });
    let inherited = task.is_some_and(|task| task.output() == OutputKind::Inherited);
    let output = || {
        if inherited {
            Stdio::inherit()
        } else {
            Stdio::piped()
        }
    };
    command.stdout(output()).stderr(output());
    Ok(None)
}

/// What the output of a plain task needs beside its command.
#[derive(Default)]
struct Streams {
    /// Pipes of this process's making, in place of the child's.
    read: Option<[OwnedFd; 2]>,
    /// Where second copies go.
    copies: Vec<OwnedFd>,
    shown: Option<Shown>,
}

/// Connects a plain task's stdout and stderr, unless they are a terminal or inherited.
fn streams(command: &mut process::Command, task: Option<&PlainTask>) -> io::Result<Streams> {
    let Some(task) = task else {
        return Ok(Streams::default());
    };
    let copies = match task.output() {
        OutputKind::Both => Vec::from(shown::own_streams()?),
        _ => Vec::new(),
    };
    copies.iter().for_each(set_nonblocking);
    // For others to open the streams of this process. With a plain task, it has nothing that the
    // command does not have.
    prctl::set_dumpable(true)?;
    if task.tty || !matches!(task.output(), OutputKind::Descriptors | OutputKind::Both) {
        return Ok(Streams {
            copies,
            ..Streams::default()
        });
    }
    let Pipes { read, write, shown } = Shown::pipes()?;
    let [stdout, stderr] = write;
    command.stdout(stdout).stderr(stderr);
    Ok(Streams {
        read: Some(read),
        copies,
        shown: Some(shown),
    })
}

/// Where the drains of a plain task's output lead, stdout first. A terminal needs only one,
/// and a command that writes to init's own streams needs none.
fn targets(task: &PlainTask, descriptors: Vec<OwnedFd>) -> Vec<OwnedFd> {
    match task.output() {
        OutputKind::Descriptors | OutputKind::Both => descriptors,
        OutputKind::Inherited | OutputKind::Unspecified if !task.tty => Vec::new(),
        OutputKind::Inherited | OutputKind::Unspecified => {
            let own = io::stdout().as_fd().try_clone_to_owned();
            own.iter().for_each(set_nonblocking);
            own.into_iter().collect()
        }
    }
}

/// Kills every process of the container except init. If init is not process 1 of its own
/// namespace (in tests), kills only the command's process group.
pub(crate) fn kill_everything(command: Pid) {
    let _gone = if getpid().as_raw() == 1 {
        kill(Pid::from_raw(-1), Signal::SIGKILL)
    } else {
        killpg(command, Signal::SIGKILL)
    };
}

pub(crate) fn set_nonblocking(pipe: &impl AsFd) {
    fcntl(pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))
        .expect("setting O_NONBLOCK on a pipe of our own cannot fail");
}

/// Runs `spawn` with the raised score, which the child inherits, and then restores it. A
/// process may return to its original score without the right to lower it.
pub(crate) fn with_oom_score<T>(score: Option<&mut File>, spawn: impl FnOnce() -> T) -> T {
    let Some(score) = score else { return spawn() };
    let mut own = String::new();
    let raised = score.read_to_string(&mut own).is_ok() && score.write_all(OOM_SCORE).is_ok();
    let child = spawn();
    if raised {
        // On failure the kernel may kill init as likely as the command, but init still works.
        let _unchanged = score
            .rewind()
            .and_then(|()| score.write_all(own.trim().as_bytes()));
    }
    child
}

/// Runs `spawn` with an empty signal mask, which the child inherits. Init blocks the
/// signals that it reads from a descriptor, and a command that inherits the mask could only
/// be killed. A SIGCHLD at this moment is lost, so the caller reaps afterwards.
pub(crate) fn with_no_signal_blocked<T>(spawn: impl FnOnce() -> T) -> T {
    let blocked = SigSet::thread_get_mask().and_then(|mask| {
        SigSet::empty().thread_set_mask()?;
        Ok(mask)
    });
    let child = spawn();
    if let Ok(blocked) = blocked {
        blocked
            .thread_set_mask()
            .expect("a mask that was in force can be set again");
    }
    child
}
