//! Where the plugin exports traces, metrics and logs, and where its metrics can be fetched.

use std::{net::SocketAddr, time::Duration};

use polydev_telemetry::{
    collector::{self, Collector},
    scrape,
};
use serde::Deserialize;

use super::{
    Error,
    value::{absolute, duration_within, refused, text},
};

/// The collector, how often the driver exports to it, and where Prometheus comes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Telemetry {
    pub collector: Option<Collector>,
    /// Time between two exports of metrics.
    pub interval: Duration,
    /// An address of this machine that serves `/metrics`.
    pub metrics_listen: Option<SocketAddr>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawTelemetry {
    otlp_endpoint: Option<String>,
    otlp_protocol: Option<String>,
    otlp_ca: Option<String>,
    otlp_headers_file: Option<String>,
    interval: Option<String>,
    metrics_listen: Option<String>,
}

impl RawTelemetry {
    pub(super) fn check(self) -> Result<Telemetry, Error> {
        const SECOND: Duration = Duration::from_secs(1);
        let metrics_listen = text(self.metrics_listen).map(|given| {
            let address = scrape::address(&given);
            address.map_err(|allowed| refused("telemetry.metrics_listen", given, allowed))
        });
        let path = |field: &str, given: Option<String>| {
            let given = text(given).map(|given| absolute(field, &given));
            given.transpose()
        };
        let protocol = text(self.otlp_protocol).map(|given| given.parse().map_err(named));
        let protocol = protocol.transpose()?.unwrap_or_default();
        let authority = path("telemetry.otlp_ca", self.otlp_ca)?;
        let headers = path("telemetry.otlp_headers_file", self.otlp_headers_file)?;
        let metrics_listen = metrics_listen.transpose()?;
        let is_alone = authority.is_none() && headers.is_none() && metrics_listen.is_some();
        let collector = match text(self.otlp_endpoint) {
            None if is_alone => None,
            given => {
                let collector = Collector {
                    endpoint: given.unwrap_or_default(),
                    protocol,
                    authority,
                    headers,
                };
                collector.check().map_err(named)?;
                Some(collector)
            }
        };
        Ok(Telemetry {
            collector,
            interval: duration_within(
                "telemetry.interval",
                text(self.interval),
                10 * SECOND,
                [SECOND, 60 * SECOND],
            )?,
            metrics_listen,
        })
    }
}

/// The error, with the field as the plugin's options name it.
fn named(error: collector::Error) -> Error {
    match error {
        collector::Error::Invalid {
            field,
            given,
            allowed,
        } => refused(format!("telemetry.{field}"), given, allowed),
        collector::Error::File {
            field,
            path,
            source,
        } => refused(
            format!("telemetry.{field}"),
            path.display(),
            source.to_string(),
        ),
        collector::Error::Exporter { endpoint, source } => {
            refused("telemetry.otlp_endpoint", endpoint, source.to_string())
        }
    }
}
