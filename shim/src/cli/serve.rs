//! `polydev-shim serve`

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context;
use zeroize::Zeroizing;

use crate::{
    address::{Address, DEFAULT},
    engine,
    nomad::Nomad,
    pool::{View, drained, follow},
    run::queue::PerUser,
    service,
};

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// Where to listen: unix:///PATH or http://127.0.0.1:PORT.
    #[arg(long, env = "POLYDEV_ADDRESS", default_value = DEFAULT)]
    listen: Address,
    /// A Nomad agent.
    #[arg(long, env = "NOMAD_ADDR", default_value = "http://127.0.0.1:4646")]
    nomad_addr: String,
    /// File with Nomad's token; the variable NOMAD_TOKEN is read without it.
    #[arg(long)]
    nomad_token_file: Option<PathBuf>,
    #[command(flatten)]
    per_user: PerUser,
    /// Slots that may be on order from Nomad at a time, for runs that find none idle.
    #[arg(long, value_name = "SLOTS", default_value_t = 20)]
    on_demand: usize,
}

pub(super) async fn execute(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let token = match &arguments.nomad_token_file {
        Some(path) => Some(
            std::fs::read_to_string(path)
                .with_context(|| format!("cannot read --nomad-token-file `{}`", path.display()))?,
        ),
        None => std::env::var("NOMAD_TOKEN")
            .ok()
            .filter(|token| !token.is_empty()),
    };
    let token = token.map(|token| Zeroizing::new(token.trim().to_owned()));
    let nomad = Nomad::new(&arguments.nomad_addr, token)?;

    let stop = super::stop_signal()?;
    let listener = arguments.listen.listen().await;
    let listener = listener.with_context(|| format!("cannot listen at {}", arguments.listen))?;
    let view = View::new();
    let cluster = engine::nomad::Cluster::default();
    let (drivers, drained) = (cluster.drivers.subscribe(), cluster.drained.subscribe());
    tracing::info!(listen = %arguments.listen, nomad = arguments.nomad_addr, "serving");
    let limits = service::Limits {
        per_user: arguments.per_user,
        on_demand: arguments.on_demand,
    };
    let serving = tokio::select! {
        serving = service::serve(view.clone(), Some(nomad.clone()), limits, listener, stop) => serving,
        () = engine::nomad::discover(nomad, cluster) => unreachable!("it never ends"),
        () = follow(view.clone(), drivers) => unreachable!("it ends after its sender, which never does"),
        () = drained::end_runs(view, drained) => unreachable!("it ends after its sender, which never does"),
    };
    serving.map(|()| ExitCode::SUCCESS)
}
