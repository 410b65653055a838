//! The images with `docker run`: every documented command, as written.

use std::{collections::BTreeMap, time::Duration};

use polydev_proto::provider::Vendor;
use polydev_shim::{provider::Cli, secret::Credential};
use polydev_tests::{
    docker::{self, docker},
    fresh_key,
    process::output,
    wait_until,
};
use secrecy::ExposeSecret;

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
