//! Somebody must approve what a rule says, before anything happens.

use std::{
    fs,
    net::TcpListener,
    os::unix::fs::PermissionsExt,
    process::{Command, Output},
    sync::mpsc,
    time::Duration,
};

use axum::{Router, body::Bytes, extract::State, http::HeaderMap, routing::post};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use polydev_proto::{
    execution::Presented,
    runtime::{
        Approval, ApprovalRequired, ApproveRequest, DenyRequest, GetApprovalRequest,
        ListApprovalsRequest, RunStart, SubmitJobRequest, WatchApprovalsRequest, run_event::Event,
    },
    signing::PublicKeys,
};
use polydev_tests::{
    client::{Client, Events},
    folder::Folder,
    process::{output, succeed},
    program, wait_until,
};
use rcgen::{KeyPair, PKCS_ED25519};
use ring::hmac;
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use tonic::{Code, Status};

use crate::{
    certificates::{Tls, words},
    site::{LIMIT, Site, myself, reason, steps},
};

const RULES: &str = r#"
    permit (principal, action, resource);

    @id("deploys")
    @outcome("step_up")
    @reason("deployments are approved")
    forbid (principal, action, resource is Polydev::Provider)
    when { context.words.contains("out:deployed") };
"#;

/// A shim with rules, for the test's user and an approver with a certificate.
struct Approved {
    folder: Folder,
    tls: Tls,
    public: String,
    /// Calls end with it.
    client: Client,
    // Dropped before the files that the shim uses.
    site: Site,
}

impl Approved {
    fn start(others: &[&str]) -> Self {
        let folder = Folder::new("pdapprove-");
        let path = |name: &str| folder.path().join(name).display().to_string();
        let private = |name: &str, text: &str| {
            fs::write(path(name), text).expect("a file can be written");
            let mode = fs::Permissions::from_mode(0o600);
            fs::set_permissions(path(name), mode).expect("it is ours");
        };
        fs::write(path("rules.cedar"), RULES).expect("a file can be written");
        private("audit.key", &"5a".repeat(32));
        let pair = KeyPair::generate_for(&PKCS_ED25519).expect("a key");
        private("execution.pem", &pair.serialize_pem());
        let myself = myself();
        let tls = Tls::with_roles(&format!(
            r#"
            [[role]]
            members = ["spiffe://polydev.test/controller"]
            may = ["approve"]
            users = ["team-*"]

            [[role]]
            members = ["{myself}"]
            may = ["run", "approve"]
            "#
        ));
        let mut options = tls.options();
        for (name, value) in [
            ("--policy", path("rules.cedar")),
            ("--audit-log", path("log")),
            ("--audit-key-file", path("audit.key")),
            ("--execution-key-file", path("execution.pem")),
        ] {
            options.extend([name.to_owned(), value]);
        }
        let options = [&words(&options), others].concat();
        let site = Site::start_with(&[("anthropic", 1)], &options);
        Self {
            client: site.shim.client(),
            site,
            public: pair.public_key_pem(),
            folder,
            tls,
        }
    }

    /// Starts what a rule wants to have approved. Returns its events, and what the first one says.
    fn deploy(&self, user: &str) -> (Events, ApprovalRequired) {
        let client = &self.client;
        let (_input, mut events) = client.submit(deploy(user)).expect("it waits");
        let first = client.next_of(&mut events).expect("an event");
        let Some(Event::ApprovalRequired(required)) = first else {
            panic!("the first event is {first:?}");
        };
        (events, required)
    }

    /// What becomes of it.
    fn end(&self, events: &mut Events) -> Result<i32, Status> {
        let client = &self.client;
        loop {
            if let Some(Event::Exited(exited)) = client.next_of(events)? {
                return Ok(exited.exit_code);
            }
        }
    }

    /// `polydev-shim approvals ...` as the approver.
    fn approver(&self, arguments: &[&str]) -> Output {
        let files = self.tls.files("controller");
        let mut command = Command::new(program("polydev-shim"));
        command.arg("approvals").args(arguments);
        command.arg("--address");
        command.arg(self.tls.url.replace("127.0.0.1", "localhost"));
        command.arg("--tls-cert").arg(&files.certificate);
        command.arg("--tls-key").arg(&files.key);
        command.arg("--tls-ca").arg(&files.authority);
        output(&mut command)
    }

    #[track_caller]
    fn approves(&self, arguments: &[&str]) -> String {
        let output = self.approver(arguments);
        assert!(output.status.success(), "{output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn waiting(&self) -> Vec<Approval> {
        let request = ListApprovalsRequest::default();
        let client = &self.client;
        let listed = client.call(async |mut shim| shim.list_approvals(request).await);
        listed.expect("a list").approvals
    }

    /// The operations on record with what they are about, but for listing.
    fn recorded(&self) -> Vec<(String, bool, Value)> {
        let mut export = Command::new(program("polydev-shim"));
        let path = |name: &str| self.folder.path().join(name);
        export.args(["audit", "export"]).arg(path("log"));
        let printed = succeed(export.arg("--key-file").arg(path("audit.key")));
        let events = printed
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
        let told = events.map(|event| {
            let operation = event["api"]["operation"].as_str().expect("a name");
            let is_allowed = event["status_id"] == 1;
            let approval = event["unmapped"]["approval"].clone();
            (operation.to_owned(), is_allowed, approval)
        });
        told.filter(|(operation, ..)| operation != "see_approvals" && operation != "look")
            .collect()
    }
}

fn deploy(user: &str) -> RunStart {
    RunStart {
        user_id: user.into(),
        ..steps(&["out:deployed"])
    }
}

#[test]
fn a_run_waits_until_somebody_else_has_approved_it() {
    let approved = Approved::start(&[]);
    let (mut events, required) = approved.deploy("team-a");
    assert_eq!(required.reason, "deployments are approved");
    let id = required.approval_id.as_str();
    let listed = approved.approves(&["list"]);
    let line = listed.lines().nth(1).expect("it waits");
    assert!(
        line.starts_with(id) && line.ends_with("out:deployed"),
        "{listed}"
    );
    let shown = approved.approves(&["show", id]);
    assert!(
        shown.contains("command       \"out:deployed\"\n"),
        "{shown}"
    );
    assert!(shown.contains("rules         deploys\n"), "{shown}");

    // Others pass it, and nobody approves their own.
    let client = &approved.client;
    client.run(steps(&["true"])).expect("it needs no approval");
    assert_eq!(approved.site.node().asked().claims.len(), 1);
    let own = ApproveRequest {
        approval_id: id.into(),
        ..ApproveRequest::default()
    };
    let refused = client.call(async |mut shim| shim.approve(own).await);
    let refused = refused.expect_err("it is their own");
    assert_eq!(
        (refused.code(), &*reason(&refused)),
        (Code::PermissionDenied, "OWN_APPROVAL")
    );

    let said = approved.approves(&["approve", id, "--comment", "go on"]);
    assert_eq!(said, format!("approved {id}\n"));
    assert_eq!(approved.end(&mut events).expect("it ran"), 0);
    let mut claim = approved.site.node().asked().claims.pop().expect("a claim");
    let keys = PublicKeys::read(approved.public.as_bytes()).expect("a public key");
    let presented = Presented::take(&mut claim);
    let (audience, image) = (
        approved.site.node().identity(),
        "polydev-anthropic-runtime:latest",
    );
    let now = std::time::SystemTime::now();
    let permit = presented.check(&keys, audience, image, None, now);
    let permit = permit.expect("a token");
    assert_eq!(permit.approver, "spiffe://polydev.test/controller");
    assert_eq!(permit.policy_hash.len(), 64);

    let recorded = approved.recorded();
    let told: Vec<_> = recorded
        .iter()
        .map(|(operation, is_allowed, _)| (operation.as_str(), *is_allowed))
        .collect();
    assert_eq!(
        told,
        [
            ("request_approval", true),
            ("start", true),
            ("approve", false),
            ("approve", true),
            ("start", true),
        ]
    );
    assert_eq!(recorded[3].2["comment"], "go on");
    let by = json!("spiffe://polydev.test/controller");
    assert_eq!(
        (&recorded[4].2["id"], &recorded[4].2["approved_by"]),
        (&json!(id), &by)
    );
}

#[test]
fn what_is_denied_or_left_alone_does_not_happen() {
    let approved = Approved::start(&["--approval-timeout", "2"]);
    let (mut events, required) = approved.deploy("team-a");
    approved.approves(&["deny", &required.approval_id, "--comment", "not today"]);
    let denied = approved.end(&mut events).expect_err("it is denied");
    assert_eq!(reason(&denied), "APPROVAL_DENIED");
    let words = "`spiffe://polydev.test/controller` has denied this run: not today";
    assert_eq!(denied.message(), words);

    let (mut events, _) = approved.deploy("team-a");
    let expired = approved.end(&mut events).expect_err("nobody approves it");
    assert_eq!(reason(&expired), "APPROVAL_REQUIRED");
    let words = "nobody has approved this run within 2 s: deployments are approved";
    assert_eq!(expired.message(), words);

    let (events, _) = approved.deploy("team-a");
    drop(events);
    wait_until("the withdrawal", LIMIT, || {
        let left = approved.waiting();
        left.is_empty().then_some(()).ok_or(format!("{left:?}"))
    });
    assert!(approved.site.node().asked().claims.is_empty());
    let recorded = approved.recorded();
    let starts = recorded
        .iter()
        .filter(|(operation, ..)| operation == "start");
    let allowed: Vec<_> = starts.map(|(_, is_allowed, _)| *is_allowed).collect();
    assert_eq!(allowed, [false, false, false], "denied, expired, withdrawn");
}

#[test]
fn an_approver_sees_and_decides_only_what_a_role_is_for() {
    let approved = Approved::start(&[]);
    let (_events, required) = approved.deploy("bob");
    let id = required.approval_id.as_str();
    assert_eq!(
        approved.approves(&["list"]).lines().count(),
        1,
        "the heading"
    );
    for arguments in [&["show", id][..], &["approve", id], &["deny", id]] {
        let refused = approved.approver(arguments);
        let words = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!(refused.status.code(), Some(125), "{words}");
        assert!(
            words.contains("see, grant or deny approvals of user `bob`"),
            "{words}"
        );
    }
    // Somebody without such a role is not even told that there are any.
    let client = &approved.client;
    approved.tls.write_roles(&format!(
        "[[role]]\nmembers = [\"{}\"]\nmay = [\"run\"]",
        myself()
    ));
    let denied = wait_until("the new roles", LIMIT, || {
        let request = ListApprovalsRequest::default();
        let listed = client.call(async |mut shim| shim.list_approvals(request).await);
        listed.err().ok_or_else(|| "a list".to_owned())
    });
    assert_eq!(reason(&denied), "NOT_ALLOWED");
}

#[test]
fn who_watches_hears_of_each_that_comes_and_ends() {
    let approved = Approved::start(&[]);
    let client = &approved.client;
    let (mut first, required) = approved.deploy("team-a");
    let request = WatchApprovalsRequest {
        user_id: "team-a".into(),
        ..WatchApprovalsRequest::default()
    };
    let watched = client.call(async |mut shim| shim.watch_approvals(request).await);
    let mut watched = watched.expect("a stream");
    let mut next = || {
        let told = client.call(async |_| watched.message().await.map(tonic::Response::new));
        let told = told.expect("no error").expect("a message").approvals;
        let [one] = &told[..] else {
            panic!("{told:?}");
        };
        (one.approval_id.clone(), one.state().as_str_name())
    };
    let id = required.approval_id;
    assert_eq!(next(), (id.clone(), "APPROVAL_STATE_PENDING"));
    let (_second, other) = approved.deploy("team-a");
    assert_eq!(next(), (other.approval_id, "APPROVAL_STATE_PENDING"));
    let deny = DenyRequest {
        approval_id: id.clone(),
        ..DenyRequest::default()
    };
    client
        .call(async |mut shim| shim.deny(deny).await)
        .expect("their own");
    assert_eq!(next(), (id.clone(), "APPROVAL_STATE_DENIED"));
    approved.end(&mut first).expect_err("it is denied");
    let over = GetApprovalRequest { approval_id: id };
    let over = client.call(async |mut shim| shim.get_approval(over).await);
    assert_eq!(reason(&over.expect_err("it is over")), "NO_APPROVAL");
}

#[test]
fn a_call_that_answers_when_there_is_a_slot_answers_after_the_approval() {
    let approved = Approved::start(&[]);
    let client = &approved.client;
    let submitted = std::thread::scope(|scope| {
        let submit = scope.spawn(|| {
            let start = Some(deploy("team-a"));
            client.call(async |mut shim| shim.submit_job(SubmitJobRequest { start }).await)
        });
        let id = wait_until("the approval", LIMIT, || {
            let waiting = approved.waiting();
            let one = waiting.first().ok_or("nothing waits")?;
            Ok::<_, String>(one.approval_id.clone())
        });
        assert!(!submit.is_finished());
        approved.approves(&["approve", &id]);
        submit.join().expect("no panic")
    });
    assert!(submitted.expect("it runs").accepted.is_some());
}

#[test]
fn a_webhook_is_told_what_waits_and_what_becomes_of_it_but_not_the_command() {
    let runtime = Runtime::new().expect("a runtime can be made");
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    let url = format!(
        "http://{}/hook",
        listener.local_addr().expect("a bound socket")
    );
    let (sender, requests) = mpsc::channel::<(HeaderMap, Bytes)>();
    let router = Router::new().route(
        "/hook",
        post(
            async |State(sender): State<mpsc::Sender<_>>, headers: HeaderMap, body: Bytes| {
                sender.send((headers, body)).expect("the test listens");
            },
        ),
    );
    runtime.spawn(async move {
        listener.set_nonblocking(true).expect("it can be set");
        let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
        axum::serve(listener, router.with_state(sender)).await
    });
    let folder = Folder::new("pdhook-");
    let secret = folder.path().join("secret");
    let key = [7; 32];
    fs::write(&secret, format!("whsec_{}\n", BASE64_STANDARD.encode(key))).expect("a file");
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).expect("it is ours");
    let secret = secret.display().to_string();
    let approved = Approved::start(&[
        "--approval-webhook",
        &url,
        "--approval-webhook-secret-file",
        &secret,
    ]);
    let next = || {
        let (headers, body) = requests.recv_timeout(LIMIT).expect("a request");
        let header = |name: &str| headers[name].to_str().expect("text").to_owned();
        let [id, at] = ["webhook-id", "webhook-timestamp"].map(header);
        let text = String::from_utf8(body.to_vec()).expect("text");
        let signature = header("webhook-signature");
        let signature = signature.strip_prefix("v1,").expect("its version");
        let signature = BASE64_STANDARD.decode(signature).expect("base64");
        let signed = format!("{id}.{at}.{text}");
        let key = hmac::Key::new(hmac::HMAC_SHA256, &key);
        hmac::verify(&key, signed.as_bytes(), &signature).expect("its signature");
        assert!(!text.contains("deployed"), "{text}");
        serde_json::from_str::<Value>(&text).expect("JSON")
    };
    let (mut events, required) = approved.deploy("team-a");
    let told = next();
    assert_eq!(told["type"], "approval.requested");
    assert_eq!(told["data"]["approval_id"], required.approval_id);
    assert_eq!(told["data"]["user_id"], "team-a");
    approved.approves(&["approve", &required.approval_id]);
    let told = next();
    assert_eq!(told["type"], "approval.approved");
    assert_eq!(
        told["data"]["decided_by"],
        "spiffe://polydev.test/controller"
    );
    approved.end(&mut events).expect("it ran");
    let more = requests.recv_timeout(Duration::from_millis(1));
    assert!(more.is_err(), "{more:?}");
}
