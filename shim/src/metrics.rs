//! What a shim counts and measures: for an OpenTelemetry collector, and for Prometheus.
//! `docs/metrics.md` lists it.

use std::{sync::LazyLock, time::Duration};

use opentelemetry::{
    KeyValue, global,
    metrics::{AsyncInstrument, Counter, Histogram, Meter, MeterProvider},
};
use opentelemetry_sdk::metrics::SdkMeterProvider;
use polydev_proto::{
    provider::Provider,
    runtime::{ExitReason, Exited},
};

use crate::{pool::View, run::queue::Queue};

const METER: &str = "polydev-shim";
/// Buckets in seconds, from a warm claim to the longest wait in the queue.
const WAITS: [f64; 16] = [
    0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1_800.0,
];
/// Buckets in seconds, for runs.
const RUNS: [f64; 13] = [
    0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1_800.0, 7_200.0,
];

/// The instruments. Without a reader they cost next to nothing.
#[derive(Debug, Clone)]
pub struct Metrics {
    provider: SdkMeterProvider,
    claims: Histogram<f64>,
    first_outputs: Histogram<f64>,
    times: Histogram<f64>,
    runs: Counter<u64>,
}

/// Of the whole process: errors become what callers get in one place, which knows nobody.
static REFUSALS: LazyLock<Counter<u64>> = LazyLock::new(|| {
    global::meter(METER)
        .u64_counter("polydev.shim.refusals")
        .with_unit("{call}")
        .with_description("Calls that were refused or failed, by the reason that callers got.")
        .build()
});

/// Reasons that alerts look at: a series must start at zero, or `increase` misses its first step.
const ALERTED: [&str; 4] = ["NO_MASTER_KEY", "UNKNOWN_MASTER_KEY", "NOT_OPENED", "STORE"];

/// A caller gets an error with this reason.
pub(crate) fn refused(reason: &'static str) {
    REFUSALS.add(1, &[KeyValue::new("reason", reason)]);
}

impl Metrics {
    /// Instruments of this provider, whose readers say where figures go. There should be one in a
    /// process: it becomes the provider of [`refused`].
    #[must_use]
    pub fn new(provider: SdkMeterProvider) -> Self {
        global::set_meter_provider(provider.clone());
        let meter = provider.meter(METER);
        let histogram = |name: &'static str, buckets: &[f64], description: &'static str| {
            let histogram = meter.f64_histogram(name).with_unit("s");
            let histogram = histogram.with_boundaries(buckets.to_vec());
            histogram.with_description(description).build()
        };
        let runs = meter
            .u64_counter("polydev.shim.runs")
            .with_unit("{run}")
            .with_description("Runs that callers have followed to their end, by reason.")
            .build();
        for provider in Provider::all() {
            for reason in reasons() {
                runs.add(0, &ended(provider, reason));
            }
        }
        for reason in ALERTED {
            REFUSALS.add(0, &[KeyValue::new("reason", reason)]);
        }
        Self {
            claims: histogram(
                "polydev.shim.claim.duration",
                &WAITS,
                "Time from a call to the slot of its run, waiting included.",
            ),
            first_outputs: histogram(
                "polydev.shim.first_output.duration",
                &WAITS,
                "Time from a call to the first output of its run.",
            ),
            times: histogram(
                "polydev.shim.run.duration",
                &RUNS,
                "Time from a call to the end of its run.",
            ),
            runs,
            provider,
        }
    }

    /// From now on, reports what waits, and which nodes there are.
    pub(crate) fn watch(&self, view: &View, queue: &Queue) {
        let meter = self.provider.meter(METER);
        watch_queue(&meter, queue.clone());
        let view = view.clone();
        let nodes = move |observer: &dyn AsyncInstrument<u64>| {
            let (connected, unreachable) = view.nodes();
            for (state, number) in [("connected", connected), ("unreachable", unreachable)] {
                observer.observe(number as u64, &[KeyValue::new("state", state)]);
            }
        };
        // The result is only a name: the provider keeps the callback.
        let _nodes = meter
            .u64_observable_gauge("polydev.shim.nodes")
            .with_unit("{node}")
            .with_description("Nodes of the cluster, as this shim reaches them.")
            .with_callback(nodes)
            .build();
    }

    /// A run has got its slot, so long after its call.
    pub(crate) fn claimed(&self, provider: Provider, is_warm: bool, after: Duration) {
        self.claims
            .record(after.as_secs_f64(), &of(provider, is_warm));
    }

    /// A run has ended.
    pub(crate) fn ended(&self, provider: Provider, exited: &Exited) {
        let at = |stage: &str| {
            let stage = exited.timeline.iter().find(|one| one.name == stage)?;
            Duration::try_from(stage.at?).ok()
        };
        if let Some(first) = at("first_output") {
            let attributes = of(provider, exited.warm);
            self.first_outputs.record(first.as_secs_f64(), &attributes);
        }
        if let Some(end) = at("exited") {
            let provider = KeyValue::new("provider", provider.name());
            self.times.record(end.as_secs_f64(), &[provider]);
        }
        self.runs.add(1, &ended(provider, exited.reason()));
    }

    /// Exports what is left. Blocks for five seconds if the collector does not answer.
    pub fn finish(&self) {
        // The log says already that the collector is away.
        let _away = self.provider.shutdown();
    }
}

fn watch_queue(meter: &Meter, queue: Queue) {
    let waiting = move |observer: &dyn AsyncInstrument<u64>| {
        let waiting = queue.waiting();
        // Zeros too: a queue that is empty again would keep its last number.
        for provider in Provider::all().map(Provider::name) {
            let number = waiting.get(provider).copied().unwrap_or_default();
            observer.observe(number, &[KeyValue::new("provider", provider)]);
        }
    };
    // As above.
    let _waiting = meter
        .u64_observable_gauge("polydev.shim.waiting")
        .with_unit("{run}")
        .with_description("Runs and leases that wait for a slot.")
        .with_callback(waiting)
        .build();
}

fn of(provider: Provider, is_warm: bool) -> [KeyValue; 2] {
    [
        KeyValue::new("provider", provider.name()),
        KeyValue::new("warm", is_warm),
    ]
}

/// Why runs end.
fn reasons() -> impl Iterator<Item = ExitReason> {
    (1..).map_while(|number| ExitReason::try_from(number).ok())
}

/// The reason is `exited`, `out_of_memory` and so on: the proto's name without what all have in
/// common.
fn ended(provider: Provider, reason: ExitReason) -> [KeyValue; 2] {
    let name = reason.as_str_name();
    let own = name.strip_prefix("EXIT_REASON_").unwrap_or(name);
    [
        KeyValue::new("provider", provider.name()),
        KeyValue::new("reason", own.to_ascii_lowercase()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_is_counted_from_the_start() {
        assert_eq!(reasons().count(), 10);
        let last = reasons().last().unwrap();
        assert_eq!(last, ExitReason::BudgetExhausted);
    }
}
