//! `polydev-shim audit ...`: reads the audit log of a shim. These commands call no shim.

use std::{
    io::{BufWriter, Write},
    path::PathBuf,
    process::ExitCode,
};

use anyhow::Context;
use polydev_shim::audit::{
    chain::{Key, Line},
    ocsf,
    reader::{self, End},
};

#[derive(clap::Subcommand)]
pub(super) enum Command {
    /// Check that no record was changed, removed or moved, and that the end is there. Exits with
    /// 125 and the place if one was. A shim may be writing meanwhile.
    Verify(Log),
    /// Print the records as events of OCSF (API Activity), one a line, up to the first that was
    /// changed.
    Export(Log),
}

#[derive(clap::Args)]
pub(super) struct Log {
    /// The folder of `serve --audit-log`, or a copy.
    folder: PathBuf,
    /// The file of `serve --audit-key-file`.
    #[arg(long, env = "POLYDEV_AUDIT_KEY_FILE", value_name = "FILE")]
    key_file: PathBuf,
}

impl Log {
    pub(super) fn read(&self, each: impl FnMut(Line)) -> anyhow::Result<End> {
        let key = Key::read(&self.key_file)?;
        let end = reader::read(&self.folder, &key, usize::MAX, each)?;
        end.with_context(|| format!("`{}` has no audit log", self.folder.display()))
    }
}

pub(super) fn execute(command: &Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Verify(log) => verify(log),
        Command::Export(log) => export(log),
    }
}

fn verify(log: &Log) -> anyhow::Result<ExitCode> {
    let End { first, last, .. } = log.read(drop)?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "lines {first} to {last} are complete and unchanged")?;
    if first > 1 {
        writeln!(
            out,
            "lines 1 to {} are in files that are not here",
            first - 1
        )?;
    }
    Ok(ExitCode::SUCCESS)
}

fn export(log: &Log) -> anyhow::Result<ExitCode> {
    let mut out = BufWriter::new(std::io::stdout().lock());
    let mut written = Ok(());
    log.read(|line| {
        if let (Some(event), Ok(())) = (ocsf::event(&line), &written) {
            written = writeln!(out, "{event}");
        }
    })?;
    written.and_then(|()| out.flush()).context("stdout")?;
    Ok(ExitCode::SUCCESS)
}
