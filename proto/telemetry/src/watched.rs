//! Says in the log, once, when a collector takes nothing, and when it does again.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    logs::{LogBatch, LogExporter},
    metrics::{Temporality, data::ResourceMetrics, exporter::PushMetricExporter},
    trace::{SpanData, SpanExporter},
};
use polydev_proto::error::chain;

/// An exporter whose failures are logged.
#[derive(Debug)]
pub struct Watched<E> {
    exporter: E,
    signal: &'static str,
    endpoint: String,
    is_failing: AtomicBool,
}

impl<E> Watched<E> {
    pub(crate) fn new(exporter: E, signal: &'static str, endpoint: String) -> Self {
        Self {
            exporter,
            signal,
            endpoint,
            is_failing: AtomicBool::new(false),
        }
    }

    fn saw(&self, result: OTelSdkResult) -> OTelSdkResult {
        let was_failing = self.is_failing.swap(result.is_err(), Ordering::Relaxed);
        let Self {
            signal, endpoint, ..
        } = self;
        match &result {
            Err(error) if !was_failing => {
                let error = chain(error);
                tracing::warn!(endpoint, error, "the collector does not accept {signal}");
            }
            Ok(()) if was_failing => {
                tracing::info!(endpoint, "the collector accepts {signal} again");
            }
            Ok(()) | Err(_) => {}
        }
        result
    }
}

impl<E: SpanExporter> SpanExporter for Watched<E> {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        self.saw(self.exporter.export(batch).await)
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

impl<E: LogExporter> LogExporter for Watched<E> {
    async fn export(&self, batch: LogBatch<'_>) -> OTelSdkResult {
        self.saw(self.exporter.export(batch).await)
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

impl<E: PushMetricExporter> PushMetricExporter for Watched<E> {
    async fn export(&self, metrics: &ResourceMetrics) -> OTelSdkResult {
        self.saw(self.exporter.export(metrics).await)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn temporality(&self) -> Temporality {
        self.exporter.temporality()
    }
}
