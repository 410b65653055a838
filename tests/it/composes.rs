//! compose.yaml with Compose 1.29 and 2.26. No registry is needed: PostgreSQL, Prometheus and
//! Alertmanager are Debian's, and the collector is the one that the tests build. **Qdrant and Grafana
//! cannot be had from packages**: stand-ins with their ports and the programs of their health checks
//! are in their place, so that of these two only what is around them is shown here.

use std::{fs, path::PathBuf, process::Command, sync::LazyLock, time::Duration};

use polydev_tests::{
    collector, docker,
    docker::docker,
    folder::Folder,
    free_ports,
    process::{output, succeed},
    root, wait_until,
};
use serde_json::Value;

/// The images' names in `.env`, and the stages of tests/compose/Dockerfile that replace them.
const IMAGES: [(&str, &str); 6] = [
    ("QDRANT_IMAGE", "stand-in"),
    ("POSTGRES_IMAGE", "postgres"),
    ("COLLECTOR_IMAGE", "collector"),
    ("PROMETHEUS_IMAGE", "prometheus"),
    ("ALERTMANAGER_IMAGE", "alertmanager"),
    ("GRAFANA_IMAGE", "stand-in"),
];
const PORTS: [&str; 8] = [
    "QDRANT_HTTP_PORT",
    "QDRANT_GRPC_PORT",
    "POSTGRES_PORT",
    "OTLP_GRPC_PORT",
    "OTLP_HTTP_PORT",
    "PROMETHEUS_PORT",
    "ALERTMANAGER_PORT",
    "GRAFANA_PORT",
];
const SERVICES: [&str; 6] = [
    "qdrant",
    "postgres",
    "collector",
    "prometheus",
    "alertmanager",
    "grafana",
];
/// Health checks begin after five seconds.
const HEALTHY_TIMEOUT: Duration = Duration::from_secs(90);

static PROGRAMS: LazyLock<PathBuf> = LazyLock::new(|| {
    let found = succeed(&mut Command::new(root().join("tests/compose.sh")));
    found.trim().into()
});

/// A project of its own; dropping it removes containers, networks and volumes.
struct Project {
    program: PathBuf,
    name: String,
    folder: Folder,
    ports: [u16; 8],
}

impl Project {
    fn new(version: &str) -> Self {
        let folder = Folder::new("pdtest-");
        build(&folder);
        let ports = free_ports();
        let mut env = String::from("POSTGRES_PASSWORD=of-the-test\n");
        for (name, port) in PORTS.iter().zip(ports) {
            env.push_str(&format!("{name}={port}\n"));
        }
        for (name, stage) in IMAGES {
            env.push_str(&format!("{name}=pdtest-{stage}:compose\n"));
        }
        fs::write(folder.path().join("env"), env).expect("a file can be written");
        Self {
            program: PROGRAMS.join(version).join("docker-compose"),
            name: format!("pdtest{version}{}", std::process::id()),
            folder,
            ports,
        }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(["--project-name", &self.name]);
        command.arg("--file").arg(root().join("compose.yaml"));
        command
            .arg("--env-file")
            .arg(self.folder.path().join("env"));
        command.args(arguments);
        command
    }

    fn container(&self, service: &str) -> String {
        let project = format!("label=com.docker.compose.project={}", self.name);
        let service = format!("label=com.docker.compose.service={service}");
        docker(&["ps", "--quiet", "--filter", &project, "--filter", &service])
            .trim()
            .to_owned()
    }

    fn wait_healthy(&self, services: &[&str]) {
        for service in services {
            wait_until(service, HEALTHY_TIMEOUT, || {
                let state = &docker::inspect(&self.container(service))["State"];
                // Without a health check it counts that it runs.
                let health = &state["Health"]["Status"];
                let is_well = health == "healthy" || (health.is_null() && state["Running"] == true);
                is_well.then_some(()).ok_or_else(|| state.to_string())
            });
        }
    }

    /// Asks at a published port. `None` if there is no answer, or an error.
    fn get(&self, port: &str, path: &str) -> Option<String> {
        let at = PORTS.iter().position(|name| *name == port)?;
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--fail", "--max-time", "5", "--noproxy", "*"]);
        curl.arg(format!("http://127.0.0.1:{}{path}", self.ports[at]));
        let answered = output(&mut curl);
        let text = String::from_utf8_lossy(&answered.stdout).into_owned();
        answered.status.success().then_some(text)
    }
}

impl Drop for Project {
    fn drop(&mut self) {
        let down = ["--profile", "observability", "down", "--volumes"];
        output(&mut self.command(&down));
    }
}

/// Makes the images; Docker keeps the layers.
fn build(folder: &Folder) {
    let context = folder.path().join("images");
    fs::create_dir(&context).expect("a folder can be made");
    for file in ["Dockerfile", "postgres.sh", "stand-in.sh"] {
        let from = root().join("tests/compose").join(file);
        fs::copy(from, context.join(file)).expect("a file can be copied");
    }
    fs::copy(collector::program(), context.join("collector")).expect("a file can be copied");
    let mut stages: Vec<_> = IMAGES.iter().map(|(_, stage)| *stage).collect();
    stages.sort_unstable();
    stages.dedup();
    for stage in stages {
        let mut build = docker::command();
        build.args(["build", "--quiet", "--target", stage]);
        build.args(["--tag", &format!("pdtest-{stage}:compose")]);
        succeed(build.arg(&context));
    }
}

fn everything_starts_is_healthy_and_ends(version: &str) {
    let project = Project::new(version);
    succeed(&mut project.command(&["up", "-d"]));
    project.wait_healthy(&["qdrant", "postgres"]);
    for service in SERVICES {
        let has = !project.container(service).is_empty();
        assert_eq!(has, matches!(service, "qdrant" | "postgres"), "{service}");
    }
    let logs = succeed(&mut project.command(&["logs", "qdrant"]));
    assert!(logs.contains("stand-in: listening"), "{logs}");
    assert_eq!(
        project.get("QDRANT_HTTP_PORT", "/api/health").as_deref(),
        Some("ok\n")
    );
    assert_eq!(
        project.get("QDRANT_GRPC_PORT", "/api/health").as_deref(),
        Some("ok\n")
    );
    // With the password, from outside.
    let url = format!(
        "postgres://polydev:of-the-test@127.0.0.1:{}/polydev",
        project.ports[2]
    );
    let psql = ["exec", &*project.container("postgres"), "psql", "-Atc"];
    let made = docker(
        &[
            &psql[..],
            &["create table kept as select 7 as n", "-U", "polydev"],
        ]
        .concat(),
    );
    assert_eq!(made.trim(), "SELECT 1");
    let ready = [
        "run",
        "--rm",
        "--network",
        "host",
        "--entrypoint",
        "psql",
        "pdtest-postgres:compose",
    ];
    let kept = docker(&[&ready[..], &[&url, "-Atc", "select n from kept"]].concat());
    assert_eq!(kept.trim(), "7");

    let up = ["--profile", "observability", "up", "-d"];
    succeed(&mut project.command(&up));
    project.wait_healthy(&SERVICES);
    // What comes to the collector is in Prometheus, which knows the rules and Alertmanager.
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let point = serde_json::json!({
        "asDouble": 5, "timeUnixNano": now.expect("it is later").as_nanos().to_string(),
    });
    let metrics = serde_json::json!({ "resourceMetrics": [{
        "resource": { "attributes": [
            { "key": "service.name", "value": { "stringValue": "polydev-shim" } },
        ] },
        "scopeMetrics": [{ "metrics": [
            { "name": "polydev.shim.waiting", "gauge": { "dataPoints": [point] } },
        ] }],
    }] });
    let mut send = Command::new("curl");
    send.args([
        "--silent",
        "--fail",
        "--noproxy",
        "*",
        "--data",
        &metrics.to_string(),
    ]);
    send.args(["--header", "content-type: application/json"]);
    succeed(send.arg(format!("http://127.0.0.1:{}/v1/metrics", project.ports[4])));
    let query = |path: &str| -> Value {
        let answer = project.get("PROMETHEUS_PORT", path).unwrap_or_default();
        serde_json::from_str(&answer).unwrap_or_default()
    };
    wait_until("the figure", Duration::from_secs(60), || {
        let answer = query("/api/v1/query?query=polydev_shim_waiting");
        let is_there = answer["data"]["result"][0]["value"][1] == "5";
        is_there.then_some(()).ok_or_else(|| answer.to_string())
    });
    let rules = query("/api/v1/rules")["data"]["groups"]
        .as_array()
        .map(Vec::len);
    assert!(rules > Some(2), "{rules:?}");
    wait_until("Alertmanager", Duration::from_secs(30), || {
        let answer = query("/api/v1/alertmanagers");
        let is_known = answer["data"]["activeAlertmanagers"][0].is_object();
        is_known.then_some(()).ok_or_else(|| answer.to_string())
    });
    assert!(project.get("ALERTMANAGER_PORT", "/-/healthy").is_some());
    // Of Grafana what is around it: its port, and its files where it looks for them.
    assert_eq!(
        project.get("GRAFANA_PORT", "/api/health").as_deref(),
        Some("ok\n")
    );
    let grafana = project.container("grafana");
    for file in [
        "/etc/grafana/provisioning/datasources/polydev.yaml",
        "/etc/grafana/provisioning/dashboards/polydev.yaml",
        "/var/lib/grafana/dashboards/polydev.json",
    ] {
        docker(&["exec", &grafana, "test", "-s", file]);
    }

    // The volumes stay.
    let down = ["--profile", "observability", "down"];
    succeed(&mut project.command(&down));
    assert!(
        SERVICES
            .iter()
            .all(|service| project.container(service).is_empty())
    );
    succeed(&mut project.command(&["up", "-d", "postgres"]));
    project.wait_healthy(&["postgres"]);
    let kept = docker(&[&ready[..], &[&url, "-Atc", "select n from kept"]].concat());
    assert_eq!(kept.trim(), "7");
}

#[test]
fn the_old_compose_starts_everything_and_ends_it() {
    everything_starts_is_healthy_and_ends("v1");
}

#[test]
fn the_new_compose_starts_everything_and_ends_it() {
    everything_starts_is_healthy_and_ends("v2");
}

#[test]
fn the_configurations_of_compose_are_those_of_ops_with_other_names() {
    let read = |path: &str, from: &str| {
        let text = fs::read_to_string(root().join("ops").join(path)).unwrap();
        text[text.find(from).expect("it has this key")..].to_owned()
    };
    let prometheus = read("prometheus/prometheus.yaml", "global:")
        .replace("127.0.0.1:9464", "collector:9464")
        .replace("127.0.0.1:9093", "alertmanager:9093");
    assert_eq!(read("compose/prometheus.yaml", "global:"), prometheus);
    let alertmanager = read("prometheus/alertmanager.yaml", "route:")
        .replace("http://127.0.0.1", "http://host.docker.internal");
    assert_eq!(read("compose/alertmanager.yaml", "route:"), alertmanager);
}

#[test]
fn the_example_of_env_has_the_defaults_of_compose() {
    let read = |path: &str| fs::read_to_string(root().join(path)).unwrap();
    let (example, compose) = (read(".env.example"), read("compose.yaml"));
    let mut count = 0;
    for line in example.lines().filter(|line| !line.starts_with('#')) {
        let (name, value) = line.split_once('=').unwrap();
        let used = format!("${{{name}:-{value}}}");
        assert!(compose.contains(&used), "{used}");
        count += 1;
    }
    assert_eq!(count, compose.matches("${").count());
}
