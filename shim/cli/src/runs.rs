//! `polydev-shim runs ...`

mod attach;
mod look;

use std::process::ExitCode;

use polydev_proto::runtime::{GetRunRequest, Run};

use crate::{Options, answer};

/// A run, and its user.
#[derive(clap::Args)]
pub(crate) struct Name {
    /// The run's UUID, as `runs list` and `run --output json` print it.
    pub(crate) run_id: String,
    /// User that the run belongs to.
    #[arg(long, default_value = "local")]
    pub(crate) user: String,
}

impl Name {
    /// Asks the shim for the run.
    pub(crate) async fn get(self, options: &Options) -> anyhow::Result<Run> {
        let request = GetRunRequest {
            run_id: self.run_id,
            user_id: self.user,
        };
        let mut shim = options.connect().await?;
        let run = answer(shim.get_run(request)).await?.run;
        Ok(run.unwrap_or_default())
    }
}

#[derive(clap::Subcommand)]
pub enum Command {
    /// List active runs, and ended runs whose results are kept, newest first.
    List(look::List),
    /// Show the active runs, and then each run that is new or changes its state.
    Watch(look::Watch),
    /// Show one run.
    Show(look::Show),
    /// Stream a run again after its connection broke. Exits with the command's status.
    Attach(attach::Attach),
    /// End a run: SIGTERM now, SIGKILL after its kill timeout.
    Cancel(attach::Cancel),
}

/// # Errors
/// If the shim cannot be reached, or refuses the call.
pub async fn execute(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::List(arguments) => look::list(arguments).await,
        Command::Watch(arguments) => look::watch(arguments).await,
        Command::Show(arguments) => look::show(arguments).await,
        Command::Attach(arguments) => attach::attach(arguments).await,
        Command::Cancel(arguments) => attach::cancel(arguments).await,
    }
}
