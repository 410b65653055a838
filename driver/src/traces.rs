//! A node's part of the trace of each run: one span, below the shim's, from the claim to the end.

use std::{
    sync::OnceLock,
    time::{Instant, SystemTime},
};

use opentelemetry::{
    KeyValue,
    trace::{Span, SpanBuilder, SpanKind, TracerProvider},
};
use opentelemetry_sdk::{
    Resource,
    trace::{SdkTracer, SdkTracerProvider},
};
use polydev_proto::{
    id::{RunId, SlotId},
    init::TraceContext,
};
use polydev_telemetry::{collector::Error, context, exporters::Exporters};

/// Of this process, which has one collector.
static EXPORTED: OnceLock<(SdkTracerProvider, SdkTracer)> = OnceLock::new();

/// From now on, exports spans. Only the first call has an effect.
///
/// # Errors
/// If OpenTelemetry's variables in the environment are wrong.
pub(crate) fn export(exporters: &Exporters, resource: Resource) -> Result<(), Error> {
    let provider = SdkTracerProvider::builder()
        .with_batch_exporter(exporters.spans()?)
        .with_resource(resource)
        .build();
    let tracer = provider.tracer("nomad-driver-polydev");
    let _is_exporting_already = EXPORTED.set((provider, tracer));
    Ok(())
}

/// Exports what is left. Blocks for five seconds if the collector does not answer.
pub(crate) fn finish() {
    if let Some((provider, _)) = EXPORTED.get() {
        // The log says already that the collector is away.
        let _away = provider.shutdown();
    }
}

/// A run that has its slot.
#[derive(Debug, Clone)]
pub(crate) struct Traced {
    /// What the claim said; without it there is no trace.
    pub(crate) parent: Option<TraceContext>,
    pub(crate) arrived: Instant,
    pub(crate) run_id: RunId,
    pub(crate) slot_id: SlotId,
}

impl Traced {
    /// The run has ended; `parked` if an agent that was waiting had it.
    pub(crate) fn end(self, parked: bool) {
        let (Some((_, tracer)), Some(parent)) = (EXPORTED.get(), self.parent) else {
            return;
        };
        let TraceContext {
            traceparent,
            tracestate,
        } = parent;
        let now = SystemTime::now();
        let mut span = SpanBuilder::from_name("run on node")
            .with_kind(SpanKind::Server)
            .with_start_time(now - self.arrived.elapsed())
            .with_attributes([
                KeyValue::new("polydev.run.id", self.run_id.to_string()),
                KeyValue::new("polydev.slot.id", self.slot_id.to_string()),
                KeyValue::new("polydev.agent.parked", parked),
            ])
            .start_with_context(tracer, &context::below(traceparent, tracestate));
        span.end_with_timestamp(now);
    }
}
