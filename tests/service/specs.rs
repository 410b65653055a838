//! What the shim sends to a node: the caller's command, and no secret in the clear.

use polydev_proto::runtime::{CredentialMode, RunStart, SubmitJobRequest, secret::Kind};
use polydev_tests::{
    client::{api_key, in_the_clear, prompt},
    fresh_key,
};
use prost::Message;
use tonic::Request;

use crate::site::{Site, field, seconds, steps};

#[test]
fn a_claim_says_what_the_caller_asked_for() {
    let site = Site::start(&[("anthropic", 1)]);
    let client = site.shim.client();
    let start = RunStart {
        env: [("A".to_owned(), "b".to_owned())].into(),
        work_dir: "/tmp".into(),
        kill_timeout: seconds(7),
        ..steps(&["true"])
    };
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let mut request = Request::new(SubmitJobRequest { start: Some(start) });
    request
        .metadata_mut()
        .insert("traceparent", trace.parse().unwrap());
    let accepted = client.call(async |mut shim| shim.submit_job(request).await);
    let accepted = accepted.unwrap().accepted.unwrap();
    let claim = site.node().asked().claims.remove(0);
    assert_eq!(claim.run_id, accepted.run_id);
    assert_eq!(claim.slot_id, accepted.slot_id);
    assert_eq!((claim.generation, &*claim.start_id), (1, "start"));
    assert_eq!(claim.trace.unwrap().traceparent, trace);
    let spec = claim.spec.unwrap();
    assert_eq!(spec.argv, ["true"]);
    assert_eq!(spec.work_dir, "/tmp");
    assert_eq!(
        (spec.timeout, spec.kill_timeout),
        (seconds(120), seconds(7))
    );
    for (name, value) in [("A", "b"), ("PROVIDER", "anthropic"), ("USER_ID", "tester")] {
        assert_eq!(spec.env[name], value);
    }
}

#[test]
fn a_secret_reaches_its_node_sealed_alone() {
    let site = Site::start(&[("anthropic", 1)]);
    let client = site.shim.client();
    let key = fresh_key();
    let start = RunStart {
        credential: Some(api_key(&key)),
        ..steps(&["true"])
    };
    client.run(start).unwrap();
    let claim = site.node().asked().claims.remove(0);
    let spec = claim.spec.as_ref().unwrap();
    assert_eq!(spec.secret_names, ["ANTHROPIC_API_KEY"]);
    assert!(!claim.sealed_secrets.is_empty());
    assert!(claim.sealed_keys.is_empty());
    let bytes = claim.encode_to_vec();
    assert!(memchr::memmem::find(&bytes, key.as_bytes()).is_none());
}

#[test]
fn a_key_is_sealed_to_the_broker_unless_the_caller_wants_it_in_the_container() {
    let site = Site::start(&[("anthropic", 1)]);
    let client = site.shim.client();
    let key = fresh_key();
    let run = |mode: CredentialMode, env: &[(&str, &str)]| {
        let env = env
            .iter()
            .map(|(name, value)| (name.to_string(), value.to_string()));
        let start = RunStart {
            credential: Some(api_key(&key)),
            credential_mode: mode.into(),
            env: env.collect(),
            ..steps(&["true"])
        };
        client.run(start).unwrap();
        site.node().asked().claims.pop().unwrap()
    };
    let url = [("ANTHROPIC_BASE_URL", "https://gateway.example")];
    let outside = [
        run(CredentialMode::Unspecified, &[]),
        run(CredentialMode::Broker, &[]),
    ];
    for claim in outside {
        assert!(!claim.sealed_keys.is_empty());
        let names = ["ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL"];
        assert_eq!(claim.spec.as_ref().unwrap().secret_names, names);
        let bytes = claim.encode_to_vec();
        assert!(memchr::memmem::find(&bytes, key.as_bytes()).is_none());
    }
    let inside = [
        run(CredentialMode::Inject, &[]),
        run(CredentialMode::Unspecified, &url),
    ];
    for claim in inside {
        assert!(claim.sealed_keys.is_empty());
        assert_eq!(claim.spec.unwrap().secret_names, ["ANTHROPIC_API_KEY"]);
    }

    let account = in_the_clear(Kind::OauthFile("{}".into()));
    let start = RunStart {
        credential: Some(account),
        credential_mode: CredentialMode::Broker.into(),
        ..steps(&["true"])
    };
    let refused = client.run(start).unwrap_err();
    assert_eq!(field(&refused), "credential_mode");
}

#[test]
fn a_prompt_becomes_the_command_of_its_provider() {
    let site = Site::start(&[("anthropic", 1)]);
    let client = site.shim.client();
    let text = "In one sentence: what is a warm container?";
    let start = prompt("anthropic", text, &fresh_key(), "http://127.0.0.1:1");
    // The simulated node has no such program.
    let outcome = client.run(start).unwrap();
    assert_eq!(outcome.exited.exit_code, 127);
    let spec = site.node().asked().claims.remove(0).spec.unwrap();
    assert_eq!(spec.argv[0], "claude");
    assert!(spec.argv.iter().any(|word| *word == text));
    assert!(spec.env.contains_key("ANTHROPIC_BASE_URL") && !spec.stdin);
}
