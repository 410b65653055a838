//! How shims and drivers tell what they do. A [`collector`] gets traces, metrics and logs over OTLP,
//! through [`exporters`], whose failures are logged. Prometheus may come and [`scrape`] metrics.
//! [`context`] is a place in a trace. [`logs`] sends log lines, and [`resource`] says whose all of it is.

pub mod collector;
pub mod context;
pub mod exporters;
pub mod logs;
pub mod scrape;
mod watched;

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
