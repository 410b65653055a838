//! Log lines, for a collector. A program logs before it knows its collector, so [`Lines`] begin
//! with none.

use std::sync::{Arc, OnceLock};

use opentelemetry_appender_tracing::layer::{OpenTelemetryTracingBridge, TracingSpanAttributes};
use opentelemetry_sdk::{
    Resource,
    logs::{SdkLogger, SdkLoggerProvider},
};
use tracing::{
    Event, Subscriber,
    span::{Attributes, Id, Record},
};
use tracing_subscriber::{Layer, layer::Context, registry::LookupSpan};

use crate::{collector::Error, exporters::Exporters};

/// What lines are about, from the spans around them. Users are not among them.
const FIELDS: [&str; 5] = ["run_id", "slot_id", "task_id", "node_id", "provider"];
/// Whose lines are sent: ours. The exporter's own would make lines of their own.
const PREFIXES: [&str; 2] = ["polydev_", "telemetry."];
const EXPORTER: &str = "polydev_telemetry";

type Bridge = OpenTelemetryTracingBridge<SdkLoggerProvider, SdkLogger>;

/// Where lines go. Clones are the same.
#[derive(Clone, Default)]
pub struct Lines(Arc<OnceLock<(SdkLoggerProvider, Bridge)>>);

impl Lines {
    /// From now on, sends lines with the run, the slot, the task and the node of their spans. Only
    /// the first call has an effect.
    ///
    /// # Errors
    /// As of [`Exporters::spans`].
    pub fn send(&self, exporters: &Exporters, resource: Resource) -> Result<(), Error> {
        let provider = SdkLoggerProvider::builder()
            .with_batch_exporter(exporters.logs()?)
            .with_resource(resource)
            .build();
        let bridge = OpenTelemetryTracingBridge::builder(&provider)
            .with_tracing_span_attributes(TracingSpanAttributes::allowlist(FIELDS))
            .build();
        let _is_sending_already = self.0.set((provider, bridge));
        Ok(())
    }

    /// Sends the last lines. Blocks for some seconds if the collector does not answer.
    pub fn finish(&self) {
        if let Some((provider, _)) = self.0.get() {
            // The log says already that the collector is away.
            let _away = provider.shutdown();
        }
    }

    fn bridge(&self) -> Option<&Bridge> {
        self.0.get().map(|(_, bridge)| bridge)
    }
}

// No filter of tracing-subscriber's: one that comes later than the subscriber has no id there.
impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Lines {
    fn on_new_span(&self, attributes: &Attributes, id: &Id, context: Context<S>) {
        if let Some(bridge) = self.bridge() {
            bridge.on_new_span(attributes, id, context);
        }
    }

    fn on_record(&self, id: &Id, values: &Record, context: Context<S>) {
        if let Some(bridge) = self.bridge() {
            bridge.on_record(id, values, context);
        }
    }

    fn on_event(&self, event: &Event, context: Context<S>) {
        let bridge = self.bridge();
        if let Some(bridge) = bridge.filter(|_| is_sent(event.metadata().target())) {
            bridge.on_event(event, context);
        }
    }
}

fn is_sent(target: &str) -> bool {
    PREFIXES.iter().any(|prefix| target.starts_with(prefix)) && !target.starts_with(EXPORTER)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_about_the_export_are_not_exported() {
        assert!(is_sent("polydev_driver::slot") && is_sent("telemetry.sandbox"));
        assert!(!is_sent("polydev_telemetry::watched") && !is_sent("h2::client"));
    }
}
