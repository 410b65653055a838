//! Where the plugin exports traces, metrics and logs, and where its metrics can be fetched.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use polydev_telemetry::collector::{self, Collector};
use polydev_transport::address::Address;
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
        let interval = duration_within(
            "telemetry.interval",
            text(self.interval.clone()),
            10 * SECOND,
            [SECOND, 60 * SECOND],
        )?;
        let metrics_listen = text(self.metrics_listen.clone());
        let metrics_listen = metrics_listen.map(|given| match given.parse() {
            Ok(Address::Loopback(address)) => Ok(address),
            _ => {
                let allowed = "must be http://127.0.0.1:PORT or http://[::1]:PORT";
                Err(refused("telemetry.metrics_listen", given, allowed))
            }
        });
        let telemetry = Telemetry {
            metrics_listen: metrics_listen.transpose()?,
            collector: self.collector()?,
            interval,
        };
        if telemetry.collector.is_none() && telemetry.metrics_listen.is_none() {
            let allowed = "is required, or `telemetry.metrics_listen`";
            return Err(refused("telemetry.otlp_endpoint", "", allowed));
        }
        Ok(telemetry)
    }

    fn collector(self) -> Result<Option<Collector>, Error> {
        let path = |field: &str, given: Option<String>| -> Result<Option<PathBuf>, Error> {
            let given = text(given).map(|given| absolute(field, &given));
            given.transpose()
        };
        let protocol = text(self.otlp_protocol).unwrap_or_default();
        let protocol = match &*protocol {
            "" => Ok(collector::Protocol::default()),
            given => given.parse().map_err(named),
        };
        let others = (
            protocol?,
            path("telemetry.otlp_ca", self.otlp_ca)?,
            path("telemetry.otlp_headers_file", self.otlp_headers_file)?,
        );
        let (protocol, authority, headers) = others;
        let Some(endpoint) = text(self.otlp_endpoint) else {
            return match authority.as_ref().or(headers.as_ref()) {
                None => Ok(None),
                Some(_) => Err(refused(
                    "telemetry.otlp_endpoint",
                    "",
                    "is required with `otlp_ca` and `otlp_headers_file`",
                )),
            };
        };
        let collector = Collector {
            endpoint,
            protocol,
            authority,
            headers,
        };
        collector.check().map_err(named)?;
        Ok(Some(collector))
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
