//! `check-job`: what becomes of a job for Nomad's Docker driver when its tasks use this one.
//!
//! [`read`] gets the job, [`findings`] compares each of its tasks with the table
//! [`crate::config::from_docker`] and with the checks of this driver, for which [`shape`] gives
//! options the form in which Nomad sends them, and [`rewrite`] changes the job.

mod findings;
mod json;
mod plugin;
mod read;
mod rewrite;
mod shape;

use std::{
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
};

use findings::{Checked, Finding, Kind};

/// Compares a job for Nomad's Docker driver with this one.
///
/// Prints, for each task with `driver = "docker"`, which options are the same, which differ, and
/// what to write instead. Nothing is sent to Nomad or Docker.
///
/// Exit status: 0 if the job runs when only the driver's name is changed, 1 if something must be
/// changed first, in the job or in the plugin's options, 2 if the job cannot be read or has no such
/// task. With --rewrite, 0 and 1 are about the job that is printed.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The job: JSON as `nomad job run -output` prints it, or HCL, for which `nomad` must be in
    /// PATH; `-` for JSON on stdin.
    file: PathBuf,
    /// A variable of a job in HCL, NAME=VALUE; may be repeated.
    #[arg(long = "var", value_name = "NAME=VALUE")]
    variables: Vec<String>,
    /// Print the job as JSON for `nomad job run -json`, with the driver and what can be changed
    /// by itself changed. What is left for you goes to stderr.
    #[arg(long)]
    rewrite: bool,
    /// An option of the plugin that the nodes have, such as volumes.enabled=true or
    /// allow_caps=["all"]; may be repeated. [default: those of a plugin without options]
    #[arg(long = "plugin", value_name = "NAME=VALUE")]
    plugin: Vec<String>,
}

/// Runs the command.
#[must_use]
pub fn run(arguments: &Arguments) -> ExitCode {
    match check(arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("nomad-driver-polydev check-job: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// Returns whether nothing must be changed by hand.
fn check(arguments: &Arguments) -> anyhow::Result<bool> {
    let plugin = plugin::options(&arguments.plugin)?;
    let mut job = read::job(&arguments.file, &arguments.variables)?;
    if !arguments.rewrite {
        let checked = findings::check(&job, &plugin)?;
        print(&mut io::stdout().lock(), &checked)?;
        return Ok(checked.is_ready());
    }
    findings::check(&job, &plugin)?;
    rewrite::rewrite(&mut job);
    let left = findings::check_rewritten(&job, &plugin);
    let (mut stdout, mut stderr) = (io::stdout().lock(), io::stderr().lock());
    serde_json::to_writer_pretty(&mut stdout, &job)?;
    writeln!(stdout)?;
    for task in &left.tasks {
        let stays = task.findings.iter().filter(|one| one.kind != Kind::Differs);
        for Finding { kind, text } in stays {
            writeln!(stderr, "{}: {}: {text}", task.name, kind.word())?;
        }
    }
    Ok(left.is_ready())
}

fn print(to: &mut impl Write, checked: &Checked) -> io::Result<()> {
    for task in &checked.tasks {
        writeln!(to, "task {}", task.name)?;
        if !task.same.is_empty() {
            writeln!(to, "  the same     {}", task.same.join(", "))?;
        }
        if !task.unknown.is_empty() {
            let unknown = task.unknown.join(", ");
            writeln!(to, "  not checked  {unknown}: known on the node alone")?;
        }
        for finding in &task.findings {
            writeln!(to, "  {:<12} {}", finding.kind.word(), finding.text)?;
        }
    }
    let has_unknown = checked.tasks.iter().any(|task| !task.unknown.is_empty());
    let verdict = match checked.changes() {
        0 if has_unknown => {
            "Runs with `driver = \"polydev\"`, if the node allows what was not checked.".to_owned()
        }
        0 => "Runs with `driver = \"polydev\"`.".to_owned(),
        1 => "1 thing must be changed or allowed first.".to_owned(),
        many => format!("{many} things must be changed or allowed first."),
    };
    let mut findings = checked.tasks.iter().flat_map(|task| &task.findings);
    if findings.any(|one| one.kind == Kind::Allow) {
        writeln!(
            to,
            "Name with --plugin NAME=VALUE what the plugin of your nodes allows."
        )?;
    }
    writeln!(
        to,
        "{verdict} What differs for every task: docs/from-docker-driver.md"
    )
}

#[cfg(test)]
mod tests;
