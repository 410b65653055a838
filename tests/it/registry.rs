//! Images from a real registry on loopback, with a password.

#![expect(clippy::unwrap_used, reason = "this is a test, its helpers too")]

use std::{
    fs::{self, Permissions},
    io::Write,
    net::TcpListener,
    os::unix::fs::PermissionsExt,
    process::Command,
    time::Duration,
};

use polydev_tests::{
    docker,
    job::{IMAGE, batch, events, merge, shell},
    nomad::Nomad,
    process::{Process, succeed},
    wait_until,
};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

/// Kinds of manifests: an image for several architectures, and an image for one.
const LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const SINGLE: &str = "application/vnd.docker.distribution.manifest.v2+json";

/// A registry with one user. Dropping it stops it and removes the image from the node.
struct Registry {
    process: Process,
    address: String,
    password: String,
    folder: TempDir,
}

impl Registry {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let address = format!("127.0.0.1:{port}");
        let password = format!("{:016x}", rand::random::<u64>());
        let hash = succeed(Command::new("htpasswd").args(["-nbB", "user", &password]));
        let base = folder.path().to_owned();
        let path = |name: &str| base.join(name);
        fs::write(path("htpasswd"), hash.trim()).unwrap();
        let config = format!(
            "version: 0.1\nlog: {{ accesslog: {{ disabled: false }} }}\n\
             storage: {{ filesystem: {{ rootdirectory: {} }} }}\nhttp: {{ addr: {address} }}\n\
             auth: {{ htpasswd: {{ realm: test, path: {} }} }}\n",
            path("data").display(),
            path("htpasswd").display(),
        );
        fs::write(path("config.yml"), config).unwrap();
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(path("config.yml"));
        let registry = Self {
            process: Process::start(&mut command, &path("log")),
            address,
            password,
            folder,
        };
        let client = path("client");
        let client = client.to_str().unwrap();
        wait_until("the registry", Duration::from_secs(20), || {
            let mut login = docker::command();
            login.args([
                "--config",
                client,
                "login",
                "--username",
                "user",
                "--password",
                &registry.password,
                &registry.address,
            ]);
            let done = polydev_tests::process::output(&mut login);
            if done.status.success() {
                Ok(())
            } else {
                Err(String::from_utf8_lossy(&done.stderr).into_owned())
            }
        });
        registry.push(&registry.image());
        registry
    }

    /// Pushes the tests' image under this name.
    fn push(&self, image: &str) {
        docker::docker(&["tag", IMAGE, image]);
        self.push_tagged(image);
    }

    /// Pushes the image that has this name on this machine.
    fn push_tagged(&self, image: &str) {
        let client = self.folder.path().join("client");
        docker::docker(&[
            "--config",
            client.to_str().unwrap(),
            "push",
            "--quiet",
            image,
        ]);
        docker::docker(&["rmi", image]);
    }

    fn image(&self) -> String {
        format!("{}/tests/busybox:1", self.address)
    }

    /// Another image, for an architecture that does not exist.
    fn image_for_another_machine(&self) -> String {
        let manifest = self.manifest("1");
        let digest = hex::encode(Sha256::digest(&manifest));
        let body = json!({
            "schemaVersion": 2, "mediaType": LIST,
            "manifests": [{
                "mediaType": SINGLE, "size": manifest.len(), "digest": format!("sha256:{digest}"),
                "platform": { "architecture": "s390x", "os": "linux" },
            }],
        });
        self.put_manifest("other", LIST, &body.to_string());
        format!("{}/tests/busybox:other", self.address)
    }

    fn manifest(&self, tag: &str) -> String {
        self.curl(&["--header", &format!("Accept: {SINGLE}")], tag)
    }

    fn put_manifest(&self, tag: &str, kind: &str, body: &str) {
        let kind = format!("Content-Type: {kind}");
        self.curl(
            &["--request", "PUT", "--header", &kind, "--data-binary", body],
            tag,
        );
    }

    fn curl(&self, args: &[&str], tag: &str) -> String {
        let user = format!("user:{}", self.password);
        let url = format!("http://{}/v2/tests/busybox/manifests/{tag}", self.address);
        let mut command = Command::new("curl");
        command.args(["--silent", "--fail", "--noproxy", "*", "--user", &user]);
        succeed(command.args(args).arg(url))
    }

    /// How often the image was pulled: each pull starts with one such request.
    fn pulls(&self) -> usize {
        let log = self.process.log();
        log.lines()
            .filter(|line| {
                line.contains("\"HEAD /v2/tests/busybox/manifests/1") && line.contains(" 200 ")
            })
            .count()
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        polydev_tests::process::output(docker::command().args(["rmi", "--force", &self.image()]));
    }
}

fn here(image: &str) -> bool {
    polydev_tests::process::output(docker::command().args(["image", "inspect", image]))
        .status
        .success()
}

#[track_caller]
fn wait_removed(image: &str) {
    wait_until("an image's removal", Duration::from_secs(30), || {
        if here(image) {
            Err(format!("{image} is there"))
        } else {
            Ok(())
        }
    });
}

/// An agent whose plugin gets credentials from a program of the tests.
fn agent_with_helper(registry: &Registry, gc: &str) -> Nomad {
    let helper = registry.folder.path().join("docker-credential-polydevtest");
    let answer = json!({
        "ServerURL": registry.address, "Username": "user", "Secret": registry.password,
    });
    // The program prints credentials for the server that its standard input names.
    let script = format!(
        "#!/bin/sh\nread -r server\n[ \"$1 $server\" = \"get {}\" ] && echo '{answer}'\n",
        registry.address
    );
    fs::write(&helper, script).unwrap();
    fs::set_permissions(&helper, Permissions::from_mode(0o700)).unwrap();
    let options = format!("auth {{\n helper = \"polydevtest\"\n}}\n{gc}");
    Nomad::start_with_programs(&options, registry.folder.path())
}

/// C032, C035, C036, C048
pub(crate) fn a_helper_is_asked_and_a_used_image_stays() {
    let registry = Registry::start();
    let other = format!("{}/tests/busybox:2", registry.address);
    registry.push(&other);
    let nomad = agent_with_helper(&registry, "gc {\n image_delay = \"5s\"\n}");
    let image = registry.image();
    for (id, image) in [("first", &image), ("second", &other)] {
        let mut config = shell("echo pulled");
        merge(&mut config, json!({ "image": image }));
        nomad.submit(&batch(id, config));
        let told = events(&nomad.wait_dead(id));
        assert!(told.contains("Exit Code: 0"), "{told}");
        assert!(here(image));
    }
    // Without this task, the first image would be removed before the second.
    let mut config = shell("until [ -e /alloc/go ]; do sleep 0.05; done");
    merge(&mut config, json!({ "image": image }));
    nomad.submit(&batch("again", config));
    let alloc = nomad.wait_started("again");
    wait_removed(&other);
    assert!(here(&image), "the image was removed under a task");
    let folder = nomad.folder().join("data/alloc").join(alloc).join("alloc");
    fs::write(folder.join("go"), "").unwrap();
    wait_removed(&image);

    // An image whose name now belongs to another image is also removed.
    let latest = format!("{}/tests/busybox:latest", registry.address);
    let id = |image: &str| docker::docker(&["image", "inspect", "--format", "{{.Id}}", image]);
    let mut ids = Vec::new();
    for content in ["one", "two"] {
        let made = docker::docker(&["create", IMAGE]);
        let label = format!("LABEL content={content}");
        let own = format!("{}/tests/busybox:{content}", registry.address);
        docker::docker(&["commit", "--change", &label, made.trim(), &own]);
        docker::docker(&["rm", made.trim()]);
        registry.push_tagged(&own);
        registry.put_manifest("latest", SINGLE, &registry.manifest(content));
        let mut config = shell("echo pulled");
        merge(&mut config, json!({ "image": latest }));
        nomad.submit(&batch(content, config));
        let told = events(&nomad.wait_dead(content));
        assert!(told.contains("Exit Code: 0"), "{told}");
        ids.push(id(&latest).trim().to_owned());
    }
    assert_ne!(ids[0], ids[1]);
    for id in ids {
        wait_removed(&id);
    }
}

#[test]
fn images_are_pulled_once_with_the_tasks_or_the_plugins_credentials() {
    let registry = Registry::start();
    let auths = registry.folder.path().join("client/config.json");
    let nomad = Nomad::start_with(&format!(
        "auth {{\n config = \"{}\"\n}}\n gc {{\n image_delay = \"5s\"\n}}",
        auths.display()
    ));
    several_tasks_at_once_pull_once(&nomad, &registry);
    // Nobody uses the image any more: it is removed after the delay.
    wait_removed(&registry.image());
    a_tasks_own_credentials_win_and_wrong_ones_are_told(&nomad, &registry);
    a_pull_that_fails_is_told_and_tried_again_unless_it_is_final(&nomad, &registry);
    assert!(!nomad.agent_log().contains(&registry.password));
}

/// A job with the registry's image and other options.
fn from_registry(registry: &Registry, id: &str, options: Value) -> Value {
    let mut config = shell("echo pulled");
    merge(&mut config, json!({ "image": registry.image() }));
    merge(&mut config, options);
    batch(id, config)
}

/// With the plugin's credentials.
fn several_tasks_at_once_pull_once(nomad: &Nomad, registry: &Registry) {
    let before = registry.pulls();
    let mut several = from_registry(registry, "several", json!({}));
    several["TaskGroups"][0]["Count"] = json!(6);
    nomad.submit(&several);
    wait_until("six tasks", Duration::from_secs(60), || {
        let done = nomad
            .allocations("several")
            .iter()
            .filter(|alloc| alloc["ClientStatus"] == "complete")
            .count();
        if done == 6 {
            Ok(())
        } else {
            Err(done.to_string())
        }
    });
    wait_until("the registry's log", Duration::from_secs(10), || {
        match registry.pulls() - before {
            0 => Err(registry.process.log()),
            _ => Ok(()),
        }
    });
    assert_eq!(registry.pulls() - before, 1);
    // A later task found the image on the node.
    let told: String = nomad.allocations("several").iter().map(events).collect();
    let image = registry.image();
    assert!(
        told.contains(&format!("Downloading image {image}"))
            && told.contains(&format!("Downloaded image {image}")),
        "{told}"
    );
}

fn a_tasks_own_credentials_win_and_wrong_ones_are_told(nomad: &Nomad, registry: &Registry) {
    let wrong = json!({ "auth": { "username": "user", "password": "wrong" } });
    nomad.submit(&from_registry(registry, "wrong", wrong));
    let told = events(&nomad.wait_dead("wrong"));
    assert!(
        told.contains("cannot pull image") && told.contains(&registry.image()),
        "{told}"
    );
    let right = json!({ "auth": { "username": "user", "password": registry.password } });
    nomad.submit(&from_registry(registry, "right", right));
    let told = events(&nomad.wait_dead("right"));
    assert!(told.contains("Exit Code: 0"), "{told}");
}

/// A missing image, or an image for another architecture, is a final error. A registry that is
/// missing or broken is not.
fn a_pull_that_fails_is_told_and_tried_again_unless_it_is_final(
    nomad: &Nomad,
    registry: &Registry,
) {
    // Registries that never answer, and registries that answer with nonsense.
    let hanging = TcpListener::bind("127.0.0.1:0").unwrap();
    let nonsense = TcpListener::bind("127.0.0.1:0").unwrap();
    let reference =
        |listener: &TcpListener| format!("{}/busybox:1", listener.local_addr().unwrap());
    let (hangs, babbles) = (reference(&hanging), reference(&nonsense));
    std::thread::spawn(move || {
        for mut client in nonsense.incoming().flatten() {
            let _gone = client.write_all(b"\xff\x00 yes? \r\n\r\n");
        }
    });
    for (id, reference, words) in [
        ("hangs", hangs, "not finished within 2s"),
        ("babbles", babbles, "cannot pull image"),
        (
            "machine",
            registry.image_for_another_machine(),
            "no matching manifest for linux",
        ),
        (
            "missing",
            format!("{}/tests/nothing:1", registry.address),
            "cannot pull image",
        ),
        (
            "dead",
            "127.0.0.1:9/busybox:1".to_owned(),
            "cannot pull image",
        ),
    ] {
        let options = json!({ "image": reference, "image_pull_timeout": "2s" });
        let mut job = from_registry(registry, id, options);
        job["TaskGroups"][0]["RestartPolicy"] = json!({ "Attempts": 1, "Interval": 60_000_000_000_u64, "Delay": 100_000_000, "Mode": "fail" });
        nomad.submit(&job);
        let told = events(&nomad.wait_dead(id));
        assert!(told.contains(words), "{told}");
        let is_final = ["missing", "machine"].contains(&id);
        assert_eq!(told.contains("\nRestarting"), !is_final, "{told}");
    }
}
