//! The images with `docker run`: every documented command, as written. And what the shim says of
//! images on nodes, and removes.

use std::{collections::BTreeMap, fs, time::Duration};

use polydev_proto::provider::Vendor;
use polydev_shim::{provider::Cli, secret::Credential};
use polydev_tests::{
    docker::{self, docker},
    fresh_key,
    process::{output, succeed},
    shim::Shim,
    wait_until,
};
use secrecy::ExposeSecret;
use serde_json::Value;

/// What the slots of the pool for Claude Code use.
const POOL: &str = "polydev-anthropic-runtime:latest";

struct Image {
    provider: &'static str,
    title: &'static str,
    key: &'static str,
    cli: &'static str,
    package: &'static str,
}

const IMAGES: [Image; 3] = [
    Image {
        provider: "openai",
        title: "OpenAI",
        key: "OPENAI_API_KEY",
        cli: "codex",
        package: "@openai/codex",
    },
    Image {
        provider: "anthropic",
        title: "Anthropic",
        key: "ANTHROPIC_API_KEY",
        cli: "claude",
        package: "@anthropic-ai/claude-code",
    },
    Image {
        provider: "google",
        title: "Google",
        key: "GOOGLE_API_KEY",
        cli: "gemini",
        package: "@google/gemini-cli",
    },
];

impl Image {
    fn tag(&self) -> String {
        format!("polydev-{}-runtime:latest", self.provider)
    }

    /// `docker run --rm VARIABLES IMAGE ARGV`
    fn run(&self, variables: &[(&str, &str)], argv: &[&str]) -> std::process::Output {
        let mut command = docker::command();
        command.args(["run", "--rm"]);
        for (name, value) in variables {
            command.arg("-e").arg(format!("{name}={value}"));
        }
        output(command.arg(self.tag()).args(argv))
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_container_works_with_a_key() {
    for image in IMAGES {
        let key = fresh_key();
        let script = format!(
            "echo '{} container works' && {} --version",
            image.title, image.cli
        );
        let variables = [
            (image.key, &*key),
            ("PROVIDER", image.provider),
            ("USER_ID", "test_user"),
        ];
        let result = image.run(&variables, &["/bin/sh", "-c", &script]);
        let stdout = text(&result.stdout);
        assert!(result.status.success(), "{}", text(&result.stderr));
        assert!(
            stdout.starts_with(&format!("{} container works\n", image.title)),
            "{stdout}"
        );
        assert!(stdout.lines().count() >= 2, "{stdout}");
        assert!(text(&result.stderr).contains("user test_user"));
        assert!(!text(&result.stderr).contains(&key));
    }
}

#[test]
fn looking_at_the_cli_needs_no_key() {
    for image in IMAGES {
        let version = image.run(&[], &[image.cli, "--version"]);
        assert!(version.status.success(), "{}", text(&version.stderr));
        assert!(text(&version.stdout).contains('.'));
        let tagged = docker(&[
            "images",
            "--format",
            "{{.Tag}}",
            &format!("polydev-{}-runtime", image.provider),
        ]);
        assert!(
            tagged
                .lines()
                .any(|tag| text(&version.stdout).contains(tag)),
            "{tagged}"
        );

        let which = image.run(&[], &["which", image.cli]);
        assert_eq!(
            text(&which.stdout),
            format!("/usr/local/bin/{}\n", image.cli)
        );
        let list = image.run(&[], &["npm", "list", "-g"]);
        assert!(list.status.success() && text(&list.stdout).contains(image.package));
        assert_eq!(text(&image.run(&[], &["id", "-u"]).stdout), "1000\n");
    }
}

#[test]
fn the_cli_without_a_key_is_refused_and_another_command_is_warned() {
    for image in IMAGES {
        let refused = image.run(&[], &[image.cli, "hello"]);
        assert_eq!(refused.status.code(), Some(1));
        assert!(text(&refused.stderr).contains(&format!("ERROR: {} not provided", image.key)));
        assert!(refused.stdout.is_empty());
        let warned = image.run(&[], &["echo", "-n", "a  b", "$(id)"]);
        assert_eq!(text(&warned.stdout), "a  b $(id)");
        assert!(text(&warned.stderr).contains(&format!("WARNING: {} not provided", image.key)));
    }
}

#[test]
fn a_warm_container_stays_up_without_a_key() {
    for image in IMAGES {
        let provider = format!("PROVIDER={}", image.provider);
        let tag = image.tag();
        // As documented, with `--detach` so that the command returns.
        let args = [
            "run",
            "--rm",
            "--detach",
            "-e",
            "WARM_POOL=true",
            "-e",
            &provider,
            &tag,
        ];
        let id = docker(&[&args[..], &["/runtime/entrypoint.sh"]].concat())
            .trim()
            .to_owned();
        wait_until("an idle container", Duration::from_secs(20), || {
            let logs = output(docker::command().args(["logs", &id]));
            if text(&logs.stderr).contains("idle") {
                Ok(())
            } else {
                Err(text(&logs.stderr))
            }
        });
        assert_eq!(docker::inspect(&id)["State"]["Running"], true);
        // The container ends at SIGTERM, so that its stop does not take ten seconds.
        docker(&["stop", "--time", "30", &id]);
    }
}

#[test]
fn debug_tells_what_happens_and_no_secret() {
    for image in IMAGES {
        let key = fresh_key();
        let result = image.run(&[(image.key, &key), ("DEBUG", "true")], &["echo", "hi"]);
        let stderr = text(&result.stderr);
        assert!(
            stderr.contains("DEBUG:") && !stderr.contains(&key),
            "{stderr}"
        );
    }
}

/// The entry point prepares a key for `docker run` as the shim does for a slot.
#[test]
fn entry_point_and_shim_prepare_credentials_alike() {
    for image in IMAGES {
        let projects: &[&str] = if image.provider == "google" {
            &["", "my-project"]
        } else {
            &[""]
        };
        for project in projects {
            let key = fresh_key();
            let mut variables = vec![(image.key, &*key)];
            if !project.is_empty() {
                variables.push(("GOOGLE_PROJECT_ID", project));
            }
            let result = image.run(
                &variables,
                &["sh", "-c", "env; cat ~/.gemini/settings.json || :"],
            );
            let stdout = text(&result.stdout);
            let provider: Vendor = image.provider.parse().unwrap();
            let credential = Credential::ApiKey {
                key: key.clone().into(),
                project_id: Some((*project).to_owned()).filter(|project| !project.is_empty()),
            };
            let prepared = provider.prepare(&credential).unwrap();
            let variables = prepared.env.iter();
            let variables =
                variables.map(|(name, value)| (name.clone(), value.expose_secret().to_owned()));

            let with_key = |line: &&str| {
                let name = line.split('=').next().unwrap_or_default();
                line.contains(&key)
                    || name.starts_with("GOOGLE_")
                    || name.starts_with("GEMINI_") && name != "GEMINI_CLI_NO_RELAUNCH"
            };
            let container: BTreeMap<String, String> = stdout
                .lines()
                .filter(with_key)
                .filter_map(|line| line.split_once('='))
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .collect();
            assert_eq!(container, variables.collect(), "{}", image.provider);
            for file in &prepared.files {
                assert!(
                    stdout.contains(text(file.content.expose_secret()).trim()),
                    "{}: {stdout}",
                    file.path
                );
            }
        }
    }
}

/// Makes an image of nothing but a label. Returns its id.
fn labelled(tag: Option<&str>, label: &str) -> String {
    let folder = tempfile::tempdir().expect("a folder can be made");
    let content = fresh_key();
    let file = format!("FROM scratch\nLABEL {label}=\"{content}\"\n");
    fs::write(folder.path().join("Dockerfile"), file).expect("a file can be written");
    let mut build = docker::command();
    build.args(["build", "--quiet"]);
    if let Some(tag) = tag {
        build.args(["--tag", tag]);
    }
    succeed(build.arg(folder.path())).trim().to_owned()
}

#[test]
fn images_that_nothing_uses_are_shown_and_then_removed_and_no_others() {
    let shim = Shim::dev(&["anthropic=1"]);
    let nonce = std::process::id();
    let (ours, others) = (
        format!("pdtest-ours:{nonce}"),
        format!("pdtest-others:{nonce}"),
    );
    let dangling = labelled(None, "dev.polydev.test");
    let tagged = labelled(Some(&ours), "dev.polydev.test");
    let foreign = labelled(Some(&others), "example.test");
    let nodes = |arguments: &[&str]| {
        let mut command = shim.command(&[&["images"], arguments, &["--output", "json"]].concat());
        let told = succeed(&mut command);
        let nodes = told.lines().map(|line| serde_json::from_str(line).unwrap());
        nodes.collect::<Vec<Value>>()
    };
    let find = |nodes: &[Value], id: &str| {
        let images = nodes[0]["images"].as_array().unwrap();
        images.iter().find(|image| image["image_id"] == id).cloned()
    };
    let listed = nodes(&["list"]);
    for id in [&dangling, &tagged] {
        assert_eq!(find(&listed, id).unwrap()["in_use"], false, "{listed:?}");
    }
    assert_eq!(find(&listed, &tagged).unwrap()["tags"][0], *ours);
    assert!(find(&listed, &foreign).is_none());
    let used = docker::docker(&["image", "inspect", "--format", "{{.Id}}", POOL]);
    assert_eq!(find(&listed, used.trim()).unwrap()["in_use"], true);

    // A dry run changes nothing.
    let shown = nodes(&["prune"]);
    assert!(find(&shown, &dangling).is_some() && find(&shown, &tagged).is_none());
    let shown = nodes(&["prune", "--all"]);
    assert!(find(&shown, &tagged).is_some() && find(&shown, used.trim()).is_none());
    assert!(find(&nodes(&["list"]), &dangling).is_some());

    // Other tests use images with tags, so this one removes none of those.
    let removed = nodes(&["prune", "--yes"]);
    assert!(find(&removed, &dangling).is_some() && find(&removed, &tagged).is_none());
    let left = nodes(&["list"]);
    assert!(find(&left, &dangling).is_none() && find(&left, &tagged).is_some());
    assert!(find(&left, used.trim()).is_some());

    docker::docker(&["image", "rm", &ours, &others]);
    assert!(find(&nodes(&["list"]), &tagged).is_none());
}
