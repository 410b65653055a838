//! Runs the program of a tool: without a shell, with the arguments on its stdin, for a bounded time
//! and with bounded output.

use std::{
    io::{self, Read, Write},
    os::unix::process::CommandExt,
    process::{Child, Command, Stdio},
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use parking_lot::Mutex;
use rustix::process::{
    Pid, Signal, WaitId, WaitIdOptions, kill_process, kill_process_group, waitid,
};
use serde::Serialize;

use crate::registry::Resolved;

/// Longest output that is kept, of stdout and of stderr, in bytes. The rest is read and dropped.
pub const MAX_OUTPUT: usize = 64 << 10;
/// How long the last output may take once the program has ended.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);
/// The only variable of a tool's environment.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// How a program ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Done {
    /// Missing if a signal or the time-out ended it, or if it was not started.
    pub exit_code: Option<i32>,
    pub timed_out: bool,
    /// Why it was not started or could not be waited for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// UTF-8; other bytes are replaced.
    pub stdout: String,
    pub stderr: String,
    /// Whether output was dropped.
    pub truncated: bool,
}

impl Done {
    #[must_use]
    pub fn is_success(&self) -> bool {
        self.exit_code == Some(0)
    }
}

/// Runs the program until it ends or its time is up, and then ends what it has started in its
/// process group. A process that has left the group lives on: it cannot be known here. Its output
/// is not waited for.
#[must_use]
pub fn execute(resolved: &Resolved, stdin: &str) -> Done {
    match start(resolved) {
        Ok(child) => follow(child, stdin, resolved.timeout),
        Err(error) => Done {
            exit_code: None,
            timed_out: false,
            error: Some(format!("cannot start `{}`: {error}", resolved.argv[0])),
            stdout: String::new(),
            stderr: String::new(),
            truncated: false,
        },
    }
}

fn start(resolved: &Resolved) -> io::Result<Child> {
    Command::new(&resolved.argv[0])
        .args(&resolved.argv[1..])
        .env_clear()
        .env("PATH", PATH)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
}

fn follow(mut child: Child, stdin: &str, timeout: Duration) -> Done {
    let pid = Pid::from_child(&child);
    let (mut input, stdin) = (child.stdin.take(), stdin.to_owned());
    // They end with their pipes, which something may hold that the program has left behind.
    let _writer = thread::spawn(move || {
        // A program that does not read its arguments closes the pipe.
        let _unread = input
            .as_mut()
            .map(|input| input.write_all(stdin.as_bytes()));
    });
    let stdout = Kept::read(child.stdout.take());
    let stderr = Kept::read(child.stderr.take());
    let (ended, end) = mpsc::channel();
    let _waiter = thread::spawn(move || {
        // It stays a zombie, so that nothing else can have its id when it is killed below.
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        let _ended = waitid(WaitId::Pid(pid), options);
        let _nobody_waits = ended.send(());
    });
    let timed_out = end.recv_timeout(timeout).is_err();
    let _has_ended = kill_process_group(pid, Signal::KILL);
    // It may have left its group.
    let _has_ended = kill_process(pid, Signal::KILL);
    let (exit_code, error) = match child.wait() {
        Ok(status) => (status.code().filter(|_| !timed_out), None),
        Err(error) => (None, Some(format!("cannot wait for the program: {error}"))),
    };
    let (stdout, cut) = stdout.take();
    let (stderr, cut_too) = stderr.take();
    Done {
        exit_code,
        timed_out,
        error,
        stdout,
        stderr,
        truncated: cut || cut_too,
    }
}

/// What is kept of a pipe, and what says that its end was read.
struct Kept {
    bytes: Arc<Mutex<Vec<u8>>>,
    /// Whether there was more than is kept.
    end: mpsc::Receiver<bool>,
}

impl Kept {
    fn read(pipe: Option<impl Read + Send + 'static>) -> Self {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let (ended, end) = mpsc::channel();
        let kept = bytes.clone();
        thread::spawn(move || {
            let mut piece = [0; 8 << 10];
            let mut is_cut = false;
            let Some(mut pipe) = pipe else { return };
            while let Ok(length @ 1..) = pipe.read(&mut piece) {
                let mut kept = kept.lock();
                let room = MAX_OUTPUT - kept.len();
                kept.extend_from_slice(&piece[..length.min(room)]);
                is_cut |= length > room;
            }
            let _nobody_waits = ended.send(is_cut);
        });
        Self { bytes, end }
    }

    /// The text so far, and whether there is more.
    fn take(self) -> (String, bool) {
        let is_cut = self.end.recv_timeout(DRAIN_TIMEOUT).unwrap_or(true);
        let bytes = self.bytes.lock();
        (String::from_utf8_lossy(&bytes).into_owned(), is_cut)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(argv: &[&str], timeout: Duration) -> Done {
        let resolved = Resolved {
            tool: "tool".into(),
            action: "run".into(),
            target: String::new(),
            argv: argv.iter().map(ToString::to_string).collect(),
            timeout,
        };
        execute(&resolved, "{\"a\":1}")
    }

    #[test]
    fn a_program_has_its_arguments_on_stdin_and_an_environment_of_its_own() {
        let done = run(
            &[
                "sh",
                "-c",
                "cat; env | cut -d= -f1 | grep -c -v -E '^(PATH|PWD|SHLVL|_)$' >&2",
            ],
            Duration::from_secs(10),
        );
        assert_eq!(
            (done.stdout.as_str(), done.stderr.trim()),
            ("{\"a\":1}", "0")
        );
    }

    #[test]
    fn a_program_that_takes_too_long_is_killed_with_all_it_has_started() {
        let done = run(
            &["sh", "-c", "sleep 600 & sleep 600"],
            Duration::from_millis(200),
        );
        assert!(done.timed_out && done.exit_code.is_none());
    }

    #[test]
    fn output_is_bounded_and_what_is_left_behind_holds_nothing() {
        let done = run(
            &["sh", "-c", "sleep 600 & head -c 1000000 /dev/zero"],
            Duration::from_secs(10),
        );
        assert_eq!(
            (done.stdout.len(), done.truncated, done.exit_code),
            (MAX_OUTPUT, true, Some(0))
        );
    }

    #[test]
    fn what_leaves_the_group_and_holds_the_pipes_is_not_waited_for() {
        let begin = std::time::Instant::now();
        // It is in another session once it has closed the first pipe, and holds stderr.
        let leave = "said=$(setsid sh -c 'echo said; exec sleep 20 >&2' &); echo $said";
        let done = run(&["sh", "-c", leave], Duration::from_secs(10));
        assert_eq!((done.stdout.as_str(), done.exit_code), ("said\n", Some(0)));
        assert!(done.truncated && begin.elapsed() < Duration::from_secs(15));
    }

    #[test]
    fn a_program_that_is_missing_is_an_error() {
        let done = run(&["/nowhere"], Duration::from_secs(1));
        assert!(done.error.unwrap().contains("cannot start `/nowhere`"));
        assert_eq!(run(&["false"], Duration::from_secs(9)).exit_code, Some(1));
    }
}
