//! How a run ended, and why: as init reports it, or as the driver concludes.

use polydev_proto::{
    init::{Exited, NotStarted, exited, not_started},
    node::ended::Reason,
    stream::Stream,
};

use super::{
    Carrier, End, Ending, SIGKILL, SIGTERM, Stop,
    signed::{Signed, Unsigned},
};
use crate::{
    limits,
    run::{Ended, Run, cancel::Cause},
};

impl Carrier<'_> {
    pub(super) fn exited(&self, exited: &Exited) -> Stop {
        let (exit_code, signal) = match exited.status {
            Some(exited::Status::Code(code)) => (code, 0),
            Some(exited::Status::Signal(signal)) => (128 + signal, signal),
            None => return self.end(Reason::Lost, "init did not report how the command ended"),
        };
        let killed = exit_code == 128 + SIGKILL;
        let (reason, message) = if self.ending != Ending::No {
            self.asked()
        } else if exited.deadline_exceeded {
            (Reason::Deadline, "its deadline passed".into())
        } else if killed && self.oom_kills() > 0 {
            (
                Reason::OutOfMemory,
                "the kernel killed it because it exceeded its memory limit".into(),
            )
        } else if signal != 0 {
            (Reason::Signaled, format!("signal {signal} ended it"))
        } else {
            (Reason::Exited, String::new())
        };
        Stop::End(End::Ended(Ended {
            exit_code: status(reason, exit_code),
            signal,
            stdout_bytes: exited.stdout_bytes,
            stderr_bytes: exited.stderr_bytes,
            artifact_bytes: exited.artifact_bytes,
            event_bytes: exited.event_bytes,
            oom_kills: self.oom_kills(),
            ..self.run.end(reason, &message)
        }))
    }

    pub(super) fn not_started(&self, refused: &NotStarted) -> Stop {
        if self.ending != Ending::No {
            return self.ended_early();
        }
        let exit_code = match refused.reason() {
            not_started::Reason::NotFound => 127,
            not_started::Reason::NotExecutable
            | not_started::Reason::Invalid
            | not_started::Reason::Unspecified => 126,
        };
        Stop::End(End::Ended(Ended {
            exit_code,
            ..self.run.end(Reason::NotStarted, short(&refused.message))
        }))
    }

    /// The end of a run that would get other input than was signed.
    pub(super) fn not_signed(&self, unsigned: &Unsigned) -> Stop {
        let message = unsigned.to_string();
        // A command with files starts once it has them all. Any other one may have started.
        let is_in_files = |signed: &Signed| signed.end() <= self.run.claimed.files_bytes;
        if !self.signed.as_ref().is_some_and(is_in_files) {
            return self.end(Reason::Lost, &message);
        }
        self.not_started(&NotStarted {
            message,
            ..NotStarted::default()
        })
    }

    /// The end of a run that was asked to end.
    pub(super) fn ended_early(&self) -> Stop {
        let (reason, message) = self.asked();
        self.end(reason, &message)
    }

    fn asked(&self) -> (Reason, String) {
        let cause = self.run.cancel.cause();
        let cause = cause.expect("a run ends early only when somebody has asked for it");
        (cause.reason(), cause.message())
    }

    /// The end of a run whose container has ended; its command may have ended before.
    pub(super) fn lost(&self) -> Stop {
        match &self.collected {
            Some(exited) => self.exited(exited),
            None => self.broken("its container ended"),
        }
    }

    /// The end of a run whose container cannot be used any longer.
    pub(super) fn broken(&self, message: &str) -> Stop {
        if self.oom_kills() > 0 {
            return self.end(Reason::OutOfMemory, "the container ran out of memory");
        }
        self.end(Reason::Lost, message)
    }

    fn oom_kills(&self) -> u64 {
        self.limits.map_or(0, limits::Handle::oom_kills)
    }

    pub(super) fn end(&self, reason: Reason, message: &str) -> Stop {
        Stop::End(End::Ended(Ended {
            oom_kills: self.oom_kills(),
            ..self.run.end(reason, message)
        }))
    }
}

/// The command's exit status; but for a run that polydev ended, that of `timeout` (coreutils):
/// whatever the command says then, it has not succeeded. A program that gets SIGTERM may well end
/// with 0, as Gemini CLI does.
fn status(reason: Reason, exit_code: i32) -> i32 {
    const KILLED: i32 = 128 + SIGKILL;
    match reason {
        Reason::Deadline => 124,
        Reason::Cancelled
        | Reason::CredentialRefused
        | Reason::ApiUnavailable
        | Reason::BudgetExhausted => match exit_code {
            KILLED => KILLED,
            _ => 128 + SIGTERM,
        },
        _ => exit_code,
    }
}

/// Text that init quotes, such as a program or a folder, may be long.
fn short(message: &str) -> &str {
    const MAX_MESSAGE: usize = 1000;
    &message[..message.floor_char_boundary(MAX_MESSAGE)]
}

impl Run {
    /// The end, with what the APIs have answered.
    pub(crate) fn with_answers(&self, mut ended: Ended) -> Ended {
        // A command may see that its key is refused, and end, before it is asked to.
        if let Some(cause @ (Cause::CredentialRefused(_) | Cause::BudgetExhausted(_))) =
            self.cancel.cause()
            && matches!(ended.reason, Reason::Exited | Reason::Signaled)
        {
            (ended.reason, ended.message) = (cause.reason(), cause.message());
            ended.exit_code = status(ended.reason, ended.exit_code);
        }
        let answers = self.progress.borrow().answers();
        Ended {
            usage: answers.usage.clone(),
            api_errors: answers.errors.clone(),
            egress: answers.egress.clone(),
            ..ended
        }
    }

    /// An end that init did not report.
    pub(crate) fn end(&self, reason: Reason, message: &str) -> Ended {
        let artifacts = self.progress.borrow().artifacts.clone();
        let artifacts = artifacts.iter().flat_map(|artifacts| &artifacts.files);
        Ended {
            reason,
            // Docker's exit status for processes that were killed.
            exit_code: status(reason, 128 + SIGKILL),
            signal: 0,
            message: message.to_owned(),
            after: self.arrived.elapsed(),
            first_output_after: self.progress.borrow().first_output,
            stdout_bytes: self.output[Stream::Stdout].end(),
            stderr_bytes: self.output[Stream::Stderr].end(),
            artifact_bytes: artifacts.map(|file| file.size).sum(),
            event_bytes: self.output[Stream::Events].end(),
            oom_kills: 0,
            // Filled in when the broker has told the last of it.
            usage: Vec::new(),
            api_errors: Vec::new(),
            egress: Vec::new(),
        }
    }
}
