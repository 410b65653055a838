//! A place in a trace, as W3C trace context has it.

use std::collections::HashMap;

use opentelemetry::{Context, propagation::TextMapPropagator};
use opentelemetry_sdk::propagation::TraceContextPropagator;

const PARENT: &str = "traceparent";
const STATE: &str = "tracestate";

/// What is below this place. Texts that name none are the beginning of a new trace.
#[must_use]
pub fn below(traceparent: String, tracestate: String) -> Context {
    let given = HashMap::from([
        (PARENT.to_owned(), traceparent),
        (STATE.to_owned(), tracestate),
    ]);
    // Of nobody else: the context of this thread is another's.
    TraceContextPropagator::new().extract_with_context(&Context::new(), &given)
}

/// The place of a context's span: `traceparent` and `tracestate`.
#[must_use]
pub fn place(context: &Context) -> (String, String) {
    let mut told = HashMap::new();
    TraceContextPropagator::new().inject_context(context, &mut told);
    let mut take = |name| told.remove(name).unwrap_or_default();
    (take(PARENT), take(STATE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_read_as_it_is_written() {
        let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let context = below(parent.into(), "vendor=1".into());
        assert_eq!(place(&context), (parent.into(), "vendor=1".into()));
        assert_eq!(place(&below("nonsense".into(), String::new())).0, "");
    }
}
