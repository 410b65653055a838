//! Child processes that do not outlive their test.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::wait_until;

/// A process whose output goes to a file. Dropping it sends SIGTERM and waits for its end.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: PathBuf,
    name: String,
}

impl Process {
    /// # Panics
    /// If the command cannot be started.
    pub fn start(command: &mut Command, log: &Path) -> Self {
        let name = command.get_program().to_string_lossy().into_owned();
        let file = File::create(log).expect("a log can be made");
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone().expect("a descriptor can be copied"))
            .stderr(file)
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {name}: {error}"));
        Self {
            child,
            log: log.to_owned(),
            name,
        }
    }

    #[must_use]
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// The output of the process so far.
    #[must_use]
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    pub fn signal(&self, signal: Signal) {
        let _gone = kill(self.pid(), signal);
    }

    /// Sends `signal` to the process, unless it has ended, and waits for its end.
    pub fn end(&mut self, signal: Signal) {
        if self.exit().is_none() {
            self.signal(signal);
        }
        let what = format!("the end of {}", self.name);
        wait_until(&what, Duration::from_secs(60), || {
            self.exit().ok_or_else(|| "still running".to_owned())
        });
    }

    /// The exit status, if the process has ended.
    pub fn exit(&mut self) -> Option<std::process::ExitStatus> {
        self.child.try_wait().expect("a child can be waited for")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // After the process has ended, its id may belong to another process.
        if self.exit().is_none() {
            self.signal(Signal::SIGTERM);
        }
        let limit = std::time::Instant::now() + Duration::from_secs(60);
        while self.exit().is_none() {
            if std::time::Instant::now() > limit {
                eprintln!("{} did not end:\n{}", self.name, self.log());
                self.signal(Signal::SIGKILL);
            }
            std::thread::park_timeout(Duration::from_millis(20));
        }
        if std::thread::panicking() {
            let log = self.log();
            // Without the agent's line for each request of the harness.
            let lines: Vec<&str> = log
                .lines()
                .filter(|line| !line.contains("http: request complete"))
                .collect();
            let tail = lines.len().saturating_sub(60);
            eprintln!("--- {} ---\n{}", self.name, lines[tail..].join("\n"));
        }
    }
}

/// Runs a command to its end.
///
/// # Panics
/// If the command cannot be started.
pub fn output(command: &mut Command) -> Output {
    let command = command.stdin(Stdio::null());
    command
        .output()
        .unwrap_or_else(|error| panic!("cannot run {command:?}: {error}"))
}

/// Runs a command that must succeed, and returns its stdout.
///
/// # Panics
/// If the command fails. The message contains the command's output.
#[track_caller]
pub fn succeed(command: &mut Command) -> String {
    let output = output(command);
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Waits until the log of a process contains `text`.
#[track_caller]
pub fn wait_for_log(process: &Process, text: &str, limit: Duration) {
    wait_until(&format!("`{text}` in the log"), limit, || {
        let log = process.log();
        if log.contains(text) { Ok(()) } else { Err(log) }
    });
}
