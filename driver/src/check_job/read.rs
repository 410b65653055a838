//! Reads a job.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, bail, ensure};
use serde_json::Value;

/// Nomad takes jobs of at most 1 MiB; in JSON they are longer.
const MAX_BYTES: u64 = 16 << 20;

/// The job in a file, as Nomad's API has it.
///
/// # Errors
/// If there is none.
pub(super) fn job(file: &Path, variables: &[String]) -> anyhow::Result<Value> {
    let text = if file == Path::new("-") {
        bounded(io::stdin().lock()).context("cannot read stdin")?
    } else {
        let opened = File::open(file).and_then(bounded);
        opened.with_context(|| format!("cannot read `{}`", file.display()))?
    };
    let json = match text.trim_start().starts_with('{') {
        true => text,
        false if file == Path::new("-") => bail!("stdin must be a job as JSON"),
        false => from_hcl(file, variables)?,
    };
    let mut job: Value = serde_json::from_str(&json)
        .with_context(|| format!("`{}` is not a job as JSON", file.display()))?;
    let inner = job.get_mut("Job").map(Value::take);
    let job = inner.unwrap_or(job);
    ensure!(
        job.get("TaskGroups").is_some_and(Value::is_array),
        "`{}` has no `TaskGroups`: must be a job as `nomad job run -output` prints it",
        file.display()
    );
    Ok(job)
}

fn bounded(from: impl Read) -> io::Result<String> {
    let mut text = String::new();
    from.take(MAX_BYTES + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_BYTES {
        let most = MAX_BYTES >> 20;
        return Err(io::Error::other(format!("it is larger than {most} MiB")));
    }
    Ok(text)
}

/// Nomad itself parses its language. It does not ask an agent for this.
fn from_hcl(file: &Path, variables: &[String]) -> anyhow::Result<String> {
    let output = Command::new("nomad")
        .args(["job", "run", "-output"])
        .args(variables.iter().map(|variable| format!("-var={variable}")))
        .arg(file)
        .stdin(Stdio::null())
        .output();
    let output = output.with_context(|| {
        format!(
            "`{}` is not JSON, and `nomad` cannot be started to read it",
            file.display()
        )
    })?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr);
        bail!("nomad job run -output {}: {}", file.display(), words.trim());
    }
    String::from_utf8(output.stdout).context("nomad printed no text")
}
