//! A trace of each run, for an OpenTelemetry collector: a span of the run, and a span of each stage
//! of its timeline. The command of the run gets the run's span as its parent.

use std::{
    fmt,
    time::{Duration, Instant, SystemTime},
};

use opentelemetry::{
    Context, KeyValue,
    trace::{Span, SpanBuilder, SpanKind, Status, TraceContextExt, TracerProvider},
};
use opentelemetry_sdk::{
    Resource,
    trace::{SdkTracer, SdkTracerProvider},
};
use polydev_proto::{
    id::RunId,
    node::TraceContext,
    provider::Provider,
    runtime::{ExitReason, Exited},
};
use polydev_telemetry::{collector::Error, context, exporters::Exporters};

const TRACER: &str = "polydev-shim";

/// Where traces go, if anywhere.
#[derive(Clone, Default)]
pub struct Traces(Option<Exported>);

#[derive(Clone)]
struct Exported {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
}

/// The trace of a run that has not ended.
pub struct Trace {
    tracer: SdkTracer,
    /// Has the run's span.
    context: Context,
    begun: SystemTime,
}

impl fmt::Debug for Traces {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Traces").field(&self.0.is_some()).finish()
    }
}

impl Traces {
    /// Begins to export, with these exporters; nothing without. Spans that the collector does not
    /// take are dropped, at most 2,048 wait.
    ///
    /// # Errors
    /// If OpenTelemetry's variables in the environment are wrong.
    pub fn new(exporters: Option<&Exporters>, resource: Resource) -> Result<Self, Error> {
        let Some(exporters) = exporters else {
            return Ok(Self(None));
        };
        let provider = SdkTracerProvider::builder()
            .with_batch_exporter(exporters.spans()?)
            .with_resource(resource)
            .build();
        let tracer = provider.tracer(TRACER);
        Ok(Self(Some(Exported { provider, tracer })))
    }

    /// Begins the trace of a run, below the caller's. Returns what the command gets as its context,
    /// which is the caller's if nothing is exported.
    pub(crate) fn begin(
        &self,
        caller: Option<TraceContext>,
        received: Instant,
        run_id: RunId,
        provider: Provider,
    ) -> (Option<TraceContext>, Option<Trace>) {
        let Some(exported) = &self.0 else {
            return (caller, None);
        };
        let tracer = exported.tracer.clone();
        let TraceContext {
            traceparent,
            tracestate,
        } = caller.unwrap_or_default();
        let parent = context::below(traceparent, tracestate);
        let begun = SystemTime::now() - received.elapsed();
        let span = SpanBuilder::from_name("run")
            .with_kind(SpanKind::Server)
            .with_start_time(begun)
            .with_attributes([
                KeyValue::new("polydev.run.id", run_id.to_string()),
                KeyValue::new("polydev.provider", provider.name()),
            ])
            .start_with_context(&tracer, &parent);
        let context = parent.with_span(span);
        let (traceparent, tracestate) = context::place(&context);
        let command = TraceContext {
            traceparent,
            tracestate,
        };
        let trace = Trace {
            tracer,
            context,
            begun,
        };
        (Some(command), Some(trace))
    }

    /// Exports what is left. Blocks for five seconds if the collector does not answer.
    pub fn finish(&self) {
        // The log says already that the collector is away.
        let _away = self.0.as_ref().map(|exported| exported.provider.shutdown());
    }
}

impl Trace {
    /// What is below the run's span.
    pub(crate) fn context(&self) -> Context {
        self.context.clone()
    }

    /// Ends the run's span, with a span of each stage before it.
    pub(crate) fn end(self, exited: &Exited) {
        let mut stages: Vec<_> = (exited.timeline.iter())
            .filter_map(|stage| {
                let at = Duration::try_from(stage.at?).ok()?;
                Some((stage.name.clone(), self.begun + at))
            })
            .collect();
        stages.sort_by_key(|(_, at)| *at);
        let mut before = self.begun;
        for (name, at) in stages {
            let mut span = SpanBuilder::from_name(name)
                .with_start_time(before)
                .start_with_context(&self.tracer, &self.context);
            span.end_with_timestamp(at);
            before = at;
        }
        let span = self.context.span();
        let reason = exited.reason();
        span.set_attribute(KeyValue::new("polydev.run.warm", exited.warm));
        span.set_attribute(KeyValue::new("polydev.run.reason", reason.as_str_name()));
        span.set_attribute(KeyValue::new(
            "process.exit.code",
            i64::from(exited.exit_code),
        ));
        if reason != ExitReason::Exited || exited.exit_code != 0 {
            // The message may name the caller's program or folder.
            span.set_status(Status::error(reason.as_str_name()));
        }
        span.end_with_timestamp(before);
    }
}

impl Trace {
    /// Ends the span of a run that has failed before its end was known.
    pub(crate) fn fail(self, code: tonic::Code) {
        let span = self.context.span();
        span.set_status(Status::error(format!("{code:?}")));
        span.end();
    }
}
