//! What became of the calls: five lines, or JSON; and an exit status that tells them apart.

use std::{
    io::{self, Write},
    process::ExitCode,
};

use serde::Serialize;

use crate::batch::{ANOTHER, Entry, Status};

/// Something went wrong before a call was decided about.
pub const ERROR: u8 = 1;
/// At least one call is blocked.
pub const BLOCKED: u8 = 3;
/// None is blocked, and at least one needs an approval.
pub const STEP_UP: u8 = 4;
/// All were allowed, and at least one program failed.
pub const FAILED: u8 = 5;
/// The calls were decided about and executed, and nobody was told.
pub const UNTOLD: u8 = 6;

/// How the report is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Output {
    Text,
    Json,
}

/// All calls, and their numbers. The numbers of the four kinds are the total.
#[derive(Debug, Serialize)]
pub struct Report {
    pub title: &'static str,
    pub total_calls: usize,
    pub executed_calls: usize,
    pub failed_calls: usize,
    pub step_up_calls: usize,
    pub blocked_calls: usize,
    pub calls: Vec<Entry>,
}

impl Report {
    pub fn new(title: &'static str, calls: Vec<Entry>) -> Self {
        let count = |status| calls.iter().filter(|call| call.status == status).count();
        Self {
            title,
            total_calls: calls.len(),
            executed_calls: count(Status::Executed),
            failed_calls: count(Status::Failed),
            step_up_calls: count(Status::StepUp),
            blocked_calls: count(Status::Blocked),
            calls,
        }
    }

    /// To stdout. As text it has the five lines of existing programs, and one more if a program
    /// failed.
    pub fn write(&self, output: Output) -> io::Result<()> {
        let mut out = io::stdout().lock();
        if output == Output::Json {
            serde_json::to_writer_pretty(&mut out, self)?;
            return writeln!(out);
        }
        writeln!(out, "{}", self.title)?;
        writeln!(out, "total_calls={}", self.total_calls)?;
        writeln!(out, "executed_calls={}", self.executed_calls)?;
        writeln!(out, "blocked_calls={}", self.blocked_calls)?;
        writeln!(out, "step_up_calls={}", self.step_up_calls)?;
        if self.failed_calls > 0 {
            writeln!(out, "failed_calls={}", self.failed_calls)?;
        }
        Ok(())
    }

    /// The first call that is not allowed, in the words of existing programs.
    pub fn refused(&self) -> Option<String> {
        let mut calls = self.calls.iter().filter(|call| call.reason != ANOTHER);
        calls.find_map(|call| match call.status {
            Status::Executed | Status::Failed => None,
            Status::StepUp => Some(format!(
                "STEP_UP required before execution: {}",
                call.reason
            )),
            Status::Blocked => Some(call.reason.clone()),
        })
    }

    pub fn exit_code(&self) -> ExitCode {
        exit_code(self.calls.iter().map(|call| call.status))
    }
}

/// The worst of all calls decides.
pub fn exit_code(calls: impl Iterator<Item = Status>) -> ExitCode {
    match calls.max() {
        None | Some(Status::Executed) => ExitCode::SUCCESS,
        Some(Status::Failed) => ExitCode::from(FAILED),
        Some(Status::StepUp) => ExitCode::from(STEP_UP),
        Some(Status::Blocked) => ExitCode::from(BLOCKED),
    }
}

/// To stderr.
pub fn error(what: &str) {
    let _nobody_reads = writeln!(io::stderr(), "error: {what}");
}
