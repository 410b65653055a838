//! Makes every call of the API with grpcurl. Collects the names of the calls that gave the expected
//! answer.

use std::{
    collections::BTreeSet,
    process::{Command, Stdio},
    time::Duration,
};

use polydev_tests::{
    process::{output, succeed},
    root,
    shim::Shim,
    wait_until,
};
use serde_json::{Value, json};

const PROVIDER: &str = "anthropic";
/// How long a run may take to wait for its approval.
const LIMIT: Duration = Duration::from_secs(20);

/// Uses reflection instead of the protocol's files.
pub(super) fn calls(shim: &Shim) -> BTreeSet<String> {
    let program = succeed(&mut Command::new(root().join("tests/grpcurl.sh")));
    let mut grpcurl = Grpcurl {
        program: program.trim().to_owned(),
        address: shim.address.clone(),
        made: BTreeSet::new(),
    };
    grpcurl.pools();
    grpcurl.credentials();
    grpcurl.runs();
    let name = Grpcurl::with(json!({}));
    let lease_id = grpcurl.last("Allocate", name.clone())["lease"]["leaseId"].clone();
    let script = json!({ "user_id": "grpcurl", "script": "print(6 * 7)" });
    let result = grpcurl.last("RunScript", script);
    assert_eq!(result["status"], "SCRIPT_STATUS_SUCCESS", "{result}");
    let release = json!({ "lease_id": lease_id, "user_id": "grpcurl" });
    grpcurl.call("Release", &[], release);
    grpcurl.approvals();
    grpcurl.call("DeleteCredential", &[], name);
    grpcurl.made
}

/// grpcurl, and the names of the calls that it has made.
struct Grpcurl {
    program: String,
    address: String,
    made: BTreeSet<String>,
}

/// The time limit of calls that do not end by themselves.
const SHORT: [&str; 2] = ["-max-time", "2"];

impl Grpcurl {
    fn command(&self, method: &str, options: &[&str], request: &Value) -> Command {
        let mut command = Command::new(&self.program);
        command.args(["-plaintext", "-emit-defaults"]).args(options);
        command.args(["-d", &request.to_string(), &self.address]);
        command.arg(format!("polydev.runtime.v1.RuntimeService/{method}"));
        command
    }

    fn call(&mut self, method: &str, options: &[&str], request: Value) -> Vec<Value> {
        let mut command = self.command(method, options, &request);
        let answered = output(&mut command);
        let words = String::from_utf8_lossy(&answered.stderr).into_owned();
        let is_late = options.contains(&"-max-time") && words.contains("DeadlineExceeded");
        assert!(answered.status.success() || is_late, "{method}: {words}");
        self.made.insert(method.to_owned());
        let answers = serde_json::Deserializer::from_slice(&answered.stdout);
        let answers = answers.into_iter::<Value>();
        answers.map(|answer| answer.expect("valid JSON")).collect()
    }

    /// The last message of the answer, or the only one.
    fn last(&mut self, method: &str, request: Value) -> Value {
        let mut answers = self.call(method, &[], request);
        answers.pop().expect("an answer has a message")
    }

    /// A request with `what`, a user and a provider.
    fn with(mut what: Value) -> Value {
        what["user_id"] = "grpcurl".into();
        what["provider"] = PROVIDER.into();
        what
    }

    fn pools(&mut self) {
        let status = self.call("GetClusterStatus", &[], json!({}));
        assert_eq!(status[0]["nodes"][0]["reachable"], true);
        let images = self.call("ListImages", &[], json!({}));
        assert!(images[0]["nodes"][0]["images"].is_array());
        let prune = self.call("PruneImages", &[], json!({ "all": true }));
        assert_eq!(prune[0]["nodes"][0]["reachable"], true);
        let pools = self.call("ListPools", &[], json!({}));
        assert_eq!(pools[0]["pools"][0]["provider"], "anthropic");
        let pool = self.call("GetPool", &[], json!({ "provider": "anthropic" }));
        assert_eq!(pool[0]["pool"]["slots"], 2);
        let watched = self.call("WatchPools", &SHORT, json!({}));
        assert_eq!(watched[0]["nodesConnected"], 1);
        let google = json!({ "provider": "google" });
        let scaled = self.last("ScalePool", json!({ "provider": "google", "size": 0 }));
        assert_eq!(scaled["scaled"]["to"], 0);
        let drained = self.last("DrainPool", google.clone());
        assert!(drained["drained"].is_object());
        let resumed = self.last("ResumePool", google);
        assert!(resumed["scaled"].is_object());
    }

    fn credentials(&mut self) {
        let secret = json!({ "environment": { "variables": { "SECRET": "of the store" } } });
        let put = Self::with(json!({ "credential": { "secret": secret } }));
        let put = self.call("PutCredential", &[], put);
        assert_eq!(put[0]["credential"]["version"], "1");
        let listed = self.call("ListCredentials", &[], json!({ "user_id": "grpcurl" }));
        assert_eq!(
            listed[0]["credentials"][0]["kind"],
            "CREDENTIAL_KIND_ENVIRONMENT"
        );
        let rotated = self.call("RotateCredentials", &[], json!({}));
        assert_eq!(rotated[0]["left"], "0");
    }

    fn approvals(&mut self) {
        let start = Self::with(json!({ "argv": { "text": ["needs-approval"] } }));
        let mut run = self.command("Run", &[], &json!({ "start": start }));
        let run = run.stdout(Stdio::null()).stderr(Stdio::piped());
        let run = run.spawn().expect("it is installed");
        let approval_id = wait_until("the approval", LIMIT, || {
            let listed = self.last("ListApprovals", json!({ "user_id": "grpcurl" }));
            let id = listed["approvals"][0]["approvalId"].clone();
            id.is_string()
                .then_some(id)
                .ok_or_else(|| listed.to_string())
        });
        let watched = self.call("WatchApprovals", &SHORT, json!({}));
        assert_eq!(watched[0]["approvals"][0]["approvalId"], approval_id);
        let name = json!({ "approval_id": approval_id });
        let shown = self.last("GetApproval", name.clone());
        assert_eq!(shown["approval"]["run"]["argv"][0], "needs-approval");
        let mut own = self.command("Approve", &[], &name);
        let words = String::from_utf8_lossy(&output(&mut own).stderr).into_owned();
        assert!(words.contains("somebody else must approve it"), "{words}");
        self.made.insert("Approve".into());
        let denied = self.last("Deny", name);
        assert_eq!(denied["approval"]["state"], "APPROVAL_STATE_DENIED");
        let ended = run.wait_with_output().expect("it ends");
        let words = String::from_utf8_lossy(&ended.stderr).into_owned();
        assert!(words.contains("has denied this run"), "{words}");
    }

    fn runs(&mut self) {
        let user = json!({ "user_id": "grpcurl" });
        let stored = Self::with(json!({
            "argv": { "text": ["sh", "-c", "echo $SECRET"] }, "credential": { "stored": {} },
        }));
        let events = self.call("Run", &[], json!({ "start": stored }));
        let written = |event: &Value| event["event"]["stdout"]["data"] == "b2YgdGhlIHN0b3JlCg==";
        assert!(events.iter().any(written), "{events:?}");
        let sleeps = Self::with(json!({ "argv": { "text": ["sleep", "300"] } }));
        let submitted = self.call("SubmitJob", &[], json!({ "start": sleeps }));
        let run_id = submitted[0]["accepted"]["runId"].clone();
        let of_run = json!({ "run_id": run_id, "user_id": "grpcurl" });
        let shown = self.call("GetRun", &[], of_run.clone());
        assert_eq!(shown[0]["run"]["runId"], run_id);
        let listed = self.call("ListRuns", &[], user.clone());
        assert_eq!(listed[0]["runs"][0]["runId"], run_id);
        let watched = self.call("WatchRuns", &SHORT, user);
        let is_it = |told: &Value| told["runs"][0]["runId"] == run_id;
        assert!(watched.iter().any(is_it), "{watched:?}");
        self.call("CancelRun", &[], of_run.clone());
        let last = self.last("Attach", json!({ "start": of_run }));
        let exited = &last["event"]["exited"];
        assert_eq!(exited["reason"], "EXIT_REASON_CANCELLED");
    }
}
