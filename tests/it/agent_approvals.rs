//! Calls of tools of the three real CLIs that wait for somebody's approval.

use std::{
    fs,
    process::{Command, Output},
    thread,
    time::Duration,
};

use polydev_proto::runtime::{
    Approval, ArtifactRules, CancelRunRequest, GetApprovalRequest, ListApprovalsRequest, RunStart,
    agent_event::Event, approval::Subject,
};
use polydev_tests::{
    client::Outcome,
    folder::Folder,
    free_ports,
    process::{output, succeed},
    program, wait_until,
};

use crate::agent_site::{Site, asks};

const RULES: &str = r#"
permit (principal, action, resource is Polydev::Provider);

@id("ask")
@outcome("step_up")
@reason("somebody must know of it")
forbid (principal, action == Polydev::Action::"tool", resource)
when { context.target like "*ask-*" };
"#;
const PROVIDERS: [&str; 3] = ["anthropic", "openai", "google"];
/// How long a CLI may take to make a call.
const LIMIT: Duration = Duration::from_secs(60);

/// A site whose pool asks about tools, and an approver who is somebody else than this test.
struct Approved {
    folder: Folder,
    url: String,
    // Dropped before the files that the shim uses.
    site: Site,
}

impl Approved {
    fn start(provider: &str) -> Self {
        let folder = Folder::new("pdtest-approve-");
        let path = |name: &str| folder.path().join(name).display().to_string();
        let mut certificates = Command::new(program("polydev-shim"));
        succeed(certificates.args(["certs", "dev", &path("tls")]));
        let roles = r#"
            [[role]]
            members = ["spiffe://polydev.test/controller"]
            may = ["approve"]

            [[role]]
            members = ["uid:*"]
            may = ["run", "approve"]
        "#;
        fs::write(path("roles.toml"), roles).expect("a file can be written");
        fs::write(path("rules.cedar"), RULES).expect("a file can be written");
        let [port] = free_ports();
        let url = format!("https://127.0.0.1:{port}");
        let options = [
            format!("--egress={provider}="),
            "--agents=true".into(),
            "--tool-policy".into(),
            format!("--policy={}", path("rules.cedar")),
            format!("--roles={}", path("roles.toml")),
            format!("--listen={url}"),
            format!("--tls-cert={}", path("tls/shim.pem")),
            format!("--tls-key={}", path("tls/shim-key.pem")),
            format!("--tls-ca={}", path("tls/ca.pem")),
        ];
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        Self {
            site: Site::start_with(provider, &options),
            url: url.replace("127.0.0.1", "localhost"),
            folder,
        }
    }

    /// The call that waits, once one does that is not `past`.
    fn waiting(&self, past: &str) -> Approval {
        wait_until("a call that waits", LIMIT, || {
            let all = self.all();
            let mut all = all.into_iter().filter(|one| one.approval_id != past);
            all.next().ok_or_else(|| "none waits".to_owned())
        })
    }

    fn all(&self) -> Vec<Approval> {
        let request = ListApprovalsRequest::default();
        let client = &self.site.client;
        let listed = client.call(async |mut shim| shim.list_approvals(request).await);
        listed.expect("a list").approvals
    }

    fn decide(&self, command: &str, approval_id: &str) -> Output {
        let path = |name: &str| self.folder.path().join("tls").join(name);
        let mut decide = Command::new(program("polydev-shim"));
        decide.args(["approvals", command, approval_id, "--address", &self.url]);
        decide.arg("--tls-cert").arg(path("controller.pem"));
        decide.arg("--tls-key").arg(path("controller-key.pem"));
        output(decide.arg("--tls-ca").arg(path("ca.pem")))
    }

    #[track_caller]
    fn decides(&self, command: &str, approval_id: &str) {
        let output = self.decide(command, approval_id);
        assert!(output.status.success(), "{output:?}");
    }
}

fn runs(provider: &str, commands: &str) -> RunStart {
    let mut start = asks(provider, &format!("Please run: {commands}"));
    start.artifacts = Some(ArtifactRules {
        patterns: vec!["*.txt".into()],
        ..ArtifactRules::default()
    });
    start
}

fn left(outcome: &Outcome) -> Vec<&str> {
    let files = outcome.artifacts.files.iter();
    files.map(|file| file.path.as_str()).collect()
}

#[test]
fn a_call_waits_for_somebody_else_and_is_made_only_if_it_is_approved() {
    for provider in PROVIDERS {
        let approved = Approved::start(provider);
        let start = runs(provider, "touch ask-one.txt ;; touch ask-two.txt");
        let outcome = thread::scope(|scope| {
            let run = scope.spawn(|| approved.site.run(start).2);
            let first = approved.waiting("");
            let id = first.approval_id.as_str();
            let request = GetApprovalRequest {
                approval_id: id.into(),
            };
            let client = &approved.site.client;
            let shown = client.call(async |mut shim| shim.get_approval(request).await);
            let shown = shown.expect("it waits").approval.expect("an approval");
            let Some(Subject::ToolCall(call)) = shown.subject else {
                panic!("{provider}: {shown:?}");
            };
            assert_eq!(call.tool, "shell.exec", "{provider}");
            assert!(call.arguments.contains("touch ask-one.txt"), "{call:?}");
            approved.decides("approve", id);
            let second = approved.waiting(id);
            approved.decides("deny", &second.approval_id);
            run.join().expect("no panic")
        });
        let told = outcome.agent.iter().filter_map(|event| match event {
            Event::ToolApprovalRequired(required) => Some(required.reason.clone()),
            Event::ToolDecision(decision) => {
                Some(format!("{} {}", decision.allowed, decision.reason))
            }
            _ => None,
        });
        let required = "somebody must know of it";
        let denied = "false `spiffe://polydev.test/controller` has denied this call";
        assert_eq!(
            told.collect::<Vec<_>>(),
            [required, "true ", required, denied],
            "{provider}"
        );
        assert_eq!(left(&outcome), ["ask-one.txt"], "{provider}");
        assert_eq!(outcome.exited.exit_code, 0, "{}", outcome.stderr());
    }
}

#[test]
fn a_call_is_withdrawn_with_its_run() {
    let approved = Approved::start("anthropic");
    let start = runs("anthropic", "touch ask-one.txt");
    thread::scope(|scope| {
        let run = scope.spawn(|| approved.site.run(start).2);
        let waiting = approved.waiting("");
        let cancel = CancelRunRequest {
            run_id: waiting.run_id,
            user_id: waiting.user_id,
        };
        let client = &approved.site.client;
        let cancelled = client.call(async |mut shim| shim.cancel_run(cancel).await);
        cancelled.expect("it runs");
        wait_until("the withdrawal", LIMIT, || {
            let left = approved.all();
            left.is_empty().then_some(()).ok_or(format!("{left:?}"))
        });
        let late = approved.decide("approve", &waiting.approval_id);
        assert_eq!(late.status.code(), Some(125), "{late:?}");
        let outcome = run.join().expect("no panic");
        assert!(left(&outcome).is_empty());
    });
}
