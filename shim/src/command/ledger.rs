//! `polydev-shim ledger ...`: what a policy has decided, as evidence for people without the key of
//! the audit log. These commands call no shim.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, BufWriter, Read as _, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context;
use polydev_proto::signing::PublicKeys;
use polydev_shim::{
    audit::dsse::{Ledger, MAX_LINE, Read},
    permission,
};

use super::audit;

#[derive(clap::Subcommand)]
pub(super) enum Command {
    /// Print each decision of an audit log as a signed statement (DSSE, in-toto), one a line.
    Export {
        #[command(flatten)]
        log: audit::Log,
        /// An Ed25519 private key in PEM, which signs them.
        #[arg(long, value_name = "FILE")]
        signing_key_file: PathBuf,
    },
    /// Check that no statement of an exported ledger was changed, removed or moved. Exits with 125
    /// and the line if one was.
    Verify {
        /// The output of `export`.
        ledger: PathBuf,
        /// Ed25519 public keys in PEM, of those who may sign.
        #[arg(long, value_name = "FILE")]
        public_keys: PathBuf,
    },
}

pub(super) fn execute(command: &Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Export {
            log,
            signing_key_file,
        } => export(log, signing_key_file),
        Command::Verify {
            ledger,
            public_keys,
        } => verify(ledger, public_keys),
    }
}

fn export(log: &audit::Log, key: &Path) -> anyhow::Result<ExitCode> {
    let key = permission::read(key)?;
    let mut ledger = Ledger::new(&key);
    let mut out = BufWriter::new(std::io::stdout().lock());
    let mut written = Ok(());
    log.read(|line| {
        if written.is_ok()
            && let Some(envelope) = ledger.envelope(&line)
        {
            written = writeln!(out, "{envelope}");
        }
    })?;
    written.and_then(|()| out.flush()).context("stdout")?;
    Ok(ExitCode::SUCCESS)
}

fn verify(ledger: &Path, public_keys: &Path) -> anyhow::Result<ExitCode> {
    let unreadable = |path: &Path| format!("cannot read `{}`", path.display());
    let keys = fs::read(public_keys).with_context(|| unreadable(public_keys))?;
    let keys = PublicKeys::read(&keys).with_context(|| format!("`{}`", public_keys.display()))?;
    let file = File::open(ledger).with_context(|| unreadable(ledger))?;
    let (mut read, mut reader) = (Read::default(), BufReader::new(file));
    let mut line = String::new();
    // One byte more than a line may have, and its end.
    let most = MAX_LINE as u64 + 2;
    loop {
        line.clear();
        let length = reader.by_ref().take(most).read_line(&mut line);
        if length.with_context(|| unreadable(ledger))? == 0 {
            break;
        }
        let line = line.strip_suffix('\n').unwrap_or(&line);
        read.line(line, &keys)
            .with_context(|| format!("`{}`", ledger.display()))?;
    }
    let Read {
        decisions, last, ..
    } = read;
    let mut out = std::io::stdout().lock();
    match decisions {
        0 => writeln!(out, "the ledger has no decisions")?,
        _ => writeln!(
            out,
            "decisions 1 to {decisions} are complete and unchanged; the last is of {last}"
        )?,
    }
    Ok(ExitCode::SUCCESS)
}
