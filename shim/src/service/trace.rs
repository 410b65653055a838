//! The caller's place in a trace, from W3C trace context headers.

use axum::http::HeaderMap;
use polydev_proto::node::TraceContext;

/// The trace context of a call over gRPC or HTTP.
pub(super) fn trace_context(headers: &HeaderMap) -> Option<TraceContext> {
    let text = |name| {
        let value = headers.get(name)?.to_str().ok()?;
        Some(value.to_owned())
    };
    let traceparent = text("traceparent")?;
    Some(TraceContext {
        traceparent,
        tracestate: text("tracestate").unwrap_or_default(),
    })
}
