//! What a user does with each job of the suite.

use std::time::Duration;

use polydev_tests::{nomad::Nomad, process::output, wait_until};
use serde_json::{Value, json};

use super::{
    fetch,
    seen::{Seen, folder, log},
};

/// For anything that a job does by itself.
const JOB_TIMEOUT: Duration = Duration::from_secs(90);

/// A job's id with a driver.
pub(super) fn id(name: &str, driver: &str) -> String {
    format!("compat-{name}-{driver}")
}

/// Runs a job file to its end, as its user would.
pub(super) fn run(nomad: &Nomad, name: &str, driver: &str, file: &str) -> Seen {
    let job = id(name, driver);
    let mut seen = Seen::default();
    if name == "signal" {
        put_word(nomad, &job, "one");
    }
    submit(nomad, &job, file);
    let job = child(nomad, name, &job);
    let alloc = if is_service(name) {
        let alloc = started(nomad, &job);
        seen.know(&alloc, "ALLOC");
        during(nomad, name, &job, &alloc, &mut seen);
        nomad.run(&["job", "stop", "-detach", "-yes", &job]);
        ended(nomad, &job)
    } else {
        let alloc = ended(nomad, &job);
        seen.know(alloc["ID"].as_str().expect("an id"), "ALLOC");
        alloc
    };
    let short = &alloc["ID"].as_str().expect("an id")[..8];
    seen.know(short, "SHORT");
    seen.know(&job, "JOB");
    seen.know(&id(name, driver), "JOB");
    seen.add_end(nomad, &alloc);
    if name == "shipper" {
        let files = folder(
            nomad,
            alloc["ID"].as_str().expect("an id"),
            "alloc/logs/app",
        );
        seen.add("files", &files);
    }
    seen
}

fn submit(nomad: &Nomad, job: &str, file: &str) {
    let path = nomad.folder().join(format!("{job}.nomad.hcl"));
    std::fs::write(&path, file).expect("a file can be written");
    nomad.run(&["job", "run", "-detach", &path.to_string_lossy()]);
}

fn is_service(name: &str) -> bool {
    ["web", "database", "signal", "system", "static-port", "exec"].contains(&name)
}

/// The job that runs: of some, it is one that the submitted one makes.
fn child(nomad: &Nomad, name: &str, job: &str) -> String {
    match name {
        "periodic" => {
            nomad.run(&["job", "periodic", "force", "-detach", job]);
        }
        "dispatch" => {
            let body = json!({"Payload": "cGF5bG9hZAo=", "Meta": {"who": "somebody"}});
            nomad.put(&format!("/v1/job/{job}/dispatch"), &body);
        }
        _ => return job.to_owned(),
    }
    wait_until("the child of a job", JOB_TIMEOUT, || {
        let all = nomad.get(&format!("/v1/jobs?prefix={job}/"));
        let child = all[0]["ID"].as_str().map(str::to_owned);
        child.ok_or_else(|| all.to_string())
    })
}

fn during(nomad: &Nomad, name: &str, job: &str, alloc: &str, seen: &mut Seen) {
    match name {
        "web" => {
            let port = port(nomad, alloc);
            seen.know(&port.to_string(), "PORT");
            seen.add("page", &fetch(port, "/index.html"));
            wait_until("a check that passes", JOB_TIMEOUT, || {
                let checks = nomad.get(&format!("/v1/client/allocation/{alloc}/checks"));
                let text = checks.to_string();
                if text.contains("\"success\"") {
                    Ok(())
                } else {
                    Err(text)
                }
            });
        }
        "static-port" => {
            let port = port(nomad, alloc);
            seen.add("page", &fetch(port, "/index.html"));
        }
        "database" => {
            line(nomad, alloc, "db", "ready");
            seen.add("files", &folder(nomad, alloc, "db/local/db"));
        }
        "system" => line(nomad, alloc, "agent", "on each node"),
        "signal" => {
            line(nomad, alloc, "signal", "ready");
            put_word(nomad, job, "two");
            line(nomad, alloc, "signal", "two");
        }
        "exec" => {
            line(nomad, alloc, "open", "ready");
            let script = "id -u; pwd; echo wrong >&2; exit 3";
            let mut exec = nomad.command(&["alloc", "exec", "-i=false", "-t=false", alloc]);
            let done = output(exec.args(["sh", "-c", script]));
            let text = String::from_utf8_lossy(&done.stdout).into_owned();
            seen.add("exec", &format!("{text}{:?}", done.status.code()));
            seen.add("exec.stderr", &String::from_utf8_lossy(&done.stderr));
            nomad.run(&["alloc", "signal", "-s", "SIGUSR1", alloc]);
            line(nomad, alloc, "open", "usr1");
            let usage = wait_until("what it uses", JOB_TIMEOUT, || {
                let stats = nomad.get(&format!("/v1/client/allocation/{alloc}/stats"));
                let usage = stats["Tasks"]["open"]["ResourceUsage"].clone();
                let is_there = !usage["MemoryStats"]["Measured"].is_null();
                if is_there {
                    Ok(usage)
                } else {
                    Err(stats.to_string())
                }
            });
            for kind in ["CpuStats", "MemoryStats"] {
                seen.add(kind, &usage[kind]["Measured"].to_string());
            }
        }
        other => unreachable!("{other} is no service"),
    }
}

fn put_word(nomad: &Nomad, job: &str, word: &str) {
    let path = format!("nomad/jobs/{job}");
    let body = json!({ "Path": path, "Items": { "word": word } });
    nomad.put(&format!("/v1/var/{path}"), &body);
}

fn port(nomad: &Nomad, alloc: &str) -> u64 {
    let alloc = nomad.get(&format!("/v1/allocation/{alloc}"));
    let ports = &alloc["AllocatedResources"]["Shared"]["Ports"];
    ports[0]["Value"]
        .as_u64()
        .unwrap_or_else(|| panic!("{alloc}"))
}

/// Waits for a line of a task's output.
fn line(nomad: &Nomad, alloc: &str, task: &str, line: &str) {
    wait_until(&format!("`{line}` of {task}"), JOB_TIMEOUT, || {
        let text = log(nomad, alloc, task, "stdout");
        let is_there = text.lines().any(|one| one == line);
        if is_there { Ok(()) } else { Err(text) }
    });
}

fn newest(nomad: &Nomad, job: &str) -> Result<Value, String> {
    let newest = nomad.allocations(job).pop();
    newest.ok_or_else(|| nomad.get(&format!("/v1/job/{job}/evaluations")).to_string())
}

fn started(nomad: &Nomad, job: &str) -> String {
    wait_until(&format!("{job} to run"), JOB_TIMEOUT, || {
        let alloc = newest(nomad, job)?;
        match alloc["ClientStatus"].as_str() {
            Some("running") => Ok(alloc["ID"].as_str().expect("an id").to_owned()),
            _ => Err(alloc["TaskStates"].to_string()),
        }
    })
}

fn ended(nomad: &Nomad, job: &str) -> Value {
    wait_until(&format!("the end of {job}"), JOB_TIMEOUT, || {
        let alloc = newest(nomad, job)?;
        match alloc["ClientStatus"].as_str() {
            Some("complete" | "failed") => Ok(alloc),
            _ => Err(alloc["TaskStates"].to_string()),
        }
    })
}
