//! Collectors as operators run them: the Nomad job, the manifests for Kubernetes, and the recipe of
//! the system before, which drops what it is meant to find.

use std::{fs, path::Path, process::Command, time::Duration};

use polydev_tests::{
    collector, docker,
    folder::Folder,
    free_ports,
    nomad::{Nomad, nomad_program},
    process::{Process, output, succeed, wait_for_log},
    root, wait_until,
};
use serde_json::{Value, json};

/// Two lines of a program's log, of which the first is about a script.
const LINES: &str = concat!(
    r#"{"level":"ERROR","target":"telemetry.sandbox","message":"a streak","streak":3}"#,
    "\n",
    r#"{"level":"INFO","target":"elsewhere","message":"nothing of interest"}"#,
    "\n",
);

fn start(config: &Value, folder: &Path) -> Process {
    let path = folder.join("config.yaml");
    // JSON is YAML.
    fs::write(&path, config.to_string()).expect("a file can be written");
    let mut command = Command::new(collector::program());
    command.arg("--config").arg(path);
    Process::start(&mut command, &folder.join("collector.log"))
}

/// Dropping it removes the image.
struct Image(String);

impl Drop for Image {
    fn drop(&mut self) {
        output(docker::command().args(["image", "rm", "--force", &self.0]));
    }
}

/// What a collector makes of the lines, with these operators after the parser.
fn collected(operators: &Value) -> String {
    let folder = Folder::new("pdtest-");
    let (lines, out) = (folder.path().join("lines"), folder.path().join("out"));
    fs::write(&lines, LINES).expect("a file can be written");
    let mut all = vec![json!({ "type": "json_parser" })];
    all.extend(operators.as_array().cloned().unwrap_or_default());
    let _collector = start(
        &json!({
            "receivers": { "filelog": {
                "include": [lines], "start_at": "beginning", "operators": all,
            } },
            "exporters": { "file": { "path": out } },
            "service": {
                "telemetry": { "metrics": { "level": "none" } },
                "pipelines": { "logs": { "receivers": ["filelog"], "exporters": ["file"] } },
            },
        }),
        folder.path(),
    );
    wait_until("a line", Duration::from_secs(30), || {
        let text = fs::read_to_string(&out).unwrap_or_default();
        (!text.is_empty())
            .then_some(text)
            .ok_or_else(|| "none".to_owned())
    })
}

/// D-W9: the operator `filter` drops what its expression matches.
#[test]
fn the_recipe_of_the_system_before_drops_the_events_it_is_meant_to_find() {
    let is_about_scripts = r#"attributes.target == "telemetry.sandbox""#;
    let recipe = json!([{ "type": "filter", "expr": is_about_scripts }]);
    let found = collected(&recipe);
    assert!(found.contains("nothing of interest"), "{found}");
    assert!(!found.contains("a streak"), "{found}");
    let others = format!("not ({is_about_scripts})");
    let found = collected(&json!([{ "type": "filter", "expr": others }]));
    assert!(found.contains("a streak"), "{found}");
    assert!(!found.contains("nothing of interest"), "{found}");
}

/// D-W10: an exporter for metrics is in the pipeline for logs.
#[test]
fn the_recipe_of_the_system_before_does_not_start() {
    let folder = Folder::new("pdtest-");
    let [port] = free_ports();
    let mut collector = start(
        &json!({
            "receivers": { "filelog": { "include": [folder.path().join("lines")] } },
            "exporters": { "prometheus": { "endpoint": format!("127.0.0.1:{port}") } },
            "service": { "pipelines": { "logs": {
                "receivers": ["filelog"], "exporters": ["prometheus"],
            } } },
        }),
        folder.path(),
    );
    wait_for_log(
        &collector,
        "telemetry type is not supported",
        Duration::from_secs(30),
    );
    let ended = wait_until("its end", Duration::from_secs(10), || {
        collector.exit().ok_or_else(|| "it runs".to_owned())
    });
    assert!(!ended.success());
}

#[test]
fn the_nomad_job_runs_a_collector_on_the_node_with_the_configuration_of_ops() {
    succeed(
        Command::new(nomad_program())
            .args(["fmt", "-check"])
            .arg(root().join("ops/nomad")),
    );
    let folder = Folder::new("pdtest-");
    let [grpc, http, metrics] = free_ports();
    let mut config = fs::read_to_string(root().join("ops/collector.yaml")).unwrap();
    for (from, to) in [("4317", grpc), ("4318", http), ("9464", metrics)] {
        let [from, to] = [format!("127.0.0.1:{from}"), format!("127.0.0.1:{to}")];
        assert!(config.contains(&from), "{from}");
        config = config.replace(&from, &to);
    }
    let path = folder.path().join("collector.yaml");
    fs::write(&path, config).unwrap();
    // The image's program, with the libraries that it may need.
    let image = Image(format!("pdtest-collector:{}", std::process::id()));
    let tag = &*image.0;
    fs::copy(collector::program(), folder.path().join("collector")).unwrap();
    let file = "FROM polydev-debian:trixie\nCOPY collector /collector\nUSER 10001\nENTRYPOINT [\"/collector\"]\n";
    fs::write(folder.path().join("Dockerfile"), file).unwrap();
    succeed(
        docker::command()
            .args(["build", "--quiet", "--tag", tag])
            .arg(folder.path()),
    );

    let nomad = Nomad::start_beside_docker("");
    let config = format!("config={}", path.display());
    let variable = format!("image={tag}");
    let job = "ops/nomad/collector.nomad.hcl";
    nomad.run(&[
        "job", "run", "-detach", "-var", &config, "-var", &variable, job,
    ]);
    wait_until("the collector", Duration::from_secs(60), || {
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--fail", "--noproxy", "*", "--data", "{}"]);
        curl.args(["--header", "content-type: application/json"]);
        curl.arg(format!("http://127.0.0.1:{http}/v1/traces"));
        let answered = output(&mut curl).status.success();
        answered
            .then_some(())
            .ok_or_else(|| nomad.run(&["job", "status", "polydev-collector"]))
    });
    let allocs = nomad.get("/v1/job/polydev-collector/allocations");
    let name = format!("name=collector-{}", allocs[0]["ID"].as_str().unwrap());
    let left = || docker::docker(&["ps", "--all", "--quiet", "--filter", &name]);
    assert!(!left().trim().is_empty());
    nomad.run(&["job", "stop", "-purge", "polydev-collector"]);
    // Nomad's driver removes the container, if its agent lives on for so long.
    wait_until("its container is gone", Duration::from_secs(60), || {
        let left = left();
        left.trim().is_empty().then_some(()).ok_or(left)
    });
}

#[test]
fn the_manifests_are_valid_and_have_the_configuration_of_ops() {
    let folder = succeed(&mut Command::new(root().join("tests/python.sh")));
    let mut validate = Command::new(format!("{}/kubernetes-validate", folder.trim()));
    validate.arg("--strict");
    succeed(validate.arg(root().join("ops/kubernetes/collector.yaml")));

    let read = |path: &str| {
        let text = fs::read_to_string(root().join("ops").join(path)).unwrap();
        let begin = text.find("receivers:").expect("it has receivers");
        text[begin..].to_owned()
    };
    let of_pod = read("kubernetes/collector-config.yaml");
    assert_eq!(
        of_pod,
        read("collector.yaml").replace("127.0.0.1:", "0.0.0.0:")
    );
}
