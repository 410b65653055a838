//! Where the driver's traces, metrics and log lines go, if the plugin's options name a collector or
//! an address for Prometheus.

use std::{error::Error, net::SocketAddr, time::Duration};

use opentelemetry_sdk::metrics::{PeriodicReader, SdkMeterProvider};
use polydev_telemetry::{
    exporters::Exporters,
    finish, resource,
    scrape::{self, Shown},
};
use polydev_transport::backoff::Backoff;
use tokio::{net::TcpListener, time::sleep};

use crate::{chain, config, logging, traces};

const SERVICE: &str = "nomad-driver-polydev";
/// The pause before the next try to listen: the first, and the largest.
const BIND_INTERVAL: Duration = Duration::from_millis(200);
const MAX_BIND_INTERVAL: Duration = Duration::from_secs(10);
/// Time for the last exports, when the driver stops.
const FINISH_TIMEOUT: Duration = Duration::from_millis(500);

/// What exports.
#[derive(Debug, Default)]
pub struct Telemetry(Option<SdkMeterProvider>);

impl Telemetry {
    /// Starts the export; requires a runtime. `instance` is the driver's id on this node. A
    /// failure is only logged: slots are more important than telemetry.
    #[must_use]
    pub fn open(options: Option<&config::Telemetry>, instance: &str) -> Self {
        let opened = options.map(|options| open(options, instance));
        Self(opened.transpose().unwrap_or_else(|error| {
            let error = chain(&*error);
            tracing::error!(
                error,
                "exporting nothing: check `telemetry` and the OTEL_* variables"
            );
            None
        }))
    }

    /// The provider of instruments, if somebody is told of them.
    #[must_use]
    pub fn meters(&self) -> Option<SdkMeterProvider> {
        self.0.clone()
    }

    /// Exports for the last time. Takes at most half a second.
    pub async fn finish(&self) {
        let Some(meters) = self.0.clone() else {
            return;
        };
        let finished = tokio::task::spawn_blocking(move || {
            // The log already says that the collector is unreachable.
            finish(
                FINISH_TIMEOUT,
                vec![
                    Box::new(move || drop(meters.shutdown())),
                    Box::new(traces::finish),
                    Box::new(|| logging::collected().finish()),
                ],
            );
        });
        let _it_does_not_panic = finished.await;
    }
}

fn open(
    options: &config::Telemetry,
    instance: &str,
) -> Result<SdkMeterProvider, Box<dyn Error + Send + Sync>> {
    let resource = resource(SERVICE, env!("CARGO_PKG_VERSION"), instance.to_owned());
    let mut meters = SdkMeterProvider::builder().with_resource(resource.clone());
    if let Some(collector) = &options.collector {
        let exporters = Exporters::new(collector)?;
        let reader = PeriodicReader::builder(exporters.metrics()?);
        meters = meters.with_reader(reader.with_interval(options.interval).build());
        traces::export(&exporters, resource.clone())?;
        logging::collected().send(&exporters, resource)?;
    }
    if let Some(address) = options.metrics_listen {
        let shown = Shown::default();
        meters = meters.with_reader(shown.reader()?);
        tokio::spawn(show(address, shown));
    }
    Ok(meters.build())
}

/// Shows metrics at an address, as soon as it is free: an earlier driver may still have it.
async fn show(address: SocketAddr, shown: Shown) {
    let mut pauses = Backoff::new(BIND_INTERVAL, MAX_BIND_INTERVAL);
    let mut is_told = false;
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => return scrape::serve(listener, shown).await,
            Err(error) if !is_told => {
                tracing::warn!(%address, %error, "cannot listen at `telemetry.metrics_listen`, retrying");
                is_told = true;
            }
            Err(_) => {}
        }
        sleep(pauses.next_wait()).await;
    }
}
