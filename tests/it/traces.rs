//! The search for secrets over all paths that they take, while everything logs all that it can.

use std::{fs, time::Duration};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
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
};

/// Runs to the end, with whatever credential, and says what the command found.
fn found(client: &Client, start: RunStart) -> String {
    let outcome = client.run(start).expect("it runs");
    assert_eq!(outcome.exited.exit_code, 0, "{}", outcome.stderr());
    outcome.stdout()
}

fn hash(secret: &str) -> String {
    format!("{}  -\n", hex::encode(Sha256::digest(secret)))
}

#[test]
fn a_secret_is_nowhere_but_sealed_whatever_path_it_takes_and_whatever_is_logged() {
    let (nomad, folder) = (Nomad::start_traced(), Folder::new("pdtrace-"));
    let postgres = Postgres::start();
    let [port] = free_ports();
    let http = format!("http://127.0.0.1:{port}");
    let master: [u8; 32] = rand::random();
    let keys = key_file(folder.path(), &[master]);
    let store = postgres.url();
    let options = [
        "--listen",
        &http,
        "--master-key-file",
        &keys,
        "--credential-store",
        &store,
    ];
    let environment = [
        ("POLYDEV_LOG", "trace"),
        ("PGPASSWORD", &*postgres.password),
    ];
    nomad.submit_pool("anthropic", 2);
    let mut shim = Shim::serve_in(&nomad.address, &options, &environment);
    let client = shim.client();
    client.wait_idle("anthropic", 2);
    let label = instance_label(&nomad.state_dir());
    let mut seen = Seen::default();
    let script = r#"printf %s "$ANTHROPIC_API_KEY" | sha256sum"#;
    let with = |credential: Credential| RunStart {
        credential: Some(credential),
        ..shell("anthropic", script)
    };

    // Out of the store, where a record came that was sealed elsewhere: a run that is looked at
    // while it goes on, a job, and a lease.
    let of_store = fresh_key();
    put_sealed(&shim, folder.path(), &keys, &of_store);
    let waits = RunStart {
        stdin: true,
        ..with(stored())
    };
    let waits = RunStart {
        command: shell("anthropic", &format!("{script}; read line")).command,
        ..waits
    };
    let mut run = client.start(waits).unwrap();
    while !matches!(client.next(&mut run).unwrap(), Some(Event::Stdout(_))) {}
    seen.look(&label, &of_store);
    assert!(seen.alive > 0, "nobody has it");
    run.close();
    client.finish_from(run, [hash(&of_store).len(), 0]).unwrap();
    let submit = SubmitJobRequest {
        start: Some(with(stored())),
    };
    let job = client
        .call(async |mut shim| shim.submit_job(submit).await)
        .unwrap();
    let job = client
        .attach(&job.accepted.unwrap().run_id, [0; 2])
        .unwrap();
    assert_eq!(client.finish(job).unwrap().stdout(), hash(&of_store));
    let allocate = AllocateRequest {
        provider: "anthropic".into(),
        user_id: "tester".into(),
        ..Default::default()
    };
    let lease = client
        .call(async |mut shim| shim.allocate(allocate).await)
        .unwrap();
    let leased = RunStart {
        lease_id: lease.lease.unwrap().lease_id,
        ..with(stored())
    };
    assert_eq!(found(&client, leased), hash(&of_store));

    // In the clear, over gRPC and HTTP, with files and artifacts beside it; and kept.
    let (of_grpc, of_http, of_file) = (fresh_key(), fresh_key(), fresh_key());
    let file = InputFile {
        path: "in".into(),
        mode: 0,
        source: Some(Source::Content("of the caller's".into())),
    };
    let with_files = RunStart {
        files: vec![file],
        ..with(api_key(&of_grpc))
    };
    assert_eq!(found(&client, with_files), hash(&of_grpc));
    let body = json!({ "start": {
        "provider": "anthropic", "user_id": "tester", "argv": { "text": ["sh", "-c", script] },
        "credential": { "secret": { "api_key": { "key": of_http } } },
    }});
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (status, events) = runtime.block_on(async {
        let _installed = rustls::crypto::ring::default_provider().install_default();
        let request = reqwest::Client::new()
            .post(format!("{http}/v1/runs"))
            .json(&body);
        let answer = request.send().await.unwrap();
        (answer.status(), answer.text().await.unwrap())
    });
    assert_eq!(status, StatusCode::OK);
    assert!(events.contains("event: exited"), "{events}");
    let account = json!({ "claudeAiOauth": { "accessToken": of_file } }).to_string();
    let oauth = in_the_clear(Kind::OauthFile(account.clone().into()));
    let request = put("tester", "anthropic", oauth);
    client
        .call(async |mut shim| shim.put_credential(request).await)
        .unwrap();
    let reads = RunStart {
        command: shell("anthropic", "sha256sum < ~/.claude/.credentials.json").command,
        ..with(stored())
    };
    assert_eq!(found(&client, reads), hash(&account));

    // And where all of it is refused.
    let of_refused = fresh_key();
    let variables = [("LD_PRELOAD".to_owned(), of_refused.clone())].into();
    let refused = in_the_clear(Kind::Environment(SecretEnvironment { variables }));
    let status = client.run(with(refused.clone())).map(drop).unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    let request = PutCredentialRequest {
        credential: Some(refused),
        ..put("tester", "anthropic", api_key("unused"))
    };
    let put_refused = client.call(async |mut shim| shim.put_credential(request).await);
    assert_eq!(put_refused.unwrap_err().code(), Code::InvalidArgument);
    let words = status.to_string();
    assert!(!words.contains(&of_refused), "{words}");
    let longer = Credential {
        source: Some(credential::Source::SealedRecord(of_refused.clone().into())),
    };
    client.run(with(longer)).map(drop).unwrap_err();

    // The search finds what is planted on each of these ways: whose run it is is written down.
    let planted = fresh_key();
    let named = RunStart {
        user_id: planted.clone(),
        command: Some(run_start::Command::Argv(Argv {
            text: vec!["true".into()],
            ..Argv::default()
        })),
        ..shell("anthropic", "")
    };
    found(&client, named);

    // An account that a job refreshes while there is no shim to be told: the next one is, by the next
    // driver.
    let (of_account, of_refresh) = (fresh_key(), fresh_key());
    let account = |token: &str| {
        json!({ "claudeAiOauth": { "accessToken": token, "refreshToken": token } }).to_string()
    };
    refreshed::keep(&client, "anthropic", &account(&of_account));
    let before = refreshed::info(&client).version;
    // A job's words are looked for like a log's: the new token comes as a file.
    let refreshes = r#"sleep 3; sed -i "s/$(cat old)/$(cat new)/g" ~/.claude/.credentials.json"#;
    let files = [("old", &of_account), ("new", &of_refresh)];
    let files = files.map(|(path, token)| InputFile {
        path: path.into(),
        mode: 0,
        source: Some(Source::Content(token.clone().into())),
    });
    let submit = SubmitJobRequest {
        start: Some(RunStart {
            command: shell("anthropic", refreshes).command,
            files: files.into(),
            ..with(stored())
        }),
    };
    let job = client.call(async |mut shim| shim.submit_job(submit).await);
    let run_id = job.unwrap().accepted.unwrap().run_id;
    // Its files are there then.
    wait_until("the job runs", Duration::from_secs(20), || {
        let run = client.get_run(&run_id).expect("it is known");
        match run.state() {
            RunState::Running => Ok(()),
            state => Err(format!("{state:?}")),
        }
    });
    shim.process.end(Signal::SIGKILL);
    // Nor is the driver that was told the one that tells.
    let state = nomad.state_dir();
    let kept = state.join("output").join(format!("{run_id}.refreshed"));
    wait_until("the driver is told", Duration::from_secs(20), || {
        fs::metadata(&kept).map_err(|error| error.to_string())
    });
    let driver = fs::read_to_string(state.join("driver.lock")).unwrap();
    kill(
        Pid::from_raw(driver.trim().parse().unwrap()),
        Signal::SIGKILL,
    )
    .unwrap();
    let next = Shim::serve_in(&nomad.address, &options, &environment);
    let client = next.client();
    let kept = refreshed::wait_version(&client, before + 1);
    assert_eq!(kept.refreshed_by_run_id, run_id);
    let reads = RunStart {
        command: shell("anthropic", "sha256sum < ~/.claude/.credentials.json").command,
        ..with(stored())
    };
    assert_eq!(found(&client, reads), hash(&account(&of_refresh)));

    // What is planted is in the store as well.
    postgres.sql(
        "postgres",
        &format!("CREATE TABLE planted AS SELECT '{planted}'"),
    );
    postgres.sql("postgres", "CHECKPOINT");
    let look = |secret: &str| {
        let mut places = secrets::find(secret, &nomad, &shim, &seen);
        let files = secrets::files(postgres.folder()).into_iter();
        let held = files.filter(|file| secrets::holds(secret, &fs::read(file).unwrap_or_default()));
        places.extend(held.map(|file| format!("store's {}", file.display())));
        if secrets::holds(secret, next.process.log().as_bytes()) {
            places.push("the next shim's log".into());
        }
        places
    };
    let places = look(&planted);
    for place in ["the shim's log", "nomad.log", "store's ", "/state/"] {
        let is_found = places.iter().any(|found| found.contains(place));
        assert!(
            is_found,
            "what was planted is not found in {place}: {places:?}"
        );
    }
    let password = &postgres.password;
    let master = hex::encode(master);
    for (name, secret) in [
        ("of_store", &of_store),
        ("of_grpc", &of_grpc),
        ("of_http", &of_http),
        ("of_file", &of_file),
        ("of_refused", &of_refused),
        ("of_account", &of_account),
        ("of_refresh", &of_refresh),
        ("master key", &master),
    ] {
        let places = look(secret);
        assert!(places.is_empty(), "`{name}` is in {places:?}");
    }
    assert!(!secrets::holds(password, shim.process.log().as_bytes()));
    assert!(
        shim.process.log().contains("TRACE"),
        "it does not log all it can"
    );
    assert!(
        nomad.agent_log().contains("[TRACE]"),
        "the agent does not log all it can"
    );
}
