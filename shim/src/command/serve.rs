//! `polydev-shim serve`

use std::{path::PathBuf, process::ExitCode, sync::Arc, time::Duration};

use polydev_cli::tls_files;
use polydev_shim::audit::chain::Key;
use polydev_shim::{
    engine,
    nomad::{self, Nomad},
    pool::{Heard, View, drained, follow},
    rate::Rates,
    run::queue::PerUser,
    service,
    tools::Tools,
};
use polydev_transport::tls::{Callers, Files, GRPC, Trust};
use sd_notify::NotifyState;

use super::{
    telemetry::{self, Telemetry, show},
    tell_systemd,
};

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// TOML file with these options, with `_` for `-`. Options override environment variables,
    /// which override the file.
    #[arg(long, env = "POLYDEV_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    listen: super::Listen,
    #[command(flatten)]
    nomad: nomad::Settings,
    /// The certificate that this shim presents to drivers on other nodes, in PEM. [default: the
    /// files of --tls-cert, --tls-key and --tls-ca]
    #[arg(long, env = "POLYDEV_NODE_TLS_CERT", value_name = "FILE", requires_all = ["node_tls_key", "node_tls_ca"])]
    node_tls_cert: Option<PathBuf>,
    /// The private key of --node-tls-cert, in PEM.
    #[arg(
        long,
        env = "POLYDEV_NODE_TLS_KEY",
        value_name = "FILE",
        requires = "node_tls_cert"
    )]
    node_tls_key: Option<PathBuf>,
    /// Certificates of the authorities that sign drivers' certificates, in PEM.
    #[arg(
        long,
        env = "POLYDEV_NODE_TLS_CA",
        value_name = "FILE",
        requires = "node_tls_cert"
    )]
    node_tls_ca: Option<PathBuf>,
    #[command(flatten)]
    policy: super::policy::Rules,
    #[command(flatten)]
    per_user: PerUser,
    #[command(flatten)]
    rates: Rates,
    /// Seconds that runs may continue with their callers after the shim gets SIGTERM or SIGINT.
    /// Then the shim asks callers to attach through another shim.
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    stop_timeout: u32,
    #[command(flatten)]
    telemetry: telemetry::Reported,
    #[command(flatten)]
    vault: super::Vault,
    /// Slots of one provider that may be on order from Nomad at a time, for runs that find no
    /// idle slot; 0 orders none.
    #[arg(long, value_name = "SLOTS", default_value_t = 20)]
    on_demand: usize,
}

impl Arguments {
    pub(super) fn telemetry(&self) -> anyhow::Result<Telemetry> {
        self.telemetry.open(&self.listen.shown())
    }

    /// Reads the files that the arguments name, without further effects.
    pub(super) fn check(&self) -> anyhow::Result<()> {
        Nomad::new(self.nomad.clone())?;
        self.vault.open()?;
        self.listen.access()?;
        self.listen.tokens()?;
        self.policy.load()?;
        self.policy.signer()?;
        self.policy.webhook()?;
        self.telemetry.check()?;
        if let Some(key) = &self.listen.audit_key_file {
            Key::read(key)?;
        }
        let node = self.node_files();
        self.listen.check()?;
        if let Some(files) = self.listen.files() {
            files.server(&[GRPC], Callers::Certified)?;
        }
        if let Some(files) = node {
            Trust::Mutual(files).client()?;
        }
        Ok(())
    }

    fn node_files(&self) -> Option<Files> {
        let Self {
            node_tls_cert: certificate,
            node_tls_key: key,
            node_tls_ca: authority,
            ..
        } = self;
        tls_files(certificate, key, authority).or_else(|| self.listen.files())
    }
}

pub(super) async fn execute(
    arguments: Arguments,
    telemetry: &Telemetry,
) -> anyhow::Result<ExitCode> {
    let nomad = Nomad::new(arguments.nomad.clone())?;
    let vault = Arc::new(arguments.vault.open()?);
    let access = arguments.listen.access()?;
    let policy = Arc::new(arguments.policy.load()?);
    let signer = arguments.policy.signer()?;
    let audit = arguments.listen.audit()?;
    let approvals = arguments.policy.approvals(&audit);
    let webhook = arguments.policy.webhook()?;
    let tokens = arguments.listen.tokens()?;
    let shown = telemetry.listen().await?;

    let stop = super::stop_signal()?;
    let listeners = arguments.listen.bind(tokens.as_ref()).await?;
    let view = View::new();
    let cluster = engine::nomad::Cluster::default();
    let (drivers, drained) = (cluster.drivers.subscribe(), cluster.drained.subscribe());
    tracing::info!(
        config = arguments.config.as_deref().map(tracing::field::debug),
        listen = arguments.listen.shown(),
        nomad = arguments.nomad.address,
        "serving"
    );
    tell_systemd(NotifyState::Ready);
    let limits = service::Limits {
        per_user: arguments.per_user,
        rates: arguments.rates,
        stop: Duration::from_secs(arguments.stop_timeout.into()),
        on_demand: arguments.on_demand,
    };
    let node_files = arguments.node_files().map(Trust::Mutual);
    let heard = Heard {
        vault: vault.clone(),
        tools: Tools {
            policy: policy.clone(),
            audit: audit.clone(),
            approvals: approvals.clone(),
        },
    };
    let news = approvals.news();
    let parts = service::Parts {
        view: view.clone(),
        nomad: Some(nomad.clone()),
        vault,
        access,
        policy,
        signer,
        approvals,
        audit,
        tokens,
        traces: telemetry.traces.clone(),
        metrics: telemetry.metrics.clone(),
        limits,
    };
    let serving = tokio::select! {
        serving = service::serve(parts, listeners, stop) => serving,
        () = engine::nomad::discover(nomad, cluster) => unreachable!("it never ends"),
        () = follow(view.clone(), drivers, node_files, heard) => unreachable!("it ends after its sender, which never does"),
        () = show(shown) => unreachable!("it never ends"),
        () = webhook.tell(news) => unreachable!("it ends after its sender, which never does"),
        () = drained::end_runs(view, drained) => unreachable!("it ends after its sender, which never does"),
    };
    serving.map(|()| ExitCode::SUCCESS)
}
