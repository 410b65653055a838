//! Where the plugin exports its metrics.

use std::time::Duration;

use polydev_transport::address::is_url;
use serde::Deserialize;

use super::{
    Error,
    value::{duration_within, refused, text},
};

/// The collector, and how often the driver exports to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Telemetry {
    /// `http://HOST:PORT` of a collector that accepts OTLP over gRPC.
    pub otlp_endpoint: String,
    pub interval: Duration,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawTelemetry {
    otlp_endpoint: Option<String>,
    interval: Option<String>,
}

impl RawTelemetry {
    pub(super) fn check(self) -> Result<Telemetry, Error> {
        const SECOND: Duration = Duration::from_secs(1);
        let given = text(self.otlp_endpoint).unwrap_or_default();
        if !is_url("http", &given) {
            let allowed = "must be http://HOST:PORT of a collector that accepts OTLP over gRPC";
            return Err(refused("telemetry.otlp_endpoint", given, allowed));
        }
        let interval = text(self.interval);
        Ok(Telemetry {
            otlp_endpoint: given,
            interval: duration_within(
                "telemetry.interval",
                interval,
                10 * SECOND,
                [SECOND, 60 * SECOND],
            )?,
        })
    }
}
