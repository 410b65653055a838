//! A node that requires execution tokens runs what a shim has allowed, and nothing else.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use polydev_proto::{
    execution::{self, Because, Place},
    node::{
        Ballot, Claim, ClaimRequest, RunInput, RunSpec, Slot, Stdin, WatchSlotsRequest,
        claim_request, ended::Reason, node_service_client::NodeServiceClient, run_event::Event,
        run_input::Input, slot::State,
    },
    runtime::{InputFile, RunStart, input_file},
    signing::SigningKey,
};
use polydev_tests::{client::shell, folder::Folder, nomad::Nomad, shim::Shim, wait_until};
use rcgen::{KeyPair, PKCS_ED25519};
use sha2::{Digest, Sha256};
use tokio::{runtime::Runtime, time::timeout};
use tonic::{Code, Status};

use crate::host;

const LIMIT: Duration = Duration::from_secs(30);

/// A node that requires tokens of this key, with two slots.
fn node(folder: &Folder, pair: &KeyPair) -> Nomad {
    let keys = folder.path().join("keys.pem");
    replace(&keys, &pair.public_key_pem());
    let nomad = Nomad::start_with(&format!(
        "execution_tokens {{\n  keys = \"{}\"\n}}",
        keys.display()
    ));
    nomad.submit_pool("anthropic", 2);
    nomad
}

/// Replaces a file by renaming a new one over it.
fn replace(path: &Path, text: &str) {
    let new = path.with_extension("new");
    fs::write(&new, text).expect("a file can be written");
    fs::set_permissions(&new, fs::Permissions::from_mode(0o600)).expect("it is ours");
    fs::rename(new, path).expect("a file can be renamed");
}

/// The output of a command, or why it did not run within two seconds.
fn run(shim: &Shim) -> Result<String, String> {
    let start = RunStart {
        queue_timeout: Some(prost_types::Duration {
            seconds: 2,
            nanos: 0,
        }),
        ..shell("anthropic", "echo hello")
    };
    let outcome = shim.client().run(start);
    outcome
        .map(|outcome| outcome.stdout())
        .map_err(|status| status.message().to_owned())
}

#[test]
fn a_node_that_requires_tokens_runs_only_what_a_shim_with_a_known_key_has_signed() {
    let folder = Folder::new("pdtest-");
    let path = |name: &str| -> PathBuf { folder.path().join(name) };
    let pair = || KeyPair::generate_for(&PKCS_ED25519).expect("a key");
    let (first, second) = (pair(), pair());
    let keys = path("keys.pem");
    let nomad = node(&folder, &first);
    replace(&path("key.pem"), &first.serialize_pem());
    let key = path("key.pem").display().to_string();
    let signing = Shim::serve_with(&nomad.address, &["--execution-key-file", &key]);
    let bare = Shim::serve(&nomad.address);
    for shim in [&signing, &bare] {
        shim.client().wait_idle("anthropic", 2);
    }

    assert_eq!(run(&signing), Ok("hello\n".into()));
    let refused = run(&bare).unwrap_err();
    let words =
        "execution token invalid: the claim has no execution token, and this node requires one";
    assert!(refused.contains(words), "{refused}");

    // The journal has the nonce of what ran.
    let journal = fs::read_to_string(nomad.state_dir().join("runs.journal")).unwrap_or_default();
    assert!(journal.contains("\"nonce\""), "{journal}");

    // A key is replaced at the shim first: nodes do not know it. Then both are known, without a
    // restart of either.
    replace(&path("key.pem"), &second.serialize_pem());
    let refused = wait_until("the new key", LIMIT, || match run(&signing) {
        Ok(output) => Err(output),
        Err(refused) => Ok(refused),
    });
    assert!(refused.contains("no public key has the id"), "{refused}");
    let both = format!("{}{}", first.public_key_pem(), second.public_key_pem());
    replace(&keys, &both);
    wait_until("both keys", LIMIT, || run(&signing));
}

/// What a shim would know of an idle slot.
async fn idle_slot(
    nomad: &Nomad,
) -> (
    NodeServiceClient<tonic::transport::Channel>,
    Slot,
    String,
    String,
) {
    let address = format!("unix://{}", nomad.state_dir().join("node.sock").display());
    let node = NodeServiceClient::connect(address).await;
    let mut node = node.expect("a driver listens");
    let slots = node.watch_slots(WatchSlotsRequest {}).await;
    let mut slots = slots.expect("it answers").into_inner();
    let (mut start_id, mut identity) = (String::new(), String::new());
    loop {
        let told = timeout(LIMIT, slots.message())
            .await
            .expect("a slot becomes idle");
        let told = told.expect("no error").expect("a message");
        if !told.node_identity.is_empty() {
            (start_id, identity) = (told.start_id, told.node_identity);
        }
        let mut idle = told
            .slots
            .into_iter()
            .filter(|slot| slot.state() == State::Idle);
        if let Some(slot) = idle.next() {
            return (node, slot, start_id, identity);
        }
    }
}

/// Claims a slot as a shim that has signed `signed` for the node `of` (the same, unless a token is
/// stolen), and then sends `sent` as the input. Returns how the run ended.
fn claim(
    nomad: &Nomad,
    pair: &KeyPair,
    of: &Nomad,
    spec: RunSpec,
    (signed, sent): (&[u8], &'static [u8]),
) -> Result<(Reason, String), Status> {
    let key = SigningKey::read(pair.serialize_pem().as_bytes()).expect("a key");
    Runtime::new()
        .expect("a runtime can be made")
        .block_on(async {
            let (mut node, slot, start_id, _) = idle_slot(nomad).await;
            let (.., audience) = idle_slot(of).await;
            let expires_at = std::time::SystemTime::now() + Duration::from_secs(5);
            let mut claim = Claim {
                run_id: uuid::Uuid::now_v7().to_string(),
                slot_id: slot.slot_id,
                generation: slot.generation,
                start_id,
                start_by: Some(expires_at.into()),
                user_id: "alice".into(),
                spec: Some(RunSpec {
                    input_sha256: Sha256::digest(signed).to_vec().into(),
                    input_bytes: signed.len() as u64,
                    ..spec
                }),
                ballot: Some(Ballot {
                    attempt: 1,
                    nonce: 1,
                }),
                ..Claim::default()
            };
            let place = Place {
                audience: &audience,
                image: &slot.image,
                egress: slot.egress.as_ref(),
                expires_at,
            };
            claim.token = Some(execution::issue(&key, &claim, place, Because::default()));
            let input = RunInput {
                input: Some(Input::Stdin(Stdin {
                    data: sent.into(),
                    ..Stdin::default()
                })),
            };
            let close = RunInput {
                input: Some(Input::CloseStdin(polydev_proto::node::CloseStdin {})),
            };
            let messages = [
                claim_request::Message::Claim(Box::new(claim)),
                claim_request::Message::Input(input),
                claim_request::Message::Input(close),
            ];
            let requests = messages.map(|message| ClaimRequest {
                message: Some(message),
            });
            let requests = tokio_stream::iter(requests);
            let requests = tokio_stream::StreamExt::chain(requests, tokio_stream::pending());
            let mut events = node.claim(requests).await?.into_inner();
            loop {
                let told = timeout(LIMIT, events.message()).await.expect("it ends")?;
                let event = told.and_then(|told| told.event).and_then(|told| told.event);
                if let Some(Event::Ended(ended)) = event {
                    return Ok((ended.reason(), ended.message));
                }
            }
        })
}

#[test]
fn a_token_is_for_its_input_and_for_one_node() {
    let folder = Folder::new("pdtest-");
    let pair = KeyPair::generate_for(&PKCS_ED25519).expect("a key");
    let nomad = node(&folder, &pair);
    let reads = || host::shell("grep -qx hello");
    let hello = b"hello\n";
    let ended = claim(&nomad, &pair, &nomad, reads(), (hello, hello)).unwrap();
    assert_eq!(ended, (Reason::Exited, String::new()));
    let words = "its input is not the one that its execution token is for";
    for other in [b"hellp\n", &b"hell"[..]] {
        let ended = claim(&nomad, &pair, &nomad, reads(), (hello, other)).unwrap();
        assert_eq!(ended, (Reason::Lost, words.to_owned()), "{other:?}");
    }
    // A command whose files are others is not started.
    let with_file = RunSpec {
        files: vec![polydev_proto::init::InputFile {
            path: "a".into(),
            size: 6,
            mode: 0o644,
        }],
        ..reads()
    };
    let ended = claim(&nomad, &pair, &nomad, with_file, (hello, b"hellp\n")).unwrap();
    assert_eq!(ended, (Reason::NotStarted, words.to_owned()));
    // A token that another node with the same key would take.
    let others = Folder::new("pdtest-");
    let another = node(&others, &pair);
    let elsewhere = claim(&nomad, &pair, &another, reads(), (hello, hello));
    let refused = elsewhere.expect_err("it is for another node");
    assert_eq!(refused.code(), Code::PermissionDenied, "{refused}");
    assert!(
        refused.message().contains("it is for another node"),
        "{refused}"
    );

    // As a shim does it: files that come with a run, and a script.
    let key = folder.path().join("key.pem");
    replace(&key, &pair.serialize_pem());
    let key = key.display().to_string();
    let shim = Shim::serve_with(&nomad.address, &["--execution-key-file", &key]);
    shim.client().wait_idle("anthropic", 2);
    let start = RunStart {
        files: vec![InputFile {
            path: "a.txt".into(),
            source: Some(input_file::Source::Content(vec![b'x'; 300_000].into())),
            ..InputFile::default()
        }],
        ..shell("anthropic", "wc -c <a.txt")
    };
    let outcome = shim.client().run(start).expect("a whole run");
    assert_eq!(outcome.stdout().trim(), "300000");
}
