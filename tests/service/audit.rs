//! The audit log of a shim that is killed has everything that was done, and no secret.

use std::{fs, os::unix::fs::PermissionsExt, path::PathBuf, process::Command};

use polydev_proto::runtime::RunStart;
use polydev_tests::{
    client::{Client, api_key},
    folder::Folder,
    process::{output, succeed},
    program,
};
use serde_json::Value;

use crate::{
    certificates::{Tls, words},
    site::{Site, myself, steps},
};

const SECRET: &str = "only-for-the-container";
/// The site looks at its pools.
fn roles() -> String {
    let myself = myself();
    format!(
        "[[role]]\nmembers = [\"spiffe://polydev.test/controller\"]\nmay = [\"run\"]\n\
         users = [\"team-a\"]\n[[role]]\nmembers = [\"{myself}\"]\nmay = [\"scale\"]\n"
    )
}

struct Audited {
    folder: Folder,
}

impl Audited {
    fn new() -> Self {
        let folder = Folder::new("pdaudit-");
        let key = folder.path().join("key");
        fs::write(&key, "5a".repeat(32)).expect("a file can be written");
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).expect("it is ours");
        Self { folder }
    }

    fn log(&self) -> PathBuf {
        self.folder.path().join("log")
    }

    fn options(&self, tls: &Tls) -> Vec<String> {
        let key = self.folder.path().join("key").display().to_string();
        let log = self.log().display().to_string();
        let own = ["--audit-log", &log, "--audit-key-file", &key].map(str::to_owned);
        [tls.options(), own.to_vec()].concat()
    }

    fn command(&self, name: &str) -> Command {
        let mut command = Command::new(program("polydev-shim"));
        command.args(["audit", name]).arg(self.log());
        command
            .arg("--key-file")
            .arg(self.folder.path().join("key"));
        command
    }

    fn events(&self) -> Vec<Value> {
        let printed = succeed(&mut self.command("export"));
        let events = printed.lines().map(serde_json::from_str);
        events.collect::<Result<_, _>>().expect("JSON")
    }

    fn file(&self) -> PathBuf {
        self.log().join(format!("audit-{:020}.jsonl", 1))
    }
}

#[test]
fn what_was_done_and_what_was_denied_is_on_record_when_the_shim_is_killed() {
    let (audited, tls) = (Audited::new(), Tls::with_roles(&roles()));
    let options = audited.options(&tls);
    let site = Site::start_with(&[("anthropic", 1)], &words(&options));
    let client = Client::connect_as(&tls.url, tls.files("controller")).unwrap();
    let start = RunStart {
        user_id: "team-a".into(),
        credential: Some(api_key(SECRET)),
        ..steps(&["wait"])
    };
    let run = client.start(start).unwrap();
    let run_id = run.accepted.run_id.clone();
    client.get_run_as("team-a", &run_id).unwrap();
    drop(client.attach_as("team-a", &run_id, [0; 2]).unwrap());
    client.cancel_as("team-a", &run_id).unwrap();
    assert!(client.get_run_as("team-b", &run_id).is_err());
    // SIGKILL: nothing is written any more.
    drop(site);

    let verified = succeed(&mut audited.command("verify"));
    assert!(verified.contains("complete and unchanged"), "{verified}");
    let events = audited.events();
    let known: Vec<_> = events
        .iter()
        .map(|event| {
            let resource = &event["resources"][0];
            (
                event["api"]["operation"].as_str().unwrap_or_default(),
                event["status_id"].as_u64().unwrap_or_default(),
                resource["owner"]["uid"].as_str().unwrap_or_default(),
                resource["uid"].as_str().unwrap_or_default(),
            )
        })
        .collect();
    let id = run_id.as_str();
    for expected in [
        ("start", 1, "team-a", id),
        ("see", 1, "team-a", id),
        ("attach", 1, "team-a", id),
        ("cancel", 1, "team-a", id),
        ("see", 2, "team-b", id),
    ] {
        assert!(
            known.contains(&expected),
            "{expected:?} is not in {known:?}"
        );
    }
    for event in &events {
        assert_eq!(event["src_endpoint"]["ip"], "127.0.0.1");
        assert_eq!(
            event["actor"]["user"]["name"],
            "spiffe://polydev.test/controller"
        );
    }
    let text = fs::read_to_string(audited.file()).unwrap();
    for secret in [SECRET, &"5a".repeat(32), "wait"] {
        assert!(!text.contains(secret), "{secret} is in {text}");
    }

    // The next shim continues it.
    let before = text.lines().count();
    let _again = Site::start_with(&[], &words(&options));
    let client = Client::connect_as(&tls.url, tls.files("controller")).unwrap();
    assert!(client.get_run_as("team-b", &run_id).is_err());
    let text = fs::read_to_string(audited.file()).unwrap();
    assert_eq!(text.lines().count(), before + 1);
    succeed(&mut audited.command("verify"));
}

#[test]
fn a_log_that_was_changed_is_refused_with_the_place() {
    let (audited, tls) = (Audited::new(), Tls::with_roles(&roles()));
    let options = audited.options(&tls);
    let site = Site::start_with(&[("anthropic", 1)], &words(&options));
    let client = Client::connect_as(&tls.url, tls.files("controller")).unwrap();
    for _ in 0..2 {
        assert!(client.get_run_as("team-b", "0199").is_err());
        let start = RunStart {
            user_id: "team-b".into(),
            ..steps(&["wait"])
        };
        assert!(client.start(start).is_err());
    }
    drop(site);
    let text = fs::read_to_string(audited.file()).unwrap();
    fs::write(audited.file(), text.replacen("team-b", "team-a", 1)).unwrap();
    let verified = output(&mut audited.command("verify"));
    let words = String::from_utf8_lossy(&verified.stderr);
    assert_eq!(verified.status.code(), Some(125), "{words}");
    assert!(
        words.contains("line 2: line 2 of the log was changed"),
        "{words}"
    );

    let mut serve = Command::new(program("polydev-shim"));
    let refused = output(serve.arg("serve").args(&options));
    let words = String::from_utf8_lossy(&refused.stderr);
    assert!(
        !refused.status.success() && words.contains("was changed"),
        "{words}"
    );
}
