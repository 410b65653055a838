//! The CLI's process: its lines, its signals, its end.

use std::{
    collections::VecDeque,
    fs::{self, File, OpenOptions},
    io::{self, ErrorKind, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{
            fs::OpenOptionsExt,
            process::{CommandExt, ExitStatusExt},
        },
    },
    path::Path,
    process::{Child, ExitStatus, Stdio},
    time::Duration,
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::signal::{SigSet, Signal, killpg},
    unistd::Pid,
};
use polydev_proto::{
    outside::{self, Outside},
    prompt::Options,
    provider::Vendor,
};
use serde_json::Value;

use crate::{End, cli::Cli, lines::Lines};

/// Signals that init and an agent pass on to a command.
pub const FORWARDED: [Signal; 6] = [
    Signal::SIGTERM,
    Signal::SIGINT,
    Signal::SIGHUP,
    Signal::SIGQUIT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
];
/// Bytes in one read.
const MAX_CHUNK: usize = 64 << 10;

/// A CLI that runs, in a process group of its own.
pub(crate) struct Process {
    child: Child,
    stdin: File,
    unsent: VecDeque<u8>,
    /// `None` after its end.
    pub(crate) stdout: Option<File>,
    pub(crate) stderr: Option<File>,
    lines: Lines,
}

impl Process {
    /// Starts it as the one-shot form of a run with a key at the broker is started.
    pub(crate) fn start(provider: Vendor, cli: &dyn Cli, options: &Options) -> io::Result<Self> {
        let (program, args) = cli.argv().split_first().ok_or(ErrorKind::InvalidInput)?;
        let Outside { env, file } = Outside::of(provider);
        for file in file.iter().chain(&options.files) {
            write(file)?;
        }
        let mut child = std::process::Command::new(program)
            .args(args)
            .args(&options.args)
            .envs(env)
            .envs(cli.env().iter().copied())
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let stdin = child.stdin.take().map(OwnedFd::from);
        let stdin = File::from(stdin.ok_or(ErrorKind::BrokenPipe)?);
        // A CLI that does not read must not keep the agent from reading it.
        fcntl(&stdin, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        Ok(Self {
            stdin,
            unsent: VecDeque::new(),
            stdout: child.stdout.take().map(|pipe| OwnedFd::from(pipe).into()),
            stderr: child.stderr.take().map(|pipe| OwnedFd::from(pipe).into()),
            lines: Lines::default(),
            child,
        })
    }

    /// Where to write, if something waits to be written.
    pub(crate) fn waiting(&self) -> Option<BorrowedFd<'_>> {
        (!self.unsent.is_empty()).then(|| self.stdin.as_fd())
    }

    pub(crate) fn send(&mut self, lines: &[Value]) {
        for line in lines {
            self.unsent.extend(line.to_string().as_bytes());
            self.unsent.push_back(b'\n');
        }
        self.flush();
    }

    /// Writes what the pipe takes. A CLI that no longer reads is about to end.
    pub(crate) fn flush(&mut self) {
        while !self.unsent.is_empty() {
            match self.stdin.write(self.unsent.as_slices().0) {
                Ok(count) => drop(self.unsent.drain(..count)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(_) => self.unsent.clear(),
            }
        }
    }

    /// Reads its stdout once.
    pub(crate) fn receive(&mut self) {
        let mut chunk = vec![0; MAX_CHUNK];
        let read = self.stdout.as_mut().map(|pipe| pipe.read(&mut chunk));
        match read {
            Some(Ok(count)) if count > 0 => self.lines.push(&chunk[..count]),
            _ => self.stdout = None,
        }
    }

    /// The next whole line; one that is no JSON is passed over.
    ///
    /// # Errors
    /// Why there will be none, for people.
    pub(crate) fn next_line(&mut self) -> Result<Option<Value>, String> {
        loop {
            match self.lines.next_line() {
                Ok(None) => return Ok(None),
                Ok(Some(line)) => {
                    if let Ok(value) = serde_json::from_slice(&line) {
                        return Ok(Some(value));
                    }
                }
                Err(too_long) => return Err(too_long.to_string()),
            }
        }
    }

    /// Reads its stderr once.
    pub(crate) fn complaint(&mut self) -> Vec<u8> {
        let mut chunk = vec![0; MAX_CHUNK];
        let read = self.stderr.as_mut().map(|pipe| pipe.read(&mut chunk));
        match read {
            Some(Ok(count)) if count > 0 => chunk.truncate(count),
            _ => {
                self.stderr = None;
                chunk.clear();
            }
        }
        chunk
    }

    /// Sends a signal to it and to what it has started.
    pub(crate) fn signal(&self, signal: Signal) {
        let group = Pid::from_raw(self.child.id().cast_signed());
        let _gone = killpg(group, signal);
    }

    /// Ends it and what it has started.
    pub(crate) fn end(&mut self) {
        self.signal(Signal::SIGKILL);
        let _ended = self.child.wait();
    }

    /// The CPU time of all its threads; zero if it is not known.
    pub(crate) fn cpu_time(&self) -> Duration {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id())).ok();
        // After the name, in brackets, `utime` and `stime` are the 12th and 13th field (proc(5)).
        let ticks = stat.and_then(|stat| {
            let (_, fields) = stat.rsplit_once(')')?;
            let mut times = fields.split_whitespace().skip(11);
            let mut next = || times.next()?.parse::<u64>().ok();
            Some(next()? + next()?)
        });
        // Linux has 100 ticks a second for programs (USER_HZ).
        Duration::from_millis(ticks.unwrap_or_default() * 10)
    }

    /// How it has ended, if it has.
    pub(crate) fn ended(&mut self) -> Option<End> {
        let status: ExitStatus = self.child.try_wait().ok()??;
        let signal = status
            .signal()
            .and_then(|number| Signal::try_from(number).ok());
        Some(match signal {
            Some(signal) => End::Signal(signal),
            None => End::Code(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1)),
        })
    }
}

/// Writes a file that the CLI reads when it starts. A run that starts cold has it from init,
/// with the same content.
fn write(file: &outside::File) -> io::Result<()> {
    let home = std::env::var_os("HOME").ok_or(ErrorKind::NotFound)?;
    let path = Path::new(&home).join(file.path);
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let mut target = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    target.write_all(file.content.as_bytes())
}

/// Those that the agent reads in its own time.
pub(crate) fn awaited_signals() -> SigSet {
    let mut signals: SigSet = FORWARDED.into_iter().collect();
    signals.add(Signal::SIGCHLD);
    signals
}

/// Lets every signal do to the agent what it does to any program.
pub(crate) fn let_signals_through() {
    let _only_this_thread = SigSet::all().thread_unblock();
}
