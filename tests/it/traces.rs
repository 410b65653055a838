//! The search for secrets on all their paths, while every part logs as much as it can.

use std::{fs, time::Duration};

use nix::sys::signal::{Signal, kill};
use polydev_proto::runtime::{
    AllocateRequest, Argv, Credential, InputFile, PutCredentialRequest, RunStart, RunState,
    SecretEnvironment, SubmitJobRequest, credential, input_file::Source, run_event::Event,
    run_start, secret::Kind,
};
use polydev_tests::{
    client::{Client, api_key, in_the_clear, shell},
    folder::Folder,
    free_ports, fresh_key,
    nomad::Nomad,
    postgres::Postgres,
    shim::{Shim, instance_label},
    wait_until,
};
use reqwest::StatusCode;
use serde_json::json;
use sha2::{Digest, Sha256};
use tonic::Code;

use crate::{
    credentials::{key_file, put, put_sealed, stored},
    refreshed,
    secrets::{self, Seen},
    survive::driver,
};

/// Prints the hash of the key that the command has.
const HASHES: &str = r#"printf %s "$ANTHROPIC_API_KEY" | sha256sum"#;
/// Prints the hash of the account that the command has.
const READS: &str = "sha256sum < ~/.claude/.credentials.json";

/// Runs to the end with any credential, and returns what the command found.
fn found(client: &Client, start: RunStart) -> String {
    let outcome = client.run(start).expect("a whole run");
    assert_eq!(outcome.exited.exit_code, 0, "{}", outcome.stderr());
    outcome.stdout()
}

fn hash(secret: &str) -> String {
    format!("{}  -\n", hex::encode(Sha256::digest(secret)))
}

fn with(credential: Credential) -> RunStart {
    RunStart {
        credential: Some(credential),
        ..shell("anthropic", HASHES)
    }
}

fn reads_the_stored() -> RunStart {
    RunStart {
        credential: Some(stored()),
        ..shell("anthropic", READS)
    }
}

fn file(path: &str, content: &str) -> InputFile {
    InputFile {
        path: path.into(),
        mode: 0,
        source: Some(Source::Content(content.to_owned().into())),
    }
}

/// All parts of the system that a secret passes. Each part logs as much as it can.
struct Traced {
    client: Client,
    // Dropped before the parts that the shim uses.
    shim: Shim,
    postgres: Postgres,
    http: String,
    master: [u8; 32],
    keys: String,
    /// What others can see of runs.
    seen: Seen,
    folder: Folder,
    nomad: Nomad,
}

impl Traced {
    fn start() -> Self {
        let (nomad, folder) = (Nomad::start_traced(), Folder::new("pdtrace-"));
        let postgres = Postgres::start();
        let [port] = free_ports();
        let http = format!("http://127.0.0.1:{port}");
        let master: [u8; 32] = rand::random();
        let keys = key_file(folder.path(), &[master]);
        nomad.submit_pool("anthropic", 2);
        let shim = serve(&nomad, &postgres, &http, &keys);
        let client = shim.client();
        client.wait_idle("anthropic", 2);
        Self {
            client,
            shim,
            postgres,
            http,
            master,
            keys,
            seen: Seen::default(),
            folder,
            nomad,
        }
    }

    /// The names of the places that contain `secret`. `next` is the shim after the first one.
    fn places(&self, next: &Shim, secret: &str) -> Vec<String> {
        let mut places = secrets::find(secret, &self.nomad, &self.shim, &self.seen);
        let files = secrets::files(self.postgres.folder()).into_iter();
        let held = files.filter(|file| secrets::holds(secret, &fs::read(file).unwrap_or_default()));
        places.extend(held.map(|file| format!("store's {}", file.display())));
        if secrets::holds(secret, next.process.log().as_bytes()) {
            places.push("the next shim's log".into());
        }
        places
    }
}

fn serve(nomad: &Nomad, postgres: &Postgres, http: &str, keys: &str) -> Shim {
    let store = postgres.url();
    let options = [
        "--listen",
        http,
        "--master-key-file",
        keys,
        "--credential-store",
        &store,
    ];
    let environment = [
        ("POLYDEV_LOG", "trace"),
        ("PGPASSWORD", &*postgres.password),
    ];
    Shim::serve_in(&nomad.address, &options, &environment)
}

#[test]
fn a_secret_is_nowhere_but_sealed_whatever_path_it_takes_and_whatever_is_logged() {
    let mut traced = Traced::start();
    let of_store = a_sealed_key_is_stored_and_used(&mut traced);
    let of_grpc = a_key_comes_over_grpc_beside_files(&traced);
    let of_http = a_key_comes_over_http(&traced);
    let of_file = an_account_is_kept_and_used(&traced);
    let of_refused = secrets_are_refused(&traced);
    let planted = a_secret_is_planted_as_the_name_of_a_user(&traced);
    let ([of_account, of_refresh], next) = a_job_refreshes_an_account_without_a_shim(&mut traced);
    the_search_finds_what_is_planted(&traced, &next, &planted);
    for (name, secret) in [
        ("of_store", of_store),
        ("of_grpc", of_grpc),
        ("of_http", of_http),
        ("of_file", of_file),
        ("of_refused", of_refused),
        ("of_account", of_account),
        ("of_refresh", of_refresh),
        ("master key", hex::encode(traced.master)),
    ] {
        let places = traced.places(&next, &secret);
        assert!(places.is_empty(), "`{name}` is in {places:?}");
    }
    let log = traced.shim.process.log();
    assert!(!secrets::holds(&traced.postgres.password, log.as_bytes()));
    assert!(log.contains("TRACE"), "the log lacks level TRACE");
    assert!(
        traced.nomad.agent_log().contains("[TRACE]"),
        "the agent does not log all it can"
    );
}

/// Another process seals the key. A run, a job and a lease use it; the search looks at the run
/// while it runs.
fn a_sealed_key_is_stored_and_used(traced: &mut Traced) -> String {
    let (client, key) = (&traced.client, fresh_key());
    put_sealed(&traced.shim, traced.folder.path(), &traced.keys, &key);
    let waits = RunStart {
        stdin: true,
        command: shell("anthropic", &format!("{HASHES}; read line")).command,
        ..with(stored())
    };
    let mut run = client.start(waits).expect("it starts");
    let mut next = || client.next(&mut run).expect("another event");
    while !matches!(next(), Some(Event::Stdout(_))) {}
    let label = instance_label(&traced.nomad.state_dir());
    traced.seen.look(&label, &key);
    assert!(traced.seen.alive > 0, "nobody has it");
    run.close();
    let rest = client.finish_from(run, [hash(&key).len(), 0]);
    rest.expect("a clean end");

    let submit = SubmitJobRequest {
        start: Some(with(stored())),
    };
    let job = client.call(async |mut shim| shim.submit_job(submit).await);
    let accepted = job.expect("it is taken").accepted.expect("an accepted run");
    let job = client
        .attach(&accepted.run_id, [0; 2])
        .expect("it is known");
    let job = client.finish(job).expect("a clean end");
    assert_eq!(job.stdout(), hash(&key));

    let allocate = AllocateRequest {
        provider: "anthropic".into(),
        user_id: "tester".into(),
        ..Default::default()
    };
    let lease = client.call(async |mut shim| shim.allocate(allocate).await);
    let lease = lease.expect("there is a slot").lease;
    let leased = RunStart {
        lease_id: lease.expect("an answer has a lease").lease_id,
        ..with(stored())
    };
    assert_eq!(found(client, leased), hash(&key));
    key
}

fn a_key_comes_over_grpc_beside_files(traced: &Traced) -> String {
    let key = fresh_key();
    let with_files = RunStart {
        files: vec![file("in", "of the caller's")],
        ..with(api_key(&key))
    };
    assert_eq!(found(&traced.client, with_files), hash(&key));
    key
}

fn a_key_comes_over_http(traced: &Traced) -> String {
    let key = fresh_key();
    let body = json!({ "start": {
        "provider": "anthropic", "user_id": "tester", "argv": { "text": ["sh", "-c", HASHES] },
        "credential": { "secret": { "api_key": { "key": key } } },
    }});
    let runtime = tokio::runtime::Runtime::new().expect("a runtime can be made");
    let (status, events) = runtime.block_on(async {
        let _installed = rustls::crypto::ring::default_provider().install_default();
        let request = reqwest::Client::new()
            .post(format!("{}/v1/runs", traced.http))
            .json(&body);
        let answer = request.send().await.expect("the shim answers");
        (answer.status(), answer.text().await.expect("valid UTF-8"))
    });
    assert_eq!(status, StatusCode::OK);
    assert!(events.contains("event: exited"), "{events}");
    key
}

fn an_account_is_kept_and_used(traced: &Traced) -> String {
    let (client, token) = (&traced.client, fresh_key());
    let account = json!({ "claudeAiOauth": { "accessToken": token } }).to_string();
    let oauth = in_the_clear(Kind::OauthFile(account.clone().into()));
    let request = put("tester", "anthropic", oauth);
    let kept = client.call(async |mut shim| shim.put_credential(request).await);
    kept.expect("the store takes it");
    assert_eq!(found(client, reads_the_stored()), hash(&account));
    token
}

/// The secret comes in a variable that callers must not set, for a run and for the store, and as
/// a sealed record that is not valid.
fn secrets_are_refused(traced: &Traced) -> String {
    let (client, secret) = (&traced.client, fresh_key());
    let variables = [("LD_PRELOAD".to_owned(), secret.clone())].into();
    let refused = in_the_clear(Kind::Environment(SecretEnvironment { variables }));
    let status = client.run(with(refused.clone())).map(drop);
    let status = status.expect_err("a refusal");
    assert_eq!(status.code(), Code::InvalidArgument);
    let request = PutCredentialRequest {
        credential: Some(refused),
        ..put("tester", "anthropic", api_key("unused"))
    };
    let put_refused = client.call(async |mut shim| shim.put_credential(request).await);
    let put_refused = put_refused.expect_err("a refusal");
    assert_eq!(put_refused.code(), Code::InvalidArgument);
    let words = status.to_string();
    assert!(!words.contains(&secret), "{words}");
    let longer = Credential {
        source: Some(credential::Source::SealedRecord(secret.clone().into())),
    };
    let refused = client.run(with(longer)).map(drop);
    refused.expect_err("a refusal");
    secret
}

/// Logs and the driver's folder name the user of a run, so the search must find it there.
fn a_secret_is_planted_as_the_name_of_a_user(traced: &Traced) -> String {
    let planted = fresh_key();
    let named = RunStart {
        user_id: planted.clone(),
        command: Some(run_start::Command::Argv(Argv {
            text: vec!["true".into()],
            ..Argv::default()
        })),
        ..shell("anthropic", "")
    };
    found(&traced.client, named);
    planted
}

/// The job refreshes its account after its shim has died, and the driver that notes it dies too:
/// the next driver reports it to the next shim. Returns the old token, the new one and that shim.
fn a_job_refreshes_an_account_without_a_shim(traced: &mut Traced) -> ([String; 2], Shim) {
    let tokens = [fresh_key(), fresh_key()];
    let account = |token: &str| {
        json!({ "claudeAiOauth": { "accessToken": token, "refreshToken": token } }).to_string()
    };
    refreshed::keep(&traced.client, "anthropic", &account(&tokens[0]));
    let before = refreshed::info(&traced.client).version;
    let run_id = submit_what_refreshes(&traced.client, &tokens);
    traced.shim.process.end(Signal::SIGKILL);
    let state = traced.nomad.state_dir();
    let kept = state.join("output").join(format!("{run_id}.refreshed"));
    wait_until("the driver is told", Duration::from_secs(20), || {
        fs::metadata(&kept).map_err(|error| error.to_string())
    });
    kill(driver(&state), Signal::SIGKILL).expect("a live process");

    let next = serve(&traced.nomad, &traced.postgres, &traced.http, &traced.keys);
    let client = next.client();
    let kept = refreshed::wait_version(&client, before + 1);
    assert_eq!(kept.refreshed_by_run_id, run_id);
    let read = found(&client, reads_the_stored());
    assert_eq!(read, hash(&account(&tokens[1])));
    (tokens, next)
}

/// Submits a job that replaces the first token by the second, and returns its id once the job
/// runs: it has its files then.
fn submit_what_refreshes(client: &Client, [old, new]: &[String; 2]) -> String {
    // The search reads the words of a job, too: the tokens come as files.
    let refreshes = r#"sleep 3; sed -i "s/$(cat old)/$(cat new)/g" ~/.claude/.credentials.json"#;
    let submit = SubmitJobRequest {
        start: Some(RunStart {
            command: shell("anthropic", refreshes).command,
            files: vec![file("old", old), file("new", new)],
            ..with(stored())
        }),
    };
    let job = client.call(async |mut shim| shim.submit_job(submit).await);
    let accepted = job.expect("it is taken").accepted.expect("an accepted run");
    wait_until("the job runs", Duration::from_secs(20), || {
        let run = client.get_run(&accepted.run_id).expect("it is known");
        match run.state() {
            RunState::Running => Ok(()),
            state => Err(format!("{state:?}")),
        }
    });
    accepted.run_id
}

/// Plants the secret in the store too.
fn the_search_finds_what_is_planted(traced: &Traced, next: &Shim, planted: &str) {
    let table = format!("CREATE TABLE planted AS SELECT '{planted}'");
    traced.postgres.sql("postgres", &table);
    traced.postgres.sql("postgres", "CHECKPOINT");
    let places = traced.places(next, planted);
    for place in ["the shim's log", "nomad.log", "store's ", "/state/"] {
        let is_found = places.iter().any(|found| found.contains(place));
        assert!(
            is_found,
            "what was planted is not found in {place}: {places:?}"
        );
    }
}
