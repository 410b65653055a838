//! A real OpenTelemetry Collector, with the configuration of `ops/`.

use std::{fs, path::PathBuf, process::Command};

use serde_json::Value;

use crate::{folder::Folder, process::Process, root};

/// Dropping the collector stops it.
pub struct Collector {
    _process: Process,
    address: String,
    http: u16,
    folder: Folder,
}

/// The collector's program: `tests/test.sh` says where it is.
#[must_use]
pub fn program() -> PathBuf {
    std::env::var_os("POLYDEV_COLLECTOR")
        .unwrap_or_else(|| "otelcol-contrib".into())
        .into()
}

impl Collector {
    /// Starts a collector that takes OTLP at a port of this machine. Does not wait for it.
    #[must_use]
    pub fn start(otlp: u16) -> Self {
        Self::start_with(otlp, &[])
    }

    /// As [`Collector::start`], with more settings, each as `a::b::c: value`.
    #[must_use]
    pub fn start_with(otlp: u16, settings: &[String]) -> Self {
        let folder = Folder::new("pdtest-");
        let [prometheus, http] = crate::free_ports();
        let set = |setting: &str| format!("--config=yaml:{setting}");
        let endpoint = |path: &str, port: u16| set(&format!("{path}::endpoint: 127.0.0.1:{port}"));
        let file = |signal: &str| {
            let path = folder.path().join(signal);
            set(&format!(
                "exporters::file/{signal}::path: {}",
                path.display()
            ))
        };
        let mut command = Command::new(program());
        command
            .arg("--config")
            .arg(root().join("ops/collector.yaml"))
            .arg(endpoint("receivers::otlp::protocols::grpc", otlp))
            .arg(endpoint("receivers::otlp::protocols::http", http))
            .arg(endpoint("exporters::prometheus", prometheus))
            .args([file("traces"), file("logs")])
            .args(settings.iter().map(|setting| set(setting)))
            // The port of the collector's metrics about itself may be in use.
            .arg("--config=yaml:service::telemetry::metrics::level: none");
        Self {
            _process: Process::start(&mut command, &folder.path().join("log")),
            address: format!("127.0.0.1:{prometheus}"),
            http,
            folder,
        }
    }

    /// Where it takes OTLP over HTTP.
    #[must_use]
    pub fn http_port(&self) -> u16 {
        self.http
    }

    /// Where Prometheus finds its metrics.
    #[must_use]
    pub fn address(&self) -> String {
        self.address.clone()
    }

    /// The metrics that the collector shows to Prometheus; empty if it does not answer.
    ///
    /// # Panics
    /// Without `curl`.
    #[must_use]
    pub fn figures(&self) -> String {
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--max-time", "5", "--noproxy", "*"]);
        curl.arg(format!("http://{}/metrics", self.address));
        let output = curl.output().expect("curl is installed");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// All spans that it was sent, as OTLP's JSON.
    ///
    /// # Panics
    /// If it has written something else.
    #[must_use]
    pub fn spans(&self) -> Vec<Value> {
        self.records("traces", ["resourceSpans", "scopeSpans", "spans"])
    }

    /// All log lines that it was sent, as OTLP's JSON.
    ///
    /// # Panics
    /// If it has written something else.
    #[must_use]
    pub fn lines(&self) -> Vec<Value> {
        self.records("logs", ["resourceLogs", "scopeLogs", "logRecords"])
    }

    fn records(&self, signal: &str, [resources, scopes, records]: [&str; 3]) -> Vec<Value> {
        let text = fs::read_to_string(self.folder.path().join(signal)).unwrap_or_default();
        // The last line may not be whole yet.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
        let mut all = Vec::new();
        for line in whole.lines() {
            let line: Value = serde_json::from_str(line).expect("a line is JSON");
            for resource in list(&line[resources]) {
                for scope in list(&resource[scopes]) {
                    all.extend(list(&scope[records]));
                }
            }
        }
        all
    }

    /// The sum of the series with this name and these labels, such as `state="idle"`.
    ///
    /// # Panics
    /// If a value is not a number.
    #[must_use]
    pub fn sum(&self, name: &str, labels: &[&str]) -> f64 {
        let figures = self.figures();
        let series = figures.lines().filter_map(|line| {
            let (series, value) = line.rsplit_once(' ')?;
            let (found, with) = series.split_once('{')?;
            let is_asked = found == name && labels.iter().all(|label| with.contains(label));
            is_asked.then(|| value.parse::<f64>().expect("a value is a number"))
        });
        series.sum()
    }
}
