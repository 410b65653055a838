//! Metrics about the node's slots, runs and scripts. `docs/metrics.md` lists them.

use std::collections::BTreeMap;

use opentelemetry::{
    KeyValue,
    metrics::{AsyncInstrument, Counter, Histogram, Meter, MeterProvider},
};
use opentelemetry_sdk::metrics::SdkMeterProvider;
use polydev_proto::{init::Form, provider::Provider};

use crate::{
    life::{Event, Life, State},
    scripts::{Figures, Status},
    tokens::{ApiErrors, Used},
};

const SERVICE: &str = "nomad-driver-polydev";
/// Buckets in seconds: from a claim that ends at once to a run of hours.
const TIMES: [f64; 14] = [
    0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1_800.0, 7_200.0,
];
/// The instruments, if somebody is told.
#[derive(Debug, Default)]
pub struct Metrics(Option<Told>);

#[derive(Debug)]
struct Told {
    provider: SdkMeterProvider,
    steps: Instruments,
}

impl Metrics {
    /// Instruments of this provider, whose readers say where figures go. Without one, nothing is
    /// counted.
    #[must_use]
    pub fn new(provider: Option<SdkMeterProvider>) -> Self {
        Self(provider.map(|provider| Told {
            steps: Instruments::new(&provider.meter(SERVICE)),
            provider,
        }))
    }

    fn meter(&self) -> Option<Meter> {
        let told = self.0.as_ref()?;
        Some(told.provider.meter(SERVICE))
    }

    /// From now on, reports what `counts` returns. `None` reports nothing.
    pub fn watch(&self, counts: impl Fn() -> Option<Counts> + Send + Sync + 'static) {
        let Some(meter) = self.meter() else {
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
        let _slots = meter
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
        let Some(meter) = self.meter() else {
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
        let _tokens = meter
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
        let Some(meter) = self.meter() else {
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
        let _errors = meter
            .u64_observable_counter("polydev.api.errors")
            .with_unit("{response}")
            .with_description("Answers of providers' APIs with an error; status 0 for none at all.")
            .with_callback(observe)
            .build();
    }

    /// From now on, reports how many images are paused because containers of them fail.
    pub(crate) fn watch_paused(&self, paused: impl Fn() -> Option<u64> + Send + Sync + 'static) {
        let Some(meter) = self.meter() else {
            return;
        };
        let observe = move |observer: &dyn AsyncInstrument<u64>| {
            observer.observe(paused().unwrap_or_default(), &[]);
        };
        // As above.
        let _paused = meter
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
        let Some(meter) = self.meter() else {
            return;
        };
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
