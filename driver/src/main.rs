//! The plugin's process: settings, logging, run, exit code.

use std::{process::ExitCode, time::Duration};

use clap::Parser;
use nix::sys::{
    prctl,
    resource::{Resource, getrlimit, setrlimit},
};
use polydev_driver::{logging, plugin};

/// Nomad task driver that keeps warm, isolated containers for LLM command-line tools.
///
/// A Nomad agent starts it from its plugin_dir; it is of no use by hand.
#[derive(Parser)]
#[command(name = "nomad-driver-polydev", version)]
struct Arguments {}

/// How long idle threads for blocking calls are kept. While containers are being started the
/// kernel was seen to take 12 to 19 ms to make a new one, in the place that asks for it.
const IDLE_THREAD_TIMEOUT: Duration = Duration::from_secs(300);

fn main() -> ExitCode {
    let Arguments {} = Arguments::parse();
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
    // Credentials pass through: no core dump, and no other process may look inside.
    prctl::set_dumpable(false)?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    // A task takes some ten descriptors; 1,024, which is the usual soft limit, are few.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    plugin::serve(std::io::stdout()).await
}
