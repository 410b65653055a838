//! Makes every call of the API with the client for Rust. Collects the names of the calls that gave
//! the expected answer.

use std::collections::BTreeSet;

use futures_util::StreamExt;
use polydev_client::{Calls, Client, Identity, Run, api};
use polydev_proto::DESCRIPTORS;
use polydev_tests::shim::Shim;
use prost::Message;
use tokio::runtime::Runtime;

pub(super) fn of_the_protocol() -> BTreeSet<String> {
    let files = prost_types::FileDescriptorSet::decode(DESCRIPTORS)
        .expect("it is there")
        .file;
    let runtime = files
        .into_iter()
        .find(|file| file.package() == "polydev.runtime.v1")
        .expect("it is there");
    let service = runtime.service.into_iter().next().expect("it is there");
    service
        .method
        .iter()
        .map(|method| method.name().to_owned())
        .collect()
}

pub(super) fn of_rust(shim: &Shim) -> BTreeSet<String> {
    let runtime = Runtime::new().expect("a runtime can be made");
    runtime.block_on(async {
        let mut rust = Rust::connect(shim).await;
        rust.looks_at_pools().await;
        rust.changes_pools().await;
        rust.keeps_a_credential().await;
        rust.runs().await;
        rust.submits_a_job_and_leases_slots().await;
        rust.runs_a_script().await;
        rust.asks_for_an_approval().await;
        rust.deletes_its_credential().await;
        rust.made
    })
}

const USER: &str = "rust";
const PROVIDER: &str = "anthropic";
/// A provider whose pool has no slots.
const EMPTY: &str = "google";

/// The client for Rust, and the names of the calls that it has made.
struct Rust {
    client: Client,
    calls: Calls,
    made: BTreeSet<String>,
}

fn start(argv: &[&str]) -> api::RunStart {
    let argv = api::Argv {
        text: argv.iter().map(ToString::to_string).collect(),
        ..Default::default()
    };
    api::RunStart {
        user_id: USER.into(),
        provider: PROVIDER.into(),
        command: Some(api::run_start::Command::Argv(argv)),
        ..Default::default()
    }
}

impl Rust {
    async fn connect(shim: &Shim) -> Self {
        let address = shim.address.parse().expect("a valid address");
        let client = Client::connect(&address, Identity::default()).await;
        let client = client.expect("the shim answers");
        Self {
            calls: client.calls(),
            client,
            made: BTreeSet::new(),
        }
    }

    fn done(&mut self, name: &str) {
        assert!(self.made.insert(name.to_owned()));
    }

    async fn looks_at_pools(&mut self) {
        let request = api::GetClusterStatusRequest {};
        let status = self.calls.get_cluster_status(request).await;
        let status = status.expect("the shim answers").into_inner();
        assert!(status.nodes[0].reachable);
        self.done("GetClusterStatus");
        let images = self.calls.list_images(api::ListImagesRequest {}).await;
        let images = images.expect("the shim answers").into_inner();
        assert!(images.nodes[0].images.iter().any(|image| image.in_use));
        self.done("ListImages");
        let request = api::PruneImagesRequest {
            all: true,
            remove: false,
        };
        let prune = self.calls.prune_images(request).await;
        let prune = prune.expect("the shim answers").into_inner();
        assert!(prune.nodes[0].images.iter().all(|image| !image.in_use));
        self.done("PruneImages");
        let pools = self.calls.list_pools(api::ListPoolsRequest {}).await;
        let pools = pools.expect("the shim answers").into_inner();
        assert_eq!(pools.pools.len(), 4);
        self.done("ListPools");
        let request = api::GetPoolRequest {
            provider: PROVIDER.into(),
        };
        let pool = self.calls.get_pool(request).await;
        let pool = pool.expect("the shim answers").into_inner();
        assert_eq!(pool.slots.len(), 2);
        self.done("GetPool");
        let watched = self.calls.watch_pools(api::WatchPoolsRequest {}).await;
        let mut watched = watched.expect("the shim answers").into_inner();
        let first = watched.message().await.expect("the shim answers");
        assert_eq!(first.expect("a message").pools.len(), 4);
        self.done("WatchPools");
    }

    async fn changes_pools(&mut self) {
        let request = api::ScalePoolRequest {
            provider: EMPTY.into(),
            size: 0,
        };
        let scaled = self.calls.scale_pool(request).await;
        let scaled = scaled.expect("the shim answers").into_inner();
        let scaled = scaled.map(|event| event.expect("the shim answers").event.expect("an event"));
        let is_scaled = matches!(
            scaled.collect::<Vec<_>>().await[..],
            [.., api::scale_pool_response::Event::Scaled(_)]
        );
        assert!(is_scaled);
        self.done("ScalePool");
        let request = api::DrainPoolRequest {
            provider: EMPTY.into(),
        };
        let drained = self.calls.drain_pool(request).await;
        let drained = drained.expect("the shim answers").into_inner();
        let drained =
            drained.map(|event| event.expect("the shim answers").event.expect("an event"));
        let is_drained = matches!(
            drained.collect::<Vec<_>>().await[..],
            [.., api::drain_pool_response::Event::Drained(_)]
        );
        assert!(is_drained);
        self.done("DrainPool");
        let request = api::ResumePoolRequest {
            provider: EMPTY.into(),
        };
        let resumed = self.calls.resume_pool(request).await;
        let resumed = resumed.expect("the shim answers").into_inner();
        let resumed =
            resumed.map(|event| event.expect("the shim answers").event.expect("an event"));
        let is_resumed = matches!(
            resumed.collect::<Vec<_>>().await[..],
            [.., api::resume_pool_response::Event::Scaled(_)]
        );
        assert!(is_resumed);
        self.done("ResumePool");
    }

    async fn keeps_a_credential(&mut self) {
        let variables = [("SECRET".to_owned(), "of the store".to_owned())].into();
        let kind = api::secret::Kind::Environment(api::SecretEnvironment { variables });
        let secret = api::credential::Source::Secret(api::Secret { kind: Some(kind) });
        let put = api::PutCredentialRequest {
            user_id: USER.into(),
            provider: PROVIDER.into(),
            credential: Some(api::Credential {
                source: Some(secret),
            }),
            keep_refreshed: false,
        };
        let put = self.calls.put_credential(put).await;
        let put = put.expect("the shim answers").into_inner();
        assert_eq!(put.credential.expect("it is told").version, 1);
        self.done("PutCredential");
        let request = api::ListCredentialsRequest {
            user_id: USER.into(),
            ..Default::default()
        };
        let listed = self.calls.list_credentials(request).await;
        let listed = listed.expect("the shim answers").into_inner();
        assert_eq!(listed.credentials.len(), 1);
        self.done("ListCredentials");
        let request = api::RotateCredentialsRequest::default();
        let rotated = self.calls.rotate_credentials(request).await;
        assert_eq!(rotated.expect("the shim answers").into_inner().left, 0);
        self.done("RotateCredentials");
    }

    /// One run with the stored credential, until it is cancelled.
    async fn runs(&mut self) {
        let watch = api::WatchRunsRequest {
            user_id: USER.into(),
            ..Default::default()
        };
        let watched = self.calls.watch_runs(watch).await;
        let mut watched = watched.expect("the shim answers").into_inner();
        let stored = api::credential::Source::Stored(api::StoredCredential {});
        let script = r#"read line; echo "$line $SECRET"; exec sleep 300"#;
        let mut run = self.client.run(api::RunStart {
            credential: Some(api::Credential {
                source: Some(stored),
            }),
            stdin: true,
            ..start(&["sh", "-c", script])
        });
        let run_id = run.run_id().to_owned();
        let written = run.input().write("line\n").await;
        written.expect("the run takes it");
        while !matches!(next(&mut run).await, api::run_event::Event::Stdout(output)
            if output.data == "line of the store\n")
        {}
        self.done("Run");
        let is_it = |told: api::WatchRunsResponse| told.runs.iter().any(|run| run.run_id == run_id);
        loop {
            let told = watched.message().await.expect("the shim answers");
            if is_it(told.expect("a message")) {
                break;
            }
        }
        self.done("WatchRuns");
        let request = api::GetRunRequest {
            run_id: run_id.clone(),
            user_id: USER.into(),
        };
        let shown = self.calls.get_run(request).await;
        let shown = shown.expect("the shim answers").into_inner().run;
        assert_eq!(shown.expect("it is told").state(), api::RunState::Running);
        self.done("GetRun");
        let request = api::ListRunsRequest {
            user_id: USER.into(),
            ..Default::default()
        };
        let listed = self.calls.list_runs(request).await;
        let listed = listed.expect("the shim answers").into_inner();
        assert_eq!(listed.runs.len(), 1);
        self.done("ListRuns");
        let again = self.attach(&run_id);
        let cancel = api::CancelRunRequest {
            run_id,
            user_id: USER.into(),
        };
        let cancelled = self.calls.cancel_run(cancel).await;
        cancelled.expect("the shim answers");
        self.done("CancelRun");
        assert_eq!(
            text(again).await,
            ("line of the store\n".into(), api::ExitReason::Cancelled)
        );
        self.done("Attach");
    }

    async fn submits_a_job_and_leases_slots(&mut self) {
        let start = start(&["echo", "job"]);
        let submit = api::SubmitJobRequest {
            start: Some(start.clone()),
        };
        let submitted = self.calls.submit_job(submit).await;
        let submitted = submitted.expect("the shim answers").into_inner();
        let run_id = submitted.accepted.expect("an accepted run").run_id;
        let job = ("job\n".to_owned(), api::ExitReason::Exited);
        assert_eq!(text(self.attach(&run_id)).await, job);
        self.done("SubmitJob");
        let leased = api::RunStart {
            lease_id: self.allocate().await,
            ..start
        };
        assert_eq!(text(self.client.run(leased)).await, job);
        self.done("Allocate");
        let release = api::ReleaseRequest {
            lease_id: self.allocate().await,
            user_id: USER.into(),
        };
        let released = self.calls.release(release).await;
        released.expect("the shim answers");
        self.done("Release");
    }

    async fn runs_a_script(&mut self) {
        let script = api::RunScriptRequest {
            user_id: USER.into(),
            script: "print(6 * 7)".into(),
            ..Default::default()
        };
        let result = self.calls.run_script(script).await;
        let result = result.expect("the shim answers").into_inner();
        assert_eq!(result.status(), api::ScriptStatus::Success);
        assert_eq!(result.stdout, "42\n");
        self.done("RunScript");
    }

    async fn deletes_its_credential(&mut self) {
        let delete = api::DeleteCredentialRequest {
            user_id: USER.into(),
            provider: PROVIDER.into(),
        };
        let deleted = self.calls.delete_credential(delete).await;
        deleted.expect("the shim answers");
        self.done("DeleteCredential");
    }

    fn attach(&self, run_id: &str) -> Run {
        self.client.attach(api::AttachStart {
            run_id: run_id.into(),
            user_id: USER.into(),
            ..Default::default()
        })
    }

    /// The id of a lease.
    async fn allocate(&mut self) -> String {
        let request = api::AllocateRequest {
            user_id: USER.into(),
            provider: PROVIDER.into(),
            ..Default::default()
        };
        let allocated = self.calls.allocate(request).await;
        let allocated = allocated.expect("the shim answers").into_inner();
        allocated.lease.expect("an answer has a lease").lease_id
    }
}

impl Rust {
    async fn asks_for_an_approval(&mut self) {
        let request = api::WatchApprovalsRequest {
            user_id: USER.into(),
            ..Default::default()
        };
        let watched = self.calls.watch_approvals(request).await;
        let mut watched = watched.expect("the shim answers").into_inner();
        let mut told = async || {
            let message = watched.message().await.expect("the shim answers");
            message.expect("a message").approvals
        };
        assert_eq!(told().await, []);
        let mut run = self.client.run(start(&["needs-approval"]));
        let first = next(&mut run).await;
        let api::run_event::Event::ApprovalRequired(required) = first else {
            panic!("the first event is {first:?}");
        };
        let approvals = told().await;
        self.done("WatchApprovals");
        let request = api::ListApprovalsRequest {
            user_id: USER.into(),
            ..Default::default()
        };
        let listed = self.calls.list_approvals(request).await;
        assert_eq!(
            listed.expect("the shim answers").into_inner().approvals,
            approvals
        );
        self.done("ListApprovals");
        let approval_id = required.approval_id;
        let request = api::GetApprovalRequest {
            approval_id: approval_id.clone(),
        };
        let shown = self.calls.get_approval(request).await;
        let shown = shown.expect("the shim answers").into_inner().approval;
        let subject = shown.and_then(|approval| approval.subject);
        let is_it = matches!(subject, Some(api::approval::Subject::Run(run)) if run.argv == ["needs-approval"]);
        assert!(is_it);
        self.done("GetApproval");
        let request = api::ApproveRequest {
            approval_id: approval_id.clone(),
            comment: String::new(),
        };
        let own = self.calls.approve(request).await.map(drop);
        let own = own.expect_err("it is their own");
        assert!(
            own.message().contains("somebody else must approve it"),
            "{own}"
        );
        self.done("Approve");
        let request = api::DenyRequest {
            approval_id,
            comment: "no".into(),
        };
        let denied = self.calls.deny(request).await;
        let denied = denied.expect("the shim answers").into_inner().approval;
        assert_eq!(
            denied.expect("the approval").state(),
            api::ApprovalState::Denied
        );
        self.done("Deny");
        let end = run.next().await.expect("an end").map(drop);
        assert!(
            end.expect_err("a denial")
                .message()
                .ends_with("has denied this run: no")
        );
    }
}

async fn next(run: &mut Run) -> api::run_event::Event {
    let event = run.next().await.expect("it has not ended");
    event.expect("the shim answers")
}

/// The output of a run until its end, and the reason for the end.
async fn text(mut run: Run) -> (String, api::ExitReason) {
    let mut written = Vec::new();
    loop {
        match next(&mut run).await {
            api::run_event::Event::Stdout(output) => written.extend_from_slice(&output.data),
            api::run_event::Event::Exited(exited) => {
                let written = String::from_utf8(written);
                return (written.expect("valid UTF-8"), exited.reason());
            }
            _ => {}
        }
    }
}
