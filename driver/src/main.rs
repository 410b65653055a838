//! The plugin's process: settings, logging, run, exit code.

use std::{process::ExitCode, time::Duration};

use clap::Parser;
use nix::sys::{
    prctl,
    resource::{Resource, getrlimit, setrlimit},
};
use polydev_driver::{check_job, logging, plugin};

/// Nomad task driver that keeps warm, isolated containers for LLM command-line tools.
///
/// A Nomad agent starts this program from its plugin_dir. By hand, it checks jobs.
#[derive(Parser)]
#[command(name = "nomad-driver-polydev", version)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(clap::Subcommand)]
enum Command {
    CheckJob(check_job::Arguments),
}

/// How long idle threads for blocking calls are kept. While containers start, the kernel
/// takes 12 to 19 ms (measured) to create a thread, and the caller waits for it.
const IDLE_THREAD_TIMEOUT: Duration = Duration::from_secs(300);

fn main() -> ExitCode {
    if let Some(Command::CheckJob(arguments)) = Arguments::parse().command {
        return check_job::run(&arguments);
    }
    if let Err(error) = plugin::handshake::check(|name| std::env::var(name).ok()) {
        eprintln!("nomad-driver-polydev: {error}");
        return ExitCode::FAILURE;
    }
    logging::init();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_keep_alive(IDLE_THREAD_TIMEOUT)
        .build();
    match runtime
        .map_err(Into::into)
        .and_then(|runtime| runtime.block_on(run()))
    {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run() -> anyhow::Result<()> {
    // Credentials pass through this process: no core dumps, and no other process may read
    // its memory.
    prctl::set_dumpable(false)?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    // A task needs about ten descriptors; the usual soft limit of 1,024 is too low.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    plugin::serve(std::io::stdout()).await
}
