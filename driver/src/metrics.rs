//! Metrics about the node's slots, exported to an OpenTelemetry collector if the plugin's
//! options name one. `docs/metrics.md` lists them.

use std::{collections::BTreeMap, error::Error, net::SocketAddr, time::Duration};

use opentelemetry::{
    KeyValue,
    metrics::{AsyncInstrument, Counter, Histogram, Meter, MeterProvider},
};
use opentelemetry_sdk::metrics::{PeriodicReader, SdkMeterProvider};
use polydev_proto::{init::Form, provider::Provider};
use polydev_telemetry::{
    exporters::Exporters,
    finish, resource,
    scrape::{self, Shown},
};
use polydev_transport::{address::Address, backoff::Backoff};
use tokio::time::sleep;

use crate::{
    chain,
    config::Telemetry,
    life::{Event, Life, State},
    logging,
    scripts::{Figures, Status},
    tokens::{ApiErrors, Used},
    traces,
};

const SERVICE: &str = "nomad-driver-polydev";
/// Buckets in seconds: from a claim that ends at once to a run of hours.
const TIMES: [f64; 14] = [
    0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1_800.0, 7_200.0,
];
/// The pause before the next try to listen: the first, and the largest.
const BIND_INTERVAL: Duration = Duration::from_millis(200);
const MAX_BIND_INTERVAL: Duration = Duration::from_secs(10);
/// Time for the last export, when the driver stops.
const FINISH_TIMEOUT: Duration = Duration::from_millis(500);

/// The instruments, if there is a collector.
#[derive(Debug, Default)]
pub struct Metrics(Option<Told>);

#[derive(Debug)]
struct Told {
    provider: SdkMeterProvider,
    steps: Instruments,
}

impl Metrics {
    /// Starts the export; requires a runtime. `instance` is the driver's id on this node. A
    /// failure is only logged: slots are more important than metrics.
    #[must_use]
    pub fn new(telemetry: Option<&Telemetry>, instance: &str) -> Self {
        let told = telemetry.map(|telemetry| Told::new(telemetry, instance));
        Self(told.transpose().unwrap_or_else(|error| {
            let error = chain(&*error);
            tracing::error!(
                error,
                "exporting no metrics: check `telemetry` and the OTEL_* variables"
            );
            None
        }))
    }

    /// From now on, reports what `counts` returns. `None` reports nothing.
    pub fn watch(&self, counts: impl Fn() -> Option<Counts> + Send + Sync + 'static) {
        let Some(Told { provider, .. }) = &self.0 else {
            return;
        };
        let observe = move |observer: &dyn AsyncInstrument<i64>| {
            let counts = counts().map(|counts| counts.0).unwrap_or_default();
            for ((provider, on_demand, state), number) in counts {
                let mut attributes = of(provider, on_demand).to_vec();
                attributes.push(KeyValue::new("state", state));
                observer.observe(number, &attributes);
            }
        };
        // The result is only a name: the provider keeps the callback.
        let _slots = provider
            .meter(SERVICE)
            .i64_observable_up_down_counter("polydev.slots")
            .with_unit("{slot}")
            .with_description("Slots of the node.")
            .with_callback(observe)
            .build();
    }

    /// From now on, reports the tokens that `used` returns, by provider and model.
    pub(crate) fn watch_tokens(
        &self,
        used: impl Fn() -> Option<BTreeMap<(String, String), Used>> + Send + Sync + 'static,
    ) {
        let Some(Told { provider, .. }) = &self.0 else {
            return;
        };
        let observe = move |observer: &dyn AsyncInstrument<u64>| {
            for ((provider, model), used) in used().unwrap_or_default() {
                for (kind, number) in [
                    ("input", used.input),
                    ("cached_input", used.cached_input),
                    ("output", used.output),
                ] {
                    let attributes = [
                        KeyValue::new("provider", provider.clone()),
                        KeyValue::new("model", model.clone()),
                        KeyValue::new("type", kind),
                    ];
                    observer.observe(number, &attributes);
                }
            }
        };
        // The result is only a name: the provider keeps the callback.
        let _tokens = provider
            .meter(SERVICE)
            .u64_observable_counter("polydev.tokens")
            .with_unit("{token}")
            .with_description("Tokens of models that runs have used, as the APIs count them.")
            .with_callback(observe)
            .build();
    }

    /// From now on, reports the answers of APIs with an error, by provider and status.
    pub(crate) fn watch_api_errors(
        &self,
        errors: impl Fn() -> Option<ApiErrors> + Send + Sync + 'static,
    ) {
        let Some(Told { provider, .. }) = &self.0 else {
            return;
        };
        let observe = move |observer: &dyn AsyncInstrument<u64>| {
            for ((provider, status), number) in errors().unwrap_or_default() {
                let attributes = [
                    KeyValue::new("provider", provider),
                    KeyValue::new("status", i64::from(status)),
                ];
                observer.observe(number, &attributes);
            }
        };
        // The result is only a name: the provider keeps the callback.
        let _errors = provider
            .meter(SERVICE)
            .u64_observable_counter("polydev.api.errors")
            .with_unit("{response}")
            .with_description("Answers of providers' APIs with an error; status 0 for none at all.")
            .with_callback(observe)
            .build();
    }

    /// From now on, reports how many images are paused because containers of them fail.
    pub(crate) fn watch_paused(&self, paused: impl Fn() -> Option<u64> + Send + Sync + 'static) {
        let Some(Told { provider, .. }) = &self.0 else {
            return;
        };
        let observe = move |observer: &dyn AsyncInstrument<u64>| {
            observer.observe(paused().unwrap_or_default(), &[]);
        };
        // As above.
        let _paused = provider
            .meter(SERVICE)
            .u64_observable_gauge("polydev.images.paused")
            .with_unit("{image}")
            .with_description("Images whose containers failed five times in a row or more.")
            .with_callback(observe)
            .build();
    }

    /// From now on, reports how scripts have ended, as `figures` returns it.
    pub(crate) fn watch_scripts(
        &self,
        figures: impl Fn() -> Option<Figures> + Clone + Send + Sync + 'static,
    ) {
        let Some(Told { provider, .. }) = &self.0 else {
            return;
        };
        let meter = provider.meter(SERVICE);
        let all = figures.clone();
        let runs = move |observer: &dyn AsyncInstrument<u64>| {
            let runs = all().unwrap_or_default().runs;
            // Zeros too, or `rate` misses the first of each.
            for status in Status::NAMES {
                let number = runs.get(status).copied().unwrap_or_default();
                observer.observe(number, &[KeyValue::new("status", status)]);
            }
        };
        let all = figures.clone();
        let errors = move |observer: &dyn AsyncInstrument<u64>| {
            let errors = all().unwrap_or_default().errors;
            for reason in Status::REASONS {
                let number = errors.get(reason).copied().unwrap_or_default();
                observer.observe(number, &[KeyValue::new("reason", reason)]);
            }
        };
        let all = figures.clone();
        let time = move |observer: &dyn AsyncInstrument<f64>| {
            observer.observe(all().unwrap_or_default().time.as_secs_f64(), &[]);
        };
        let streak = move |observer: &dyn AsyncInstrument<u64>| {
            observer.observe(figures().unwrap_or_default().failure_streak, &[]);
        };
        // The results are only names: the provider keeps the callbacks.
        let _runs = meter
            .u64_observable_counter("polydev.sandbox.runs")
            .with_unit("{run}")
            .with_description("Scripts that have ended, by status.")
            .with_callback(runs)
            .build();
        let _errors = meter
            .u64_observable_counter("polydev.sandbox.errors")
            .with_unit("{error}")
            .with_description("Scripts that could not be run, or whose end is not known.")
            .with_callback(errors)
            .build();
        let _time = meter
            .f64_observable_counter("polydev.sandbox.time")
            .with_unit("s")
            .with_description("How long scripts have run, all together.")
            .with_callback(time)
            .build();
        let _streak = meter
            .u64_observable_gauge("polydev.sandbox.failure_streak")
            .with_unit("{run}")
            .with_description("Failures and timeouts of scripts since the last success.")
            .with_callback(streak)
            .build();
    }

    /// Where a slot reports its steps.
    #[must_use]
    pub fn steps(&self) -> Steps {
        Steps(self.0.as_ref().map(|told| told.steps.clone()))
    }

    /// Exports for the last time. Takes at most half a second.
    pub async fn finish(&self) {
        let Some(Told { provider, .. }) = &self.0 else {
            return;
        };
        let provider = provider.clone();
        let finished = tokio::task::spawn_blocking(move || {
            // The log already says that the collector is unreachable.
            finish(
                FINISH_TIMEOUT,
                vec![
                    Box::new(move || drop(provider.shutdown())),
                    Box::new(traces::finish),
                    Box::new(|| logging::collected().finish()),
                ],
            );
        });
        let _it_does_not_panic = finished.await;
    }
}

impl Told {
    fn new(telemetry: &Telemetry, instance: &str) -> Result<Self, Box<dyn Error + Send + Sync>> {
        let resource = resource(SERVICE, env!("CARGO_PKG_VERSION"), instance.to_owned());
        let mut provider = SdkMeterProvider::builder().with_resource(resource.clone());
        if let Some(collector) = &telemetry.collector {
            let exporters = Exporters::new(collector)?;
            let reader = PeriodicReader::builder(exporters.metrics()?);
            provider = provider.with_reader(reader.with_interval(telemetry.interval).build());
            traces::export(&exporters, resource.clone())?;
            logging::collected().send(&exporters, resource)?;
        }
        if let Some(address) = telemetry.metrics_listen {
            let shown = Shown::default();
            provider = provider.with_reader(shown.reader()?);
            tokio::spawn(show(address, shown));
        }
        let provider = provider.build();
        let steps = Instruments::new(&provider.meter(SERVICE));
        Ok(Self { provider, steps })
    }
}

/// Shows metrics at an address, as soon as it is free: an earlier driver may still have it.
async fn show(address: SocketAddr, shown: Shown) {
    let mut pauses = Backoff::new(BIND_INTERVAL, MAX_BIND_INTERVAL);
    let mut is_told = false;
    loop {
        match scrape::listen(&Address::Loopback(address)).await {
            Ok(listener) => return scrape::serve(listener, shown).await,
            Err(error) if !is_told => {
                tracing::warn!(%address, %error, "cannot listen at `telemetry.metrics_listen`, retrying");
                is_told = true;
            }
            Err(_) => {}
        }
        sleep(pauses.next_wait()).await;
    }
}

fn of(provider: Provider, on_demand: bool) -> [KeyValue; 2] {
    [
        KeyValue::new("provider", provider.name()),
        KeyValue::new("on_demand", on_demand),
    ]
}

/// Slots by provider, whether they are on demand, and state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counts(BTreeMap<(Provider, bool, &'static str), i64>);

impl Counts {
    /// All counts zero, so that a state without slots is reported too.
    #[must_use]
    pub fn zeros() -> Self {
        let zeros = pools().flat_map(|(provider, on_demand)| {
            State::NAMES.map(|state| ((provider, on_demand, state), 0))
        });
        Self(zeros.collect())
    }

    /// Counts one slot.
    pub fn add(&mut self, provider: Provider, on_demand: bool, state: &State) {
        let of = (provider, on_demand, state.name());
        *self.0.entry(of).or_default() += 1;
    }
}

fn pools() -> impl Iterator<Item = (Provider, bool)> {
    Provider::all().flat_map(|provider| [(provider, false), (provider, true)])
}

#[derive(Debug, Clone)]
struct Instruments {
    steps: Counter<u64>,
    times: Histogram<f64>,
    prompts: Counter<u64>,
}

impl Instruments {
    fn new(meter: &Meter) -> Self {
        let steps = meter
            .u64_counter("polydev.slot.steps")
            .with_unit("{step}")
            .with_description("Steps of slots, by what led to them.")
            .build();
        // A series must start at zero, or `rate` misses its first step.
        for (provider, on_demand) in pools() {
            for cause in Event::NAMES {
                let [provider, on_demand] = of(provider, on_demand);
                steps.add(0, &[provider, on_demand, KeyValue::new("cause", cause)]);
            }
        }
        let times = meter
            .f64_histogram("polydev.slot.state.duration")
            .with_unit("s")
            .with_description("How long slots were in a state, and which one followed.")
            .with_boundaries(TIMES.into())
            .build();
        let prompts = meter
            .u64_counter("polydev.prompts")
            .with_unit("{prompt}")
            .with_description("Prompts that were started, by whether an agent had waited for them.")
            .build();
        for provider in Provider::all() {
            for agent in ["parked", "cold"] {
                let provider = KeyValue::new("provider", provider.name());
                prompts.add(0, &[provider, KeyValue::new("agent", agent)]);
            }
        }
        Self {
            steps,
            times,
            prompts,
        }
    }
}

/// Counts the steps of slots, and the time spent in each state.
#[derive(Debug, Clone, Default)]
pub struct Steps(Option<Instruments>);

impl Steps {
    /// Records a step of a slot from `last` to `next`.
    pub fn taken(&self, provider: Provider, on_demand: bool, last: &Life, next: &Life) {
        let Some(Instruments { steps, times, .. }) = &self.0 else {
            return;
        };
        let [provider, on_demand] = of(provider, on_demand);
        let cause = KeyValue::new("cause", next.cause());
        steps.add(1, &[provider.clone(), on_demand.clone(), cause]);
        let (state, next_state) = (last.state().name(), next.state().name());
        if state == next_state {
            return;
        }
        let attributes = [
            provider,
            on_demand,
            KeyValue::new("state", state),
            KeyValue::new("next", next_state),
        ];
        // If the clock was set back, the time counts as zero.
        let time = next.since().duration_since(last.since());
        times.record(time.unwrap_or_default().as_secs_f64(), &attributes);
    }
}

impl Steps {
    /// Counts a prompt that has started in this form.
    pub fn prompted(&self, provider: Provider, form: &Form) {
        let Some(Instruments { prompts, .. }) = &self.0 else {
            return;
        };
        let agent = if form.parked { "parked" } else { "cold" };
        let provider = KeyValue::new("provider", provider.name());
        prompts.add(1, &[provider, KeyValue::new("agent", agent)]);
    }
}
