//! Where a shim sends traces, metrics and log lines, and where its metrics can be fetched.

use std::{io::IsTerminal, net::SocketAddr, path::PathBuf, time::Duration};

use anyhow::Context;
use opentelemetry_sdk::metrics::{PeriodicReader, SdkMeterProvider};
use polydev_shim::{metrics::Metrics, traces::Traces};
use polydev_telemetry::{
    collector::{Collector, Protocol},
    exporters::Exporters,
    finish,
    logs::Lines,
    resource,
    scrape::{self, Shown},
};
use tokio::net::TcpListener;
use tracing_subscriber::{EnvFilter, Layer, layer::SubscriberExt, util::SubscriberInitExt};

/// Time between two exports of metrics.
const METRICS_INTERVAL: Duration = Duration::from_secs(10);
/// Time for the last exports.
const FINISH_TIMEOUT: Duration = Duration::from_secs(2);

/// Where a shim sends what it knows of runs.
#[derive(clap::Args)]
pub(super) struct Reported {
    /// OpenTelemetry collector that gets a trace of each run, metrics and log lines:
    /// http://HOST:PORT or https://HOST:PORT. [default: none does]
    #[arg(long, env = "POLYDEV_OTLP_ENDPOINT", value_name = "URL")]
    otlp_endpoint: Option<String>,
    /// The form of OTLP: grpc or http/protobuf. With http/protobuf the endpoint may have a path.
    #[arg(
        long,
        env = "POLYDEV_OTLP_PROTOCOL",
        value_name = "PROTOCOL",
        default_value_t
    )]
    otlp_protocol: Protocol,
    /// Certificates of the authorities that sign the collector's certificate, in PEM. [default:
    /// those that this machine trusts]
    #[arg(
        long,
        env = "POLYDEV_OTLP_CA",
        value_name = "FILE",
        requires = "otlp_endpoint"
    )]
    otlp_ca: Option<PathBuf>,
    /// File with headers for the collector, such as a token: NAME: VALUE on each line. Read when
    /// the shim starts.
    #[arg(
        long,
        env = "POLYDEV_OTLP_HEADERS_FILE",
        value_name = "FILE",
        requires = "otlp_endpoint"
    )]
    otlp_headers_file: Option<PathBuf>,
    /// Where Prometheus may fetch metrics, at the path /metrics: http://127.0.0.1:PORT. [default:
    /// nowhere]
    #[arg(
        long,
        env = "POLYDEV_METRICS_LISTEN",
        value_name = "URL",
        value_parser = scrape::address
    )]
    metrics_listen: Option<SocketAddr>,
}

/// What is sent and shown while a shim serves.
pub(super) struct Telemetry {
    pub(super) traces: Traces,
    pub(super) metrics: Metrics,
    lines: Lines,
    shown: Option<(SocketAddr, Shown)>,
}

impl Reported {
    /// Checks the settings, and the files that they name.
    pub(super) fn check(&self) -> anyhow::Result<()> {
        self.collector()
            .map_or(Ok(()), |collector| Ok(collector.check()?))
    }

    /// Begins to export; needs a runtime. `instance` tells this shim from others of its host.
    pub(super) fn open(&self, instance: &str) -> anyhow::Result<Telemetry> {
        let exporters = self.collector().map(|collector| Exporters::new(&collector));
        let exporters = exporters.transpose()?;
        let host = nix::unistd::gethostname().unwrap_or_default();
        let instance = format!("{}/{instance}", host.to_string_lossy());
        let resource = resource("polydev-shim", env!("CARGO_PKG_VERSION"), instance);
        let mut meters = SdkMeterProvider::builder().with_resource(resource.clone());
        if let Some(exporters) = &exporters {
            let reader = PeriodicReader::builder(exporters.metrics()?);
            meters = meters.with_reader(reader.with_interval(METRICS_INTERVAL).build());
        }
        let shown = self.metrics_listen.map(|at| (at, Shown::default()));
        if let Some((_, shown)) = &shown {
            meters = meters.with_reader(shown.reader()?);
        }
        let lines = Lines::default();
        if let Some(exporters) = &exporters {
            lines.send(exporters, resource.clone())?;
        }
        Ok(Telemetry {
            traces: Traces::new(exporters.as_ref(), resource)?,
            metrics: Metrics::new(meters.build()),
            lines,
            shown,
        })
    }

    fn collector(&self) -> Option<Collector> {
        let endpoint = self.otlp_endpoint.clone()?;
        Some(Collector {
            endpoint,
            protocol: self.otlp_protocol,
            authority: self.otlp_ca.clone(),
            headers: self.otlp_headers_file.clone(),
        })
    }
}

impl Telemetry {
    /// Listens for those who fetch metrics.
    pub(super) async fn listen(&self) -> anyhow::Result<Option<(TcpListener, Shown)>> {
        let Some((at, shown)) = &self.shown else {
            return Ok(None);
        };
        let listener = TcpListener::bind(at).await;
        let listener = listener.with_context(|| format!("cannot show metrics at `{at}`"))?;
        Ok(Some((listener, shown.clone())))
    }

    /// Sends what is left. Takes at most two seconds.
    pub(super) fn finish(self) {
        let Self {
            traces,
            metrics,
            lines,
            ..
        } = self;
        finish(
            FINISH_TIMEOUT,
            vec![
                Box::new(move || traces.finish()),
                Box::new(move || metrics.finish()),
                Box::new(move || lines.finish()),
            ],
        );
    }
}

/// Shows metrics to whoever fetches them, forever.
pub(super) async fn show(shown: Option<(TcpListener, Shown)>) {
    match shown {
        Some((listener, shown)) => scrape::serve(listener, shown).await,
        None => std::future::pending().await,
    }
}

/// Begins to log, to stderr and, while serving, to the collector. Lines of a service that nobody
/// reads at a terminal are JSON.
pub(super) fn log(telemetry: Option<&Telemetry>) {
    let default = if telemetry.is_some() { "info" } else { "warn" };
    let filter = EnvFilter::try_from_env("POLYDEV_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    let is_terminal = std::io::stderr().is_terminal();
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let lines = match telemetry {
        Some(_) if !is_terminal => lines.json().flatten_event(true).boxed(),
        _ => lines.with_ansi(is_terminal).boxed(),
    };
    let sent = telemetry.map(|telemetry| telemetry.lines.clone());
    tracing_subscriber::registry()
        .with(filter)
        .with(lines)
        .with(sent)
        .init();
}
