//! Job files for Nomad's Docker driver, each run with that driver and with ours on one agent. What
//! a user sees of them is compared field by field.

mod act;
mod beyond;
mod device_plugins;
mod differences;
mod seen;

use std::{
    collections::BTreeMap,
    fs,
    io::{Read, Write},
    net::TcpListener,
    process::Command,
    thread,
};

use polydev_tests::{docker, nomad::Nomad, process::succeed, root};

use differences::DIFFERENCES;
use seen::Seen;

/// How many jobs run at the same time, each with both drivers.
const AT_ONCE: usize = 4;
const DRIVERS: [&str; 2] = ["docker", "polydev"];
const PLUGIN: &str = r#"
    allow_caps = ["all"]
    volumes {
      enabled = true
    }
"#;

#[test]
fn jobs_of_the_docker_driver_are_the_same_here_but_for_what_is_listed() {
    images();
    let artifact = serve_artifact();
    let nomad = Nomad::start_beside_docker(PLUGIN);
    let jobs = jobs(artifact);
    assert!(jobs.len() >= 20, "{}", jobs.len());
    let mut problems = Vec::new();
    let mut used = vec![false; DIFFERENCES.len()];
    for some in jobs.chunks(AT_ONCE) {
        for (name, [with_docker, with_ours]) in run(&nomad, some) {
            for field in with_docker.differs_from(&with_ours) {
                let place = format!("{name}.{field}");
                let listed = DIFFERENCES.iter().position(|row| row.covers(&place));
                match listed {
                    Some(row) => used[row] = true,
                    None => problems.push(format!(
                        "{place}\n  docker:  {:?}\n  polydev: {:?}",
                        with_docker.get(&field),
                        with_ours.get(&field)
                    )),
                }
            }
        }
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
    let unused = DIFFERENCES.iter().zip(used).filter(|(_, used)| !used);
    let unused: Vec<&str> = unused.map(|(row, _)| row.field).collect();
    assert_eq!(unused, [""; 0], "these are the same by now");
}

/// The page for users has a row for each difference.
#[test]
fn each_difference_is_in_the_page_for_those_who_come_from_the_docker_driver() {
    let page = fs::read_to_string(root().join("docs/from-docker-driver.md")).unwrap();
    for row in DIFFERENCES {
        let line = format!("| `{}` | {} |", row.field, row.reason);
        assert!(
            page.contains(&line),
            "docs/from-docker-driver.md needs:\n{line}"
        );
    }
}

/// A job file by the name of the job, for both drivers.
struct Job {
    name: String,
    files: [String; 2],
}

fn jobs(artifact: u16) -> Vec<Job> {
    let folder = root().join("tests/it/compat/jobs");
    let mut jobs: Vec<Job> = fs::read_dir(folder)
        .expect("the folder of jobs")
        .map(|entry| {
            let path = entry.expect("a file").path();
            let name = path
                .file_name()
                .expect("a name")
                .to_string_lossy()
                .into_owned();
            let name = name
                .strip_suffix(".nomad.hcl")
                .expect("a job file")
                .to_owned();
            let text = fs::read_to_string(&path).expect("a text");
            let files = DRIVERS.map(|driver| {
                let [port] = polydev_tests::free_ports();
                text.replace("driver = \"docker\"", &format!("driver = \"{driver}\""))
                    .replace(&format!("compat-{name}"), &act::id(&name, driver))
                    .replace("ARTIFACT_PORT", &artifact.to_string())
                    .replace("STATIC_PORT", &port.to_string())
            });
            Job { name, files }
        })
        .collect();
    jobs.sort_by(|a, b| a.name.cmp(&b.name));
    jobs
}

/// Runs jobs with both drivers at the same time.
fn run(nomad: &Nomad, jobs: &[Job]) -> BTreeMap<String, [Seen; 2]> {
    thread::scope(|scope| {
        let started: Vec<_> = jobs
            .iter()
            .map(|job| {
                let both = [0, 1].map(|which| {
                    scope.spawn(move || {
                        act::run(nomad, &job.name, DRIVERS[which], &job.files[which])
                    })
                });
                (job.name.clone(), both)
            })
            .collect();
        let seen = started.into_iter().map(|(name, both)| {
            let seen = both.map(|one| one.join().unwrap_or_else(|_| panic!("{name}")));
            (name, seen)
        });
        seen.collect()
    })
}

/// Images that a job of the suite needs, beside the one of plain tasks.
fn images() {
    let first = "test $$ = 1 || { echo can only run as pid 1; exit 100; }; echo runs as process 1";
    let script = format!("printf '#!/bin/sh\\n{first}\\nsleep 1\\n' >/init && chmod 755 /init");
    let busybox = "polydev-busybox:1";
    let entrypoint = [r#"ENTRYPOINT ["/init"]"#, "CMD []"];
    make("polydev-first:1", busybox, &script, &entrypoint);
    let script = "cp /usr/bin/id /bin/id-of-root && chmod 4755 /bin/id-of-root";
    let base = "polydev-openai-runtime:latest";
    let entrypoint = [r#"ENTRYPOINT ["/usr/bin/env"]"#, "CMD []"];
    make("polydev-setuid:1", base, script, &entrypoint);
    let entrypoint = [r#"ENTRYPOINT ["sleep", "86400"]"#, "CMD []"];
    make("polydev-pause:1", busybox, "true", &entrypoint);
}

/// Makes an image of another one by a script, with `changes` as of a Dockerfile.
fn make(name: &str, base: &str, script: &str, changes: &[&str]) {
    let create = ["create", "--user", "0", "--entrypoint", "sh", base];
    let id = docker::docker(&[&create[..], &["-c", script]].concat());
    let id = id.trim();
    docker::docker(&["start", "--attach", id]);
    let changes = changes.iter().flat_map(|change| ["--change", change]);
    let commit = ["commit"].into_iter().chain(changes).chain([id, name]);
    docker::docker(&commit.collect::<Vec<_>>());
    docker::docker(&["rm", id]);
}

/// A server on loopback that answers every request with a file. It ends with the process.
fn serve_artifact() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = listener.local_addr().expect("it listens").port();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let mut request = [0; 4096];
            let _count = stream.read(&mut request);
            let body = "fetched\n";
            let head = format!(
                "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
                body.len()
            );
            let is_head = request.starts_with(b"HEAD");
            let body = if is_head { "" } else { body };
            let _gone = stream.write_all(format!("{head}{body}").as_bytes());
        }
    });
    port
}

/// The body of a page on loopback.
fn fetch(port: u64, path: &str) -> String {
    let url = format!("http://127.0.0.1:{port}{path}");
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--show-error", "--fail", "--noproxy", "*"]);
    succeed(curl.args([
        "--retry",
        "20",
        "--retry-connrefused",
        "--retry-delay",
        "1",
        &url,
    ]))
}
