//! Rules in Cedar decide what starts, and every decision is on record.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    process::{Command, Output},
};

use polydev_proto::runtime::RunStart;
use polydev_tests::{
    folder::Folder,
    process::{output, succeed},
    program, wait_until,
};
use rcgen::{KeyPair, PKCS_ED25519};
use serde_json::Value;
use tonic::{Code, Status};

use crate::site::{LIMIT, Site, reason, steps};

const RULES: &str = r#"
    @id("everybody")
    permit (principal, action, resource);

    @id("no_erasing")
    @reason("nothing is erased here")
    forbid (principal, action == Polydev::Action::"command", resource)
    when { context.words.contains("err:erased") };

    @id("bob_asks")
    @outcome("step_up")
    forbid (principal, action, resource is Polydev::Provider)
    when { context.user == "bob" };
"#;

/// A shim with rules and an audit log.
struct Ruled {
    folder: Folder,
    site: Site,
}

impl Ruled {
    fn start(rules: &str, others: &[&str]) -> Self {
        let folder = Folder::new("pdrules-");
        let path = |name: &str| folder.path().join(name).display().to_string();
        let (key, log, policy) = (path("key"), path("log"), path("rules.cedar"));
        fs::write(&key, "5a".repeat(32)).expect("a file can be written");
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).expect("it is ours");
        fs::write(&policy, rules).expect("a file can be written");
        let own = [
            "--policy",
            &policy,
            "--audit-log",
            &log,
            "--audit-key-file",
            &key,
        ];
        let site = Site::start_with(&[("anthropic", 2)], &[&own, others].concat());
        Self { folder, site }
    }

    /// Runs a command of a user to its end.
    fn run(&self, user: &str, words: &[&str]) -> Result<(), Status> {
        let start = RunStart {
            user_id: user.into(),
            ..steps(words)
        };
        self.site.shim.client().run(start).map(drop)
    }

    /// What is on record of decisions, in the order of the log.
    fn decisions(&self) -> Vec<Value> {
        let mut export = Command::new(program("polydev-shim"));
        export
            .args(["audit", "export"])
            .arg(self.folder.path().join("log"));
        export.arg("--key-file").arg(self.folder.path().join("key"));
        let printed = succeed(&mut export);
        let events = printed
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
        events
            .map(|event| event["unmapped"]["policy"].clone())
            .filter(|policy| !policy.is_null())
            .collect()
    }

    /// What `ledger verify` says of what `ledger export` has signed, without the time.
    fn ledger(&self) -> String {
        let path = |name: &str| self.folder.path().join(name);
        let pair = KeyPair::generate_for(&PKCS_ED25519).expect("a key");
        fs::write(path("private.pem"), pair.serialize_pem()).expect("a file can be written");
        let mode = fs::Permissions::from_mode(0o600);
        fs::set_permissions(path("private.pem"), mode).expect("it is ours");
        fs::write(path("public.pem"), pair.public_key_pem()).expect("a file can be written");
        let shim = || Command::new(program("polydev-shim"));
        let mut export = shim();
        export.args(["ledger", "export"]).arg(path("log"));
        export.arg("--key-file").arg(path("key"));
        export.arg("--signing-key-file").arg(path("private.pem"));
        fs::write(path("ledger"), succeed(&mut export)).expect("a file can be written");
        let mut verify = shim();
        verify.args(["ledger", "verify"]).arg(path("ledger"));
        let said = succeed(verify.arg("--public-keys").arg(path("public.pem")));
        let (said, _) = said.split_once(';').expect("it says when");
        said.to_owned()
    }

    fn write(&self, rules: &str) {
        let path = self.folder.path().join("rules.cedar");
        fs::write(path, rules).expect("a file can be written");
    }
}

#[track_caller]
fn is_refused(answer: Result<(), Status>, why: &str, words: &str) {
    let status = answer.expect_err("a refusal");
    assert_eq!(
        (status.code(), reason(&status).as_str()),
        (Code::PermissionDenied, why)
    );
    assert_eq!(status.message(), words);
}

#[test]
fn rules_decide_what_starts_and_each_decision_is_on_record() {
    let ruled = Ruled::start(RULES, &["--approval-timeout", "1"]);
    ruled.run("alice", &["out:done"]).unwrap();
    let words = "the policy blocks this run: nothing is erased here";
    is_refused(
        ruled.run("alice", &["true", "err:erased"]),
        "POLICY_BLOCKED",
        words,
    );
    let words = "nobody has approved this run within 1 s: rule `bob_asks`";
    is_refused(ruled.run("bob", &["true"]), "APPROVAL_REQUIRED", words);
    assert_eq!(ruled.site.node().asked().claims.len(), 1);

    let decisions = ruled.decisions();
    let outcomes: Vec<_> = decisions.iter().map(|policy| &policy["outcome"]).collect();
    // The approval that it waits for, and the start that does not follow.
    assert_eq!(outcomes, ["allow", "block", "step_up", "step_up"]);
    let rules: Vec<_> = decisions.iter().map(|policy| &policy["rules"][0]).collect();
    assert_eq!(rules, ["everybody", "no_erasing", "bob_asks", "bob_asks"]);
    for decision in &decisions {
        for hash in ["policy_hash", "facts_hash"] {
            assert_eq!(decision[hash].as_str().unwrap().len(), 64, "{hash}");
        }
    }
    let ledger = ruled.ledger();
    assert_eq!(ledger, "decisions 1 to 4 are complete and unchanged");
    let log = ruled.site.shim.process.log();
    assert!(!log.contains("err:erased"), "the log has a command");
}

#[test]
fn in_shadow_mode_everything_starts_and_what_would_be_refused_is_on_record() {
    let ruled = Ruled::start(RULES, &["--policy-shadow"]);
    ruled.run("alice", &["true", "err:erased"]).unwrap();
    ruled.run("bob", &["true"]).unwrap();
    let decisions = ruled.decisions();
    let outcomes: Vec<_> = decisions.iter().map(|policy| &policy["outcome"]).collect();
    assert_eq!(outcomes, ["block", "step_up"]);
    assert!(decisions.iter().all(|policy| policy["shadow"] == true));
}

#[test]
fn new_rules_hold_without_a_restart_and_rules_that_are_not_valid_change_nothing() {
    let ruled = Ruled::start("", &[]);
    let words = "the policy blocks this run: no rule permits this";
    is_refused(ruled.run("alice", &["true"]), "POLICY_BLOCKED", words);
    ruled.write("permit (principal, action, resource);");
    wait_until("the rules", LIMIT, || {
        ruled
            .run("alice", &["true"])
            .map_err(|status| status.to_string())
    });
    ruled.write("permit (principal, action, resource) when { context.nothing };");
    wait_until("the warning", LIMIT, || {
        ruled.run("alice", &["true"]).unwrap();
        let log = ruled.site.shim.process.log();
        let is_told = log.contains("cannot use the new policy, keeping the previous one");
        is_told.then_some(()).ok_or_else(|| "no warning".to_owned())
    });
}

/// Runs `polydev-shim policy ...` with files of this content.
fn policy(command: &str, rules: &str, other: Option<&str>) -> Output {
    let folder = Folder::new("pdrules-");
    let file = |name: &str, text: &str| {
        let path = folder.path().join(name);
        fs::write(&path, text).expect("a file can be written");
        path
    };
    let mut run = Command::new(program("polydev-shim"));
    run.args(["policy", command]).arg(file("rules", rules));
    run.args(other.map(|text| file("other", text)));
    output(&mut run)
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

const RUN: &str = r#"
    caller = "cn:a"
    user = "bob"
    provider = "anthropic"
    kind = "prompt"
    prompt = "hello"
"#;

#[test]
fn rules_can_be_tried_out_without_a_shim() {
    let checked = policy("check", RULES, None);
    assert!(
        stdout(&checked).starts_with("the rules are valid; their hash is "),
        "{checked:?}"
    );
    let wrong = policy(
        "check",
        "permit (principal, action, resource) when { context.x };",
        None,
    );
    assert_eq!(wrong.status.code(), Some(125));
    let words = String::from_utf8_lossy(&wrong.stderr).into_owned();
    assert!(words.contains("do not fit the schema"), "{words}");

    let explained = stdout(&policy("explain", RULES, Some(RUN)));
    let words = "outcome: step_up\nreason:  rule `bob_asks`\nrules:   bob_asks\npolicy:  ";
    assert!(explained.starts_with(words), "{explained}");

    let case = |expect: &str, rule: &str| {
        format!(
            "[[case]]\nname = \"bob\"\nexpect = \"{expect}\"\nrule = \"{rule}\"\n[case.run]\n{RUN}"
        )
    };
    let right = policy("test", RULES, Some(&case("step_up", "bob_asks")));
    assert_eq!(stdout(&right), "1 of 1 cases are as expected\n");
    assert_eq!(right.status.code(), Some(0));
    let wrong = policy("test", RULES, Some(&case("step_up", "no_erasing")));
    let words = "bob: expected step_up by `no_erasing`, got step_up by bob_asks: rule `bob_asks`\n\
                 0 of 1 cases are as expected\n";
    assert_eq!(
        (stdout(&wrong).as_str(), wrong.status.code()),
        (words, Some(1))
    );
}
