//! `polydev-shim dev`

use std::{path::PathBuf, process::ExitCode, sync::Arc, time::Duration};

use anyhow::Context;
use polydev_proto::{
    egress::{INTERNET, Rule},
    provider::{NoVendor, Provider, Unknown, Vendor},
    upstream,
};
use polydev_shim::{
    engine::embedded::{Engine, Settings},
    pool::{Heard, View, follow},
    rate::Rates,
    run::queue::PerUser,
    service,
    tools::Tools,
};

use super::telemetry::{self, Telemetry, show};

#[derive(clap::Args)]
pub(super) struct Arguments {
    #[command(flatten)]
    listen: super::Listen,
    /// Warm slots to keep, 0 to 100 per provider; may be repeated. [default: one of
    /// each provider with a model]
    #[arg(long = "pool", value_name = "PROVIDER=COUNT", value_parser = pool)]
    pools: Vec<(Provider, u32)>,
    /// Send a pool's model requests to another server than the provider's API: HTTPS, or HTTP
    /// on this machine; may be repeated.
    #[arg(long = "base-url", value_name = "PROVIDER=URL", value_parser = base_url)]
    base_urls: Vec<(Vendor, String)>,
    /// What a pool's containers may reach beside their model: HOST or HOST:PORT, with a name,
    /// `*.NAME`, an address or a network; nothing after `=` allows nothing; may be repeated.
    /// [default: all public addresses; for python nothing]
    #[arg(long, value_name = "PROVIDER=HOST,...", value_parser = egress)]
    egress: Vec<(Provider, Vec<String>)>,
    /// Start the provider's CLI, or a Python, in every idle slot, where it waits for a prompt or a
    /// script.
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    agents: bool,
    /// Let each call of a tool of an agent's model wait for a decision of `--policy`.
    #[arg(long)]
    tool_policy: bool,
    /// The driver's program. [default: nomad-driver-polydev in the folder of this program]
    #[arg(long)]
    driver: Option<PathBuf>,
    /// Folder for the driver's state.
    #[arg(long, default_value = "/var/lib/polydev-dev")]
    state_dir: PathBuf,
    #[command(flatten)]
    policy: super::policy::Rules,
    #[command(flatten)]
    per_user: PerUser,
    #[command(flatten)]
    rates: Rates,
    #[command(flatten)]
    telemetry: telemetry::Reported,
    #[command(flatten)]
    vault: super::Vault,
}

/// How long runs may continue after the stop signal. Then the driver ends them.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
/// Docker's bridge has addresses for a few hundred containers.
const MAX_SLOTS: u32 = 100;

fn pool(text: &str) -> Result<(Provider, u32), String> {
    let form = || format!("`{text}` must have the form PROVIDER=COUNT, such as anthropic=2");
    let (provider, count) = text.split_once('=').ok_or_else(form)?;
    let provider = provider
        .parse()
        .map_err(|error: Unknown| error.to_string())?;
    let count = count.parse().map_err(|_| form())?;
    if count > MAX_SLOTS {
        return Err(format!("`{count}` slots: allowed are 0 to {MAX_SLOTS}"));
    }
    Ok((provider, count))
}

fn base_url(text: &str) -> Result<(Vendor, String), String> {
    let form = "must have the form PROVIDER=URL, such as anthropic=https://gateway.example";
    let (provider, url) = text.split_once('=').ok_or(format!("`{text}` {form}"))?;
    let provider = provider
        .parse()
        .map_err(|error: NoVendor| error.to_string())?;
    let url = upstream::base_url(url).map_err(|error| format!("`{url}` {error}"))?;
    Ok((provider, url))
}

fn egress(text: &str) -> Result<(Provider, Vec<String>), String> {
    let form = "must have the form PROVIDER=HOST,..., such as anthropic=*.github.com:443";
    let (provider, hosts) = text.split_once('=').ok_or(format!("`{text}` {form}"))?;
    let provider = provider
        .parse()
        .map_err(|error: Unknown| error.to_string())?;
    let hosts: Vec<String> = (hosts.split(','))
        .filter(|host| !host.is_empty())
        .map(str::to_owned)
        .collect();
    if hosts != [INTERNET] {
        for host in &hosts {
            let rule = host.parse::<Rule>();
            rule.map_err(|error| format!("`{host}` {error}"))?;
        }
    }
    Ok((provider, hosts))
}

impl Arguments {
    pub(super) fn telemetry(&self) -> anyhow::Result<Telemetry> {
        self.telemetry.open(&self.listen.shown())
    }
}

pub(super) async fn execute(
    arguments: Arguments,
    telemetry: &Telemetry,
) -> anyhow::Result<ExitCode> {
    let driver = match arguments.driver {
        Some(driver) => driver,
        None => std::env::current_exe()?.with_file_name("nomad-driver-polydev"),
    };
    let mut pools = arguments.pools;
    if pools.is_empty() {
        pools = Vendor::all().map(|vendor| (vendor.into(), 1)).collect();
    }
    let vault = Arc::new(arguments.vault.open()?);
    let access = arguments.listen.access()?;
    let policy = Arc::new(arguments.policy.load()?);
    if arguments.tool_policy && !policy.is_on() {
        anyhow::bail!("`--tool-policy` needs the rules of `--policy`");
    }
    let signer = arguments.policy.signer()?;
    let audit = arguments.listen.audit()?;
    let approvals = arguments.policy.approvals(&audit);
    let webhook = arguments.policy.webhook()?;
    let tokens = arguments.listen.tokens()?;
    let shown = telemetry.listen().await?;
    let stop = super::stop_signal()?;
    let listeners = arguments.listen.bind(tokens.as_ref()).await?;

    let settings = Settings {
        driver,
        state_dir: arguments.state_dir,
        pools,
        base_urls: arguments.base_urls.into_iter().collect(),
        egress: arguments.egress.into_iter().collect(),
        agents: arguments.agents,
        tool_policy: arguments.tool_policy,
    };
    let mut engine = tokio::select! {
        engine = Engine::start(&settings) => engine.context("cannot start the engine")?,
        () = stop.cancelled() => return Ok(ExitCode::SUCCESS),
    };
    let view = View::new();
    tracing::info!(listen = arguments.listen.shown(), "serving without Nomad");
    let drivers = engine.drivers();
    let limits = service::Limits {
        per_user: arguments.per_user,
        rates: arguments.rates,
        stop: STOP_TIMEOUT,
        on_demand: 0,
    };
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
        nomad: None,
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
    let served = tokio::select! {
        served = service::serve(parts, listeners, stop) => served,
        () = show(shown) => unreachable!("it never ends"),
        () = webhook.tell(news) => unreachable!("it ends after its sender, which never does"),
        reason = engine.driver_died() => Err(anyhow::anyhow!(reason)),
        () = follow(view, drivers, None, heard) => unreachable!("the engine, which names the driver, lives on"),
    };
    tracing::info!("stopping the slots");
    engine.stop().await;
    served.map(|()| ExitCode::SUCCESS)
}
