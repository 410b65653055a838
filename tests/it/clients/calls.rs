//! Every call of the API, made by the client for Rust and by grpcurl: the names of those that have
//! answered as they should.

use std::{collections::BTreeSet, process::Command};

use futures_util::StreamExt;
use polydev_client::{Client, Identity, api};
use polydev_proto::DESCRIPTORS;
use polydev_tests::{
    process::{output, succeed},
    root,
    shim::Shim,
};
use prost::Message;
use serde_json::{Value, json};
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
        let address = shim.address.parse().expect("it is there");
        let client = Client::connect(&address, Identity::default())
            .await.expect("the shim answers");
        let mut made = BTreeSet::new();
        let mut done = |name: &str| assert!(made.insert(name.to_owned()));
        let mut calls = client.calls();
        let (user_id, provider) = ("rust".to_owned(), "anthropic".to_owned());
        let google = "google".to_owned();

        let status = calls
            .get_cluster_status(api::GetClusterStatusRequest {})
            .await;
        assert!(status.expect("it is there").into_inner().nodes[0].reachable);
        done("GetClusterStatus");
        let pools = calls.list_pools(api::ListPoolsRequest {}).await;
        assert_eq!(pools.expect("it is there").into_inner().pools.len(), 3);
        done("ListPools");
        let request = api::GetPoolRequest {
            provider: provider.clone(),
        };
        let pool = calls.get_pool(request).await.expect("the shim answers").into_inner();
        assert_eq!(pool.slots.len(), 2);
        done("GetPool");
        let watched = calls.watch_pools(api::WatchPoolsRequest {}).await;
        let first = watched.expect("it is there").into_inner().message().await.expect("the shim answers");
        assert_eq!(first.expect("it is there").pools.len(), 3);
        done("WatchPools");
        let request = api::ScalePoolRequest {
            provider: google.clone(),
            size: 0,
        };
        let scaled = calls.scale_pool(request).await.expect("the shim answers").into_inner();
        let scaled = scaled
            .map(|event| event.expect("it is there").event.expect("it is there"))
            .collect::<Vec<_>>();
        let is_scaled = matches!(
            scaled.await[..],
            [.., api::scale_pool_response::Event::Scaled(_)]
        );
        assert!(is_scaled);
        done("ScalePool");
        let request = api::DrainPoolRequest {
            provider: google.clone(),
        };
        let drained = calls.drain_pool(request).await.expect("the shim answers").into_inner();
        let drained = drained
            .map(|event| event.expect("it is there").event.expect("it is there"))
            .collect::<Vec<_>>();
        let is_drained = matches!(
            drained.await[..],
            [.., api::drain_pool_response::Event::Drained(_)]
        );
        assert!(is_drained);
        done("DrainPool");
        let request = api::ResumePoolRequest { provider: google };
        let resumed = calls.resume_pool(request).await.expect("the shim answers").into_inner();
        let resumed = resumed
            .map(|event| event.expect("it is there").event.expect("it is there"))
            .collect::<Vec<_>>();
        let is_resumed = matches!(
            resumed.await[..],
            [.., api::resume_pool_response::Event::Scaled(_)]
        );
        assert!(is_resumed);
        done("ResumePool");

        let variables = [("SECRET".to_owned(), "of the store".to_owned())].into();
        let kind = api::secret::Kind::Environment(api::SecretEnvironment { variables });
        let secret = api::credential::Source::Secret(api::Secret { kind: Some(kind) });
        let put = api::PutCredentialRequest {
            user_id: user_id.clone(),
            provider: provider.clone(),
            credential: Some(api::Credential {
                source: Some(secret),
            }),
            keep_refreshed: false,
        };
        let put = calls.put_credential(put).await.expect("the shim answers").into_inner();
        assert_eq!(put.credential.expect("it is there").version, 1);
        done("PutCredential");
        let request = api::ListCredentialsRequest {
            user_id: user_id.clone(),
            ..Default::default()
        };
        let listed = calls.list_credentials(request).await.expect("the shim answers").into_inner();
        assert_eq!(listed.credentials.len(), 1);
        done("ListCredentials");
        let rotated = calls
            .rotate_credentials(api::RotateCredentialsRequest::default())
            .await;
        assert_eq!(rotated.expect("it is there").into_inner().left, 0);
        done("RotateCredentials");

        let watch = api::WatchRunsRequest {
            user_id: user_id.clone(),
            ..Default::default()
        };
        let mut watched = calls.watch_runs(watch).await.expect("the shim answers").into_inner();
        let stored = api::credential::Source::Stored(api::StoredCredential {});
        let argv = |argv: &[&str]| {
            let text = argv.iter().map(ToString::to_string).collect();
            let argv = api::Argv {
                text,
                ..Default::default()
            };
            Some(api::run_start::Command::Argv(argv))
        };
        let start = api::RunStart {
            user_id: user_id.clone(),
            provider: provider.clone(),
            ..Default::default()
        };
        let mut run = client.run(api::RunStart {
            command: argv(&[
                "sh",
                "-c",
                r#"read line; echo "$line $SECRET"; exec sleep 300"#,
            ]),
            credential: Some(api::Credential {
                source: Some(stored),
            }),
            stdin: true,
            ..start.clone()
        });
        let run_id = run.run_id().to_owned();
        run.input().write("line\n").await.expect("the shim answers");
        while !matches!(run.next().await.expect("the shim answers").expect("it is there"), api::run_event::Event::Stdout(output)
            if output.data == "line of the store\n")
        {}
        done("Run");
        let is_it = |told: api::WatchRunsResponse| told.runs.iter().any(|run| run.run_id == run_id);
        while !is_it(watched.message().await.expect("the shim answers").expect("a message")) {}
        done("WatchRuns");
        let request = api::GetRunRequest {
            run_id: run_id.clone(),
            user_id: user_id.clone(),
        };
        let shown = calls
            .get_run(request)
            .await.expect("the shim answers")
            .into_inner()
            .run
            .expect("it is there");
        assert_eq!(shown.state(), api::RunState::Running);
        done("GetRun");
        let request = api::ListRunsRequest {
            user_id: user_id.clone(),
            ..Default::default()
        };
        let listed = calls.list_runs(request).await.expect("the shim answers").into_inner().runs;
        assert_eq!(listed.len(), 1);
        done("ListRuns");
        let attach = |run_id: &str| {
            client.attach(api::AttachStart {
                run_id: run_id.into(),
                user_id: user_id.clone(),
                ..Default::default()
            })
        };
        let again = attach(&run_id);
        let cancel = api::CancelRunRequest {
            run_id: run_id.clone(),
            user_id: user_id.clone(),
        };
        calls.cancel_run(cancel).await.expect("the shim answers");
        done("CancelRun");
        assert_eq!(
            text(again).await,
            ("line of the store\n".into(), api::ExitReason::Cancelled)
        );
        done("Attach");

        let start = api::RunStart {
            command: argv(&["echo", "job"]),
            ..start
        };
        let submit = api::SubmitJobRequest {
            start: Some(start.clone()),
        };
        let accepted = calls
            .submit_job(submit)
            .await.expect("the shim answers")
            .into_inner()
            .accepted
            .expect("it is there");
        let job = ("job\n".to_owned(), api::ExitReason::Exited);
        assert_eq!(text(attach(&accepted.run_id)).await, job);
        done("SubmitJob");
        let request = api::AllocateRequest {
            user_id: user_id.clone(),
            provider: provider.clone(),
            ..Default::default()
        };
        let lease = calls
            .allocate(request.clone())
            .await.expect("the shim answers")
            .into_inner()
            .lease
            .expect("it is there");
        assert_eq!(
            text(client.run(api::RunStart {
                lease_id: lease.lease_id,
                ..start
            }))
            .await,
            job
        );
        done("Allocate");
        let lease = calls
            .allocate(request)
            .await.expect("the shim answers")
            .into_inner()
            .lease
            .expect("it is there");
        let release = api::ReleaseRequest {
            lease_id: lease.lease_id,
            user_id: user_id.clone(),
        };
        calls.release(release).await.expect("the shim answers");
        done("Release");
        let delete = api::DeleteCredentialRequest { user_id, provider };
        calls.delete_credential(delete).await.expect("the shim answers");
        done("DeleteCredential");
        made
    })
}

/// What a run writes, until it ends, and why it does.
async fn text(mut run: polydev_client::Run) -> (String, api::ExitReason) {
    let mut written = Vec::new();
    loop {
        match run
            .next()
            .await
            .expect("the shim answers")
            .expect("it is there")
        {
            api::run_event::Event::Stdout(output) => written.extend_from_slice(&output.data),
            api::run_event::Event::Exited(exited) => {
                return (
                    String::from_utf8(written).expect("it is there"),
                    exited.reason(),
                );
            }
            _ => {}
        }
    }
}

/// Without the protocol's files: by reflection.
pub(super) fn of_grpcurl(shim: &Shim) -> BTreeSet<String> {
    let grpcurl = succeed(&mut Command::new(root().join("tests/grpcurl.sh")));
    let mut made = BTreeSet::new();
    let mut call = |method: &str, options: &[&str], request: Value| -> Vec<Value> {
        let mut command = Command::new(grpcurl.trim());
        command.args(["-plaintext", "-emit-defaults"]).args(options);
        command.args(["-d", &request.to_string(), &shim.address]);
        command.arg(format!("polydev.runtime.v1.RuntimeService/{method}"));
        let answered = output(&mut command);
        let words = String::from_utf8_lossy(&answered.stderr).into_owned();
        // Those that do not end by themselves.
        let is_late = options.contains(&"-max-time") && words.contains("DeadlineExceeded");
        assert!(answered.status.success() || is_late, "{method}: {words}");
        made.insert(method.to_owned());
        let answers = serde_json::Deserializer::from_slice(&answered.stdout);
        answers.into_iter::<Value>().map(Result::unwrap).collect()
    };
    let short = ["-max-time", "2"];
    let user = json!({ "user_id": "grpcurl" });
    let name = json!({ "user_id": "grpcurl", "provider": "anthropic" });
    let google = json!({ "provider": "google" });
    let run = |what: Value| {
        let mut run = name.clone();
        run.as_object_mut()
            .expect("it is there")
            .extend(what.as_object().expect("it is there").clone());
        run
    };
    assert_eq!(
        call("GetClusterStatus", &[], json!({}))[0]["nodes"][0]["reachable"],
        true
    );
    assert_eq!(
        call("ListPools", &[], json!({}))[0]["pools"][0]["provider"],
        "anthropic"
    );
    assert_eq!(
        call("GetPool", &[], json!({ "provider": "anthropic" }))[0]["pool"]["slots"],
        2
    );
    assert_eq!(
        call("WatchPools", &short, json!({}))[0]["nodesConnected"],
        1
    );
    let scaled = call("ScalePool", &[], json!({ "provider": "google", "size": 0 }));
    assert_eq!(scaled.last().expect("it is there")["scaled"]["to"], 0);
    assert!(
        call("DrainPool", &[], google.clone())
            .last()
            .expect("it is there")["drained"]
            .is_object()
    );
    assert!(call("ResumePool", &[], google).last().expect("it is there")["scaled"].is_object());

    let secret = json!({ "environment": { "variables": { "SECRET": "of the store" } } });
    let put = call(
        "PutCredential",
        &[],
        run(json!({ "credential": { "secret": secret } })),
    );
    assert_eq!(put[0]["credential"]["version"], "1");
    let listed = call("ListCredentials", &[], user.clone());
    assert_eq!(
        listed[0]["credentials"][0]["kind"],
        "CREDENTIAL_KIND_ENVIRONMENT"
    );
    assert_eq!(call("RotateCredentials", &[], json!({}))[0]["left"], "0");

    let stored = json!({
        "argv": { "text": ["sh", "-c", "echo $SECRET"] }, "credential": { "stored": {} },
    });
    let events = call("Run", &[], json!({ "start": run(stored) }));
    let written = |event: &Value| event["event"]["stdout"]["data"] == "b2YgdGhlIHN0b3JlCg==";
    assert!(events.iter().any(written), "{events:?}");
    let sleeps = json!({ "argv": { "text": ["sleep", "300"] } });
    let submitted = call("SubmitJob", &[], json!({ "start": run(sleeps) }));
    let run_id = submitted[0]["accepted"]["runId"].clone();
    let of_run = json!({ "run_id": run_id, "user_id": "grpcurl" });
    assert_eq!(
        call("GetRun", &[], of_run.clone())[0]["run"]["runId"],
        run_id
    );
    assert_eq!(
        call("ListRuns", &[], user.clone())[0]["runs"][0]["runId"],
        run_id
    );
    let watched = call("WatchRuns", &short, user);
    assert!(
        watched
            .iter()
            .any(|told| told["runs"][0]["runId"] == run_id),
        "{watched:?}"
    );
    call("CancelRun", &[], of_run.clone());
    let events = call("Attach", &[], json!({ "start": of_run }));
    let last = &events.last().expect("it is there")["event"];
    assert_eq!(last["exited"]["reason"], "EXIT_REASON_CANCELLED");
    let lease_id = call("Allocate", &[], name.clone())[0]["lease"]["leaseId"].clone();
    call(
        "Release",
        &[],
        json!({ "lease_id": lease_id, "user_id": "grpcurl" }),
    );
    call("DeleteCredential", &[], name.clone());
    made
}
