//! `polydev-shim runs ...`

mod attach;
mod look;

use std::process::ExitCode;

/// Which run.
#[derive(clap::Args)]
struct Name {
    /// The run's UUID, as `runs list` and `run --output json` print it.
    run_id: String,
    /// Whose run it is.
    #[arg(long, default_value = "local")]
    user: String,
}

#[derive(clap::Subcommand)]
pub enum Command {
    /// Show runs that go on and those whose results are kept, the last one first.
    List(look::List),
    /// Show the runs that go on, and then each that is new or comes further.
    Watch(look::Watch),
    /// Show one run.
    Show(look::Show),
    /// Go on with a run whose connection broke; exits with its command's status.
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
