//! The program.

use std::process::ExitCode;

use clap::Parser;
use polydev_proto::error::chain;
use polydev_tool_gate::{command::Command, report};
use rustix::process::{DumpableBehavior, set_dumpable_behavior};

fn main() -> ExitCode {
    // Tools run as the same user, and must not read the secret from here.
    if let Err(error) = set_dumpable_behavior(DumpableBehavior::NotDumpable) {
        report::error(&format!("cannot hide the memory: {error}"));
        return ExitCode::from(report::ERROR);
    }
    match Command::parse().execute() {
        Ok(code) => code,
        Err(error) => {
            report::error(&chain(&*error));
            ExitCode::from(report::ERROR)
        }
    }
}
