//! A real OpenTelemetry Collector, with the configuration of `ops/`.

use std::{fs, path::PathBuf, process::Command};

use serde_json::Value;

use crate::{folder::Folder, process::Process, root};

/// Dropping the collector stops it.
pub struct Collector {
    _process: Process,
    address: String,
    traces: PathBuf,
    _folder: Folder,
}

/// The collector's program: `tests/test.sh` says where it is.
fn program() -> PathBuf {
    std::env::var_os("POLYDEV_COLLECTOR")
        .unwrap_or_else(|| "otelcol-contrib".into())
        .into()
}

impl Collector {
    /// Starts a collector that takes OTLP at a port of this machine. Does not wait for it.
    #[must_use]
    pub fn start(otlp: u16) -> Self {
        let folder = Folder::new("pdtest-");
        let [prometheus] = crate::free_ports();
        let traces = folder.path().join("traces.json");
        let set =
            |path: &str, port: u16| format!("--config=yaml:{path}::endpoint: 127.0.0.1:{port}");
        let mut command = Command::new(program());
        command
            .arg("--config")
            .arg(root().join("ops/collector.yaml"))
            .arg(set("receivers::otlp::protocols::grpc", otlp))
            .arg(set("exporters::prometheus", prometheus))
            .arg(format!(
                "--config=yaml:exporters::file::path: {}",
                traces.display()
            ))
            // The port of the collector's metrics about itself may be in use.
            .arg("--config=yaml:service::telemetry::metrics::level: none");
        Self {
            _process: Process::start(&mut command, &folder.path().join("log")),
            address: format!("127.0.0.1:{prometheus}"),
            traces,
            _folder: folder,
        }
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
        let text = fs::read_to_string(&self.traces).unwrap_or_default();
        // The last line may not be whole yet.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
        let mut spans = Vec::new();
        for line in whole.lines() {
            let line: Value = serde_json::from_str(line).expect("a line is JSON");
            for resource in list(&line["resourceSpans"]) {
                for scope in list(&resource["scopeSpans"]) {
                    spans.extend(list(&scope["spans"]));
                }
            }
        }
        spans
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
