//! How shims and drivers tell what they do. A [`collector`] gets traces, metrics and logs over OTLP,
//! through [`exporters`], whose failures are logged. Prometheus may come and [`scrape`] metrics.
//! [`context`] is a place in a trace. [`logs`] sends log lines, and [`resource`] says whose all of it is.

pub mod collector;
pub mod context;
pub mod exporters;
pub mod logs;
pub mod scrape;
mod watched;

use std::{
    sync::mpsc,
    time::{Duration, Instant},
};

use opentelemetry::KeyValue;
use opentelemetry_sdk::Resource;

/// Whose traces, metrics and logs these are. `service` is the name of the program, and `instance`
/// tells it from others of its kind. The environment has no say: it describes whoever started the
/// program.
#[must_use]
pub fn resource(service: &'static str, version: &'static str, instance: String) -> Resource {
    let host = nix::unistd::gethostname().unwrap_or_default();
    Resource::builder_empty()
        .with_service_name(service)
        .with_attributes([
            KeyValue::new("service.version", version),
            KeyValue::new("service.instance.id", instance),
            KeyValue::new("host.name", host.to_string_lossy().into_owned()),
        ])
        .build()
}

/// Ends the export of signals, each in a thread of its own: to shut one down blocks, for five seconds
/// and more if the collector does not answer. Blocks no longer than `limit`.
pub fn finish(limit: Duration, signals: Vec<Box<dyn FnOnce() + Send>>) {
    let (told, is_told) = mpsc::channel();
    let count = signals.len();
    for signal in signals {
        let told = told.clone();
        std::thread::spawn(move || {
            signal();
            let _nobody_waits = told.send(());
        });
    }
    let until = Instant::now() + limit;
    for _ in 0..count {
        let left = until.saturating_duration_since(Instant::now());
        if is_told.recv_timeout(left).is_err() {
            return;
        }
    }
}
