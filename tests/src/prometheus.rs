//! A real Prometheus and a real Alertmanager, with the configurations of `ops/`, and somebody who is
//! paged.

use std::{
    fs,
    path::PathBuf,
    process::Command,
    sync::{Arc, Mutex},
};

use axum::{Json, Router, extract::State, routing::post};
use serde_json::Value;
use tokio::{net::TcpListener, runtime::Runtime};

use crate::{folder::Folder, free_ports, process::Process, root};

/// Dropping it stops all of it.
pub struct Paging {
    _prometheus: Process,
    /// Where Prometheus listens.
    prometheus: String,
    _alertmanager: Process,
    _folder: Folder,
    _receiver: Runtime,
    told: Arc<Mutex<Vec<Value>>>,
}

/// An alert, as somebody was told of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    pub name: String,
    pub severity: String,
    /// `firing` or `resolved`.
    pub status: String,
    pub summary: String,
}

/// A program: `tests/test.sh` says where they are.
fn program(name: &str) -> PathBuf {
    let folder = std::env::var_os("POLYDEV_PROMETHEUS").unwrap_or_default();
    PathBuf::from(folder).join(name)
}

impl Paging {
    /// Starts Prometheus over the figures at these addresses, HOST:PORT.
    ///
    /// # Panics
    /// If a part does not start.
    #[must_use]
    pub fn start(figures: &[&str]) -> Self {
        let folder = Folder::new("pdtest-");
        let [prometheus, alertmanager, pager] = free_ports();
        let [prometheus, alertmanager, pager] =
            [prometheus, alertmanager, pager].map(|port| format!("127.0.0.1:{port}"));
        let copy = |name: &str, changes: &[(&str, &str)]| {
            let path = root().join("ops/prometheus").join(name);
            let mut text = fs::read_to_string(path).expect("it is there");
            for (from, to) in changes {
                assert!(text.contains(from), "{name} has no {from}");
                text = text.replace(from, to);
            }
            let to = folder.path().join(name);
            fs::write(&to, text).expect("a file can be written");
            to
        };
        copy("rules.yaml", &[]);
        let of_prometheus = copy(
            "prometheus.yaml",
            &[
                ("127.0.0.1:9093", &alertmanager),
                ("127.0.0.1:9464", &figures.join(", ")),
            ],
        );
        let of_alertmanager = copy("alertmanager.yaml", &[("127.0.0.1:9095", &pager)]);

        let told = Arc::new(Mutex::new(Vec::new()));
        let receiver = Runtime::new().expect("a runtime");
        let router = Router::new()
            .route("/alerts", post(receive))
            .with_state(told.clone());
        let listener = receiver.block_on(TcpListener::bind(&pager));
        let listener = listener.expect("the port is free");
        receiver.spawn(async move { axum::serve(listener, router).await });

        let data = |name: &str| folder.path().join(name).display().to_string();
        // Debian's reads its templates where its package would have them.
        let mut command = Command::new("unshare");
        let script = "mount --bind \"$0\" /usr/share && exec \"$@\"";
        command.args(["--mount", "sh", "-c", script]);
        command
            .arg(program("../share"))
            .arg(program("prometheus-alertmanager"))
            .arg(format!("--config.file={}", of_alertmanager.display()))
            .arg(format!("--storage.path={}", data("alerts")))
            .arg(format!("--web.listen-address={alertmanager}"))
            .arg("--cluster.listen-address=");
        let log = folder.path().join("alertmanager.log");
        let of_alerts = Process::start(&mut command, &log);
        let mut command = Command::new(program("prometheus"));
        command
            .arg(format!("--config.file={}", of_prometheus.display()))
            .arg(format!("--storage.tsdb.path={}", data("series")))
            .arg(format!("--web.listen-address={prometheus}"));
        let log = folder.path().join("prometheus.log");
        Self {
            _prometheus: Process::start(&mut command, &log),
            prometheus,
            _alertmanager: of_alerts,
            _folder: folder,
            _receiver: receiver,
            told,
        }
    }

    /// The values of an expression now. `None` if Prometheus does not answer yet.
    ///
    /// # Panics
    /// If it answers with an error, such as for an expression that it cannot read.
    #[must_use]
    pub fn values(&self, expression: &str) -> Option<Vec<f64>> {
        let answer = self.get("query", &format!("query={expression}"))?;
        assert_eq!(answer["status"], "success", "{expression}: {answer}");
        let result = answer["data"]["result"].as_array()?;
        let value = |series: &Value| series["value"][1].as_str()?.parse().ok();
        result.iter().map(value).collect()
    }

    /// The rules with the health of their last evaluation, `ok` or an error.
    #[must_use]
    pub fn rules(&self) -> Vec<(String, String)> {
        let answer = self.get("rules", "type=alert").unwrap_or_default();
        let groups = answer["data"]["groups"].as_array().cloned();
        let rules = groups.unwrap_or_default().into_iter();
        let rules = rules.flat_map(|group| group["rules"].as_array().cloned().unwrap_or_default());
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        rules
            .map(|rule| (text(&rule["name"]), text(&rule["health"])))
            .collect()
    }

    fn get(&self, path: &str, query: &str) -> Option<Value> {
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--max-time", "5", "--noproxy", "*", "--get"]);
        curl.args(["--data-urlencode", query]);
        curl.arg(format!("http://{}/api/v1/{path}", self.prometheus));
        let output = curl.output().expect("curl is installed");
        serde_json::from_slice(&output.stdout).ok()
    }

    /// What somebody was told so far, in order.
    ///
    /// # Panics
    /// If an alert has another form.
    #[must_use]
    pub fn told(&self) -> Vec<Told> {
        let messages = self.told.lock().expect("nothing panics with it");
        let alerts = messages
            .iter()
            .flat_map(|message| message["alerts"].as_array().expect("a list of alerts"));
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let alert = |alert: &Value| Told {
            name: text(&alert["labels"]["alertname"]),
            severity: text(&alert["labels"]["severity"]),
            status: text(&alert["status"]),
            summary: text(&alert["annotations"]["summary"]),
        };
        alerts.map(alert).collect()
    }
}

async fn receive(State(told): State<Arc<Mutex<Vec<Value>>>>, Json(message): Json<Value>) {
    told.lock().expect("nothing panics with it").push(message);
}
