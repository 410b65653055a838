//! What is counted of the node's slots, told to an OpenTelemetry collector, if the plugin's
//! options name one. `docs/metrics.md` lists it.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use opentelemetry::{
    KeyValue,
    metrics::{AsyncInstrument, Histogram, MeterProvider},
};
use opentelemetry_otlp::{ExporterBuildError, MetricExporter, WithExportConfig};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    metrics::{
        PeriodicReader, SdkMeterProvider, Temporality, data::ResourceMetrics,
        exporter::PushMetricExporter,
    },
};

use crate::{
    chain,
    config::Telemetry,
    node::Node,
    slot::{
        Slot,
        state::{Life, State},
    },
};

const SERVICE: &str = "nomad-driver-polydev";
/// Seconds: from a claim that ends at once to a run of hours.
const TIMES: [f64; 14] = [
    0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1_800.0, 7_200.0,
];

/// The exporter refuses the options.
#[derive(Debug, thiserror::Error)]
#[error("cannot tell a collector at `telemetry.otlp_endpoint`")]
pub struct Error(#[from] ExporterBuildError);

/// The instruments. Without a collector they count nothing.
#[derive(Debug)]
pub struct Metrics {
    provider: SdkMeterProvider,
    steps: Steps,
}

impl Metrics {
    /// Begins to tell the collector, within a runtime. `instance` is the driver's on this node.
    ///
    /// # Errors
    /// [`Error`]; a collector that is away is none.
    pub fn new(telemetry: Option<&Telemetry>, instance: &str) -> Result<Self, Error> {
        let provider = match telemetry {
            None => SdkMeterProvider::default(),
            Some(telemetry) => {
                let exporter = MetricExporter::builder()
                    .with_tonic()
                    .with_endpoint(&telemetry.otlp_endpoint)
                    .build()?;
                let exporter = Watched {
                    exporter,
                    endpoint: telemetry.otlp_endpoint.clone(),
                    is_failing: AtomicBool::new(false),
                };
                let reader = PeriodicReader::builder(exporter)
                    .with_interval(telemetry.interval)
                    .build();
                let resource = Resource::builder()
                    .with_service_name(SERVICE)
                    .with_attributes([
                        KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
                        KeyValue::new("service.instance.id", instance.to_owned()),
                    ])
                    .build();
                SdkMeterProvider::builder()
                    .with_reader(reader)
                    .with_resource(resource)
                    .build()
            }
        };
        let times = provider
            .meter(SERVICE)
            .f64_histogram("polydev.slot.state.duration")
            .with_unit("s")
            .with_description("How long slots were in a state, by what ended it.")
            .with_boundaries(TIMES.into())
            .build();
        Ok(Self {
            provider,
            steps: Steps(times),
        })
    }

    /// Counts the slots of the node from now on.
    pub fn watch(&self, node: &Arc<Node>) {
        let node = Arc::downgrade(node);
        let count = move |observer: &dyn AsyncInstrument<i64>| {
            let Some(node) = node.upgrade() else { return };
            for ((provider, on_demand), states) in count(&node.slots.all()) {
                for (state, number) in states {
                    let attributes = [
                        KeyValue::new("provider", provider.clone()),
                        KeyValue::new("state", state),
                        KeyValue::new("on_demand", on_demand),
                    ];
                    observer.observe(number, &attributes);
                }
            }
        };
        // What it gives is only its name: the callback stays with the provider.
        let _slots = self
            .provider
            .meter(SERVICE)
            .i64_observable_up_down_counter("polydev.slots")
            .with_unit("{slot}")
            .with_description("Slots of the node.")
            .with_callback(count)
            .build();
    }

    /// What a slot tells its steps to.
    #[must_use]
    pub fn steps(&self) -> Steps {
        self.steps.clone()
    }
}

/// Slots by provider, whether they are on demand, and state; zeros too, so that a state that
/// no slot is in any more is told as such.
fn count(slots: &[Arc<Slot>]) -> BTreeMap<(String, bool), BTreeMap<&'static str, i64>> {
    let mut counts = BTreeMap::new();
    for slot in slots.iter().filter(|slot| slot.end().is_none()) {
        let pool = (slot.config.provider.clone(), slot.is_on_demand());
        let none = || State::NAMES.map(|name| (name, 0)).into();
        let states: &mut BTreeMap<_, _> = counts.entry(pool).or_insert_with(none);
        *states.entry(slot.life().state().name()).or_default() += 1;
    }
    counts
}

/// Counts the steps of slots, with the time that passed before each.
#[derive(Debug, Clone)]
pub struct Steps(Histogram<f64>);

impl Steps {
    /// `slot` has gone from `last` to `next`.
    pub fn taken(&self, slot: &Slot, last: &Life, next: &Life) {
        // A clock that was set back has seen no time pass.
        let time = next.since().duration_since(last.since());
        let attributes = [
            KeyValue::new("provider", slot.config.provider.clone()),
            KeyValue::new("state", last.state().name()),
            KeyValue::new("next", next.state().name()),
            KeyValue::new("cause", next.cause()),
            KeyValue::new("on_demand", slot.is_on_demand()),
        ];
        self.0
            .record(time.unwrap_or_default().as_secs_f64(), &attributes);
    }
}

/// Says once that the collector does not take what it is told, and once that it does again.
#[derive(Debug)]
struct Watched {
    exporter: MetricExporter,
    endpoint: String,
    is_failing: AtomicBool,
}

impl PushMetricExporter for Watched {
    async fn export(&self, metrics: &ResourceMetrics) -> OTelSdkResult {
        let result = self.exporter.export(metrics).await;
        let endpoint = &self.endpoint;
        match (&result, self.is_failing.load(Ordering::Relaxed)) {
            (Err(error), false) => {
                let error = chain(error);
                tracing::warn!(
                    endpoint,
                    error,
                    "the collector takes no metrics; tried again"
                );
            }
            (Ok(()), true) => tracing::info!(endpoint, "the collector takes metrics again"),
            (Err(_), true) | (Ok(()), false) => {}
        }
        self.is_failing.store(result.is_err(), Ordering::Relaxed);
        result
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
