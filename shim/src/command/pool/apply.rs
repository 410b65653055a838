//! `polydev-shim pool apply`

use std::{
    fs,
    io::{IsTerminal, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use polydev_cli::print;
use polydev_shim::{
    nomad::{self, Nomad},
    pool::apply::{Applied, Variable, plan},
};

#[derive(clap::Args)]
pub(in crate::command) struct Arguments {
    /// A job file, or a folder with `*.nomad.hcl` files; may be repeated.
    #[arg(long = "file", short, value_name = "PATH", required = true)]
    files: Vec<PathBuf>,
    /// Set a variable of the job files, as `nomad job run -var` does; may be repeated.
    #[arg(long = "var", value_name = "NAME=VALUE", value_parser = Variable::parse)]
    variables: Vec<Variable>,
    /// Submit without a confirmation.
    #[arg(long, short)]
    yes: bool,
    /// Show what would change, and submit nothing.
    #[arg(long, conflicts_with = "yes")]
    plan: bool,
    #[command(flatten)]
    nomad: nomad::Settings,
}

/// Plans all jobs before it submits the first one.
pub(super) async fn apply(arguments: &Arguments) -> anyhow::Result<()> {
    let nomad = Nomad::new(arguments.nomad.clone())?;
    let mut planned = Vec::new();
    for path in files(&arguments.files)? {
        let text = fs::read_to_string(&path);
        let text = text.with_context(|| format!("cannot read `{}`", path.display()))?;
        let job = plan(&nomad, &text, &arguments.variables).await;
        let job = job.with_context(|| format!("cannot plan the job in `{}`", path.display()))?;
        print(&job.describe())?;
        planned.push(job);
    }
    let changed: Vec<_> = planned.into_iter().filter(Applied::is_change).collect();
    if arguments.plan || changed.is_empty() {
        return Ok(());
    }
    if !arguments.yes && !agrees(changed.len())? {
        bail!("not confirmed: nothing submitted");
    }
    for job in changed {
        job.submit(&nomad).await?;
        print(&format!("{}: submitted\n", job.id()))?;
    }
    Ok(())
}

fn files(given: &[PathBuf]) -> anyhow::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in given {
        if !path.is_dir() {
            files.push(path.clone());
            continue;
        }
        let entries = fs::read_dir(path);
        let entries = entries.with_context(|| format!("cannot read `{}`", path.display()))?;
        let is_job = |path: &Path| path.to_string_lossy().ends_with(".nomad.hcl");
        let mut found: Vec<PathBuf> = entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| is_job(path))
            .collect();
        if found.is_empty() {
            bail!("`{}` has no file that ends in .nomad.hcl", path.display());
        }
        found.sort();
        files.append(&mut found);
    }
    Ok(files)
}

fn agrees(jobs: usize) -> anyhow::Result<bool> {
    if !std::io::stdin().is_terminal() {
        bail!("stdin is not a terminal: --yes submits without a confirmation");
    }
    eprint!("Submit {jobs} jobs? [y/N] ");
    std::io::stderr().flush()?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}
