//! Credentials: from where callers keep them into the one container that may use them, past
//! everybody else.

use std::{collections::BTreeMap, fs, path::Path, process::Command};

use base64::{
    Engine,
    prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD},
};
use nix::{
    mount::{MsFlags, mount},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use polydev_proto::runtime::{
    Credential, DeleteCredentialRequest, ListCredentialsRequest, PutCredentialRequest, RunStart,
    ScryptRecord, SecretEnvironment, StoredCredential, credential::Source, run_event::Event,
    secret::Kind,
};
use polydev_tests::{
    client::{Client, api_key, in_the_clear, prompt, shell},
    folder::Folder,
    fresh_key,
    host::Host,
    postgres::Postgres,
    process::{output, succeed},
    shim::Shim,
    stand_in::Received,
};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::secrets;

fn stored() -> Credential {
    Credential {
        source: Some(Source::Stored(StoredCredential {})),
    }
}

fn put(user_id: &str, provider: &str, credential: Credential) -> PutCredentialRequest {
    PutCredentialRequest {
        user_id: user_id.into(),
        provider: provider.into(),
        credential: Some(credential),
    }
}

/// Code and reason of an error.
fn why(status: &Status) -> (Code, String) {
    let details = status.get_error_details();
    let info = details.error_info().expect("every error has it");
    (status.code(), info.reason.clone())
}

/// A file with master keys, the first of which seals.
fn key_file(folder: &Path, keys: &[[u8; 32]]) -> String {
    let path = folder.join(format!("keys-{:08x}", rand::random::<u32>()));
    let lines = keys.iter().map(|key| format!("{}\n", hex::encode(key)));
    fs::write(&path, lines.collect::<String>()).expect("a file can be written");
    path.display().to_string()
}

/// A sealed credential goes from the store into the container. Neither the driver nor the
/// shim has it in its memory, while the command has it and after.
#[test]
fn a_stored_key_is_in_the_container_and_in_nobody_elses_memory() {
    let folder = Folder::new("pdcred-");
    let keys = key_file(folder.path(), &[rand::random()]);
    let store = folder.path().join("store.db");
    let url = format!("sqlite://{}", store.display());
    let options = ["--master-key-file", &keys, "--credential-store", &url];
    let shim = Shim::dev_with(&["anthropic=1"], &options);
    let client = shim.client();

    // Sealed by another process, so that the shim has seen it in no call.
    let key = fresh_key();
    let sealed = folder.path().join("sealed");
    let mut seal = shim.command(&["credentials", "seal", "anthropic", "--user", "tester"]);
    seal.args(["--master-key-file", &keys])
        .env("ANTHROPIC_API_KEY", &key);
    fs::write(&sealed, succeed(&mut seal)).unwrap();
    let sealed = sealed.display().to_string();
    let put = [
        "credentials",
        "put",
        "anthropic",
        "--user",
        "tester",
        "--sealed-file",
        &sealed,
    ];
    assert_eq!(
        succeed(&mut shim.command(&put)),
        "kept api_key of tester for anthropic, version 1\n"
    );

    let driver = fs::read_to_string(shim.state_dir().join("driver.lock")).unwrap();
    let driver: i32 = driver.trim().parse().unwrap();
    let script = "printf %s \"$ANTHROPIC_API_KEY\" | sha256sum; read line";
    let start = RunStart {
        credential: Some(stored()),
        stdin: true,
        ..shell("anthropic", script)
    };
    let mut run = client.start(start).unwrap();
    let hash = loop {
        match client.next(&mut run).unwrap() {
            Some(Event::Stdout(output)) => break output.data,
            Some(_) => {}
            None => panic!("it ended"),
        }
    };
    assert!(hash.starts_with(hex::encode(Sha256::digest(&key)).as_bytes()));
    let look = |when: &str| {
        for (name, pid) in [
            ("shim", shim.process.pid()),
            ("driver", Pid::from_raw(driver)),
        ] {
            assert!(
                !secrets::is_in_memory(&key, pid),
                "in the {name}'s memory {when}"
            );
        }
    };
    look("while the command runs");
    assert!(
        secrets::is_in_memory(&key, Pid::this()),
        "the search finds nothing"
    );
    drop(run.inputs.take());
    while client.next(&mut run).unwrap().is_some() {}
    client.wait_idle("anthropic", 1);
    look("afterwards");
    for entry in fs::read_dir(folder.path()).unwrap() {
        let path = entry.unwrap().path();
        assert!(
            !secrets::holds(&key, &fs::read(&path).unwrap()),
            "{}",
            path.display()
        );
    }
    assert!(!secrets::holds(&key, shim.process.log().as_bytes()));
}

/// Every kind of a credential, from every source, as its command finds it.
#[test]
fn a_command_finds_its_credential_whatever_its_kind_and_source() {
    let folder = Folder::new("pdcred-");
    // The one of the record that earlier systems have been compared by.
    let golden: [u8; 32] = std::array::from_fn(|at| u8::try_from(at).unwrap());
    let keys = key_file(folder.path(), &[rand::random(), golden]);
    let options = ["--master-key-file", &keys];
    let shim = Shim::dev_with(&["openai=1", "anthropic=1", "google=1"], &options);
    let client = shim.client();
    let run = |provider: &str, credential: Credential, script: &str| {
        let start = RunStart {
            credential: Some(credential),
            ..shell(provider, script)
        };
        let outcome = client.run(start).unwrap();
        assert_eq!(outcome.exited.exit_code, 0, "{}", outcome.stderr());
        outcome.stdout()
    };

    let token = fresh_key();
    let account = format!("{{\"token\":\"{token}\"}}");
    for (provider, path) in [
        ("openai", ".codex/auth.json"),
        ("anthropic", ".claude/.credentials.json"),
        ("google", ".gemini/oauth_creds.json"),
    ] {
        let file = in_the_clear(Kind::OauthFile(account.clone().into()));
        let script = format!("cd ~; cat {path}; stat -c ' %a %u' {path}; stat -f -c %T {path}");
        assert_eq!(
            run(provider, file, &script),
            format!("{account} 600 1000\ntmpfs\n")
        );
    }
    let settings = run(
        "google",
        in_the_clear(Kind::OauthFile("{}".into())),
        "cat ~/.gemini/settings.json",
    );
    assert!(settings.contains("oauth-personal"), "{settings}");

    let variables = BTreeMap::from([("MY_TOKEN".to_owned(), format!("{token}\n=\u{20ac}"))]);
    let environment = in_the_clear(Kind::Environment(SecretEnvironment { variables }));
    let printed = run("openai", environment, "printf %s \"$MY_TOKEN\"");
    assert_eq!(printed, format!("{token}\n=\u{20ac}"));

    let sixteen = |from: u8| hex::encode((from..from + 16).collect::<Vec<_>>());
    let record = ScryptRecord {
        encrypted:
            "030f94b89be85ed565a22426ded7fbd91d420878ee4bd2f7f32112de2d7e1dc8150cc1501d973a36\
                    0f8d9620172ad0d0d5"
                .into(),
        iv: sixteen(0xb0),
        auth_tag: "196ff94e14e80528928b6a0dc53d0279".into(),
        salt: sixteen(0xa0),
    };
    let scrypt = |record: ScryptRecord| Credential {
        source: Some(Source::ScryptRecord(record)),
    };
    let printed = run(
        "google",
        scrypt(record.clone()),
        "echo ${#GOOGLE_API_KEY} $GOOGLE_CLOUD_PROJECT",
    );
    assert_eq!(printed, "10 project-123\n");

    let refused = |provider: &str, credential: Credential| {
        let start = RunStart {
            credential: Some(credential),
            ..shell(provider, "true")
        };
        let status = client.run(start).unwrap_err();
        assert!(!status.message().contains(&token), "{status}");
        (why(&status), status.message().to_owned())
    };
    let changed = ScryptRecord {
        auth_tag: sixteen(0),
        ..record.clone()
    };
    let not_opened = (Code::FailedPrecondition, "NOT_OPENED".to_owned());
    assert_eq!(refused("google", scrypt(changed)).0, not_opened);
    // Its project is of no use to others.
    let (invalid, words) = refused("openai", scrypt(record));
    assert_eq!(invalid, (Code::InvalidArgument, "INVALID".into()));
    assert!(
        words.starts_with("`credential.secret.api_key.project_id`"),
        "{words}"
    );

    let sealed = folder.path().join("sealed");
    fs::write(&sealed, "").unwrap();
    let mut again = shim.command(&["credentials", "seal", "openai", "--sealed-file"]);
    again.arg(&sealed).env("OPENAI_API_KEY", &token);
    assert!(
        !output(again.args(["--master-key-file", &keys]))
            .status
            .success()
    );
    let seal = |user: &str, provider: &str, master: &str| {
        let mut seal = shim.command(&["credentials", "seal", provider, "--user", user]);
        seal.args(["--master-key-file", master]);
        seal.env("OPENAI_API_KEY", &token)
            .env("ANTHROPIC_API_KEY", &token);
        let record = succeed(&mut seal);
        let record = BASE64_STANDARD.decode(record.trim());
        Credential {
            source: Some(Source::SealedRecord(record.unwrap().into())),
        }
    };
    let script = "printf %s $CODEX_API_KEY";
    assert_eq!(
        run("openai", seal("tester", "openai", &keys), script),
        token
    );
    for (user, provider) in [("tester", "anthropic"), ("mallory", "openai")] {
        assert_eq!(refused("openai", seal(user, provider, &keys)).0, not_opened);
    }
    let another = key_file(folder.path(), &[rand::random()]);
    let (unknown, _) = refused("openai", seal("tester", "openai", &another));
    assert_eq!(
        unknown,
        (Code::FailedPrecondition, "UNKNOWN_MASTER_KEY".into())
    );
    let (no_store, _) = refused("openai", stored());
    assert_eq!(no_store, (Code::FailedPrecondition, "NO_STORE".into()));
    let file = in_the_clear(Kind::OauthFile(token.clone().into()));
    assert_eq!(
        refused("openai", file).0,
        (Code::InvalidArgument, "INVALID".into())
    );
    let slow = vec![b'a'; 200_000].into();
    let long = Credential {
        source: Some(Source::SealedRecord(slow)),
    };
    assert_eq!(
        refused("openai", long).0,
        (Code::InvalidArgument, "INVALID".into())
    );
}

#[test]
fn credentials_are_kept_in_sqlite() {
    let folder = Folder::new("pdcred-");
    let url = format!("sqlite://{}", folder.path().join("store.db").display());
    is_a_store(&folder, &url, "");

    // One that is full loses nothing of what it has.
    let full = folder.path().join("full");
    fs::create_dir(&full).unwrap();
    let size = Some("size=64k");
    mount(Some("tmpfs"), &full, Some("tmpfs"), MsFlags::empty(), size).unwrap();
    let url = format!("sqlite://{}", full.join("store.db").display());
    let keys = key_file(folder.path(), &[rand::random()]);
    let options = ["--master-key-file", &keys, "--credential-store", &url];
    let shim = Shim::dev_with(&["openai=0"], &options);
    let client = shim.client();
    let long = || {
        in_the_clear(Kind::OauthFile(
            format!("{{\"a\":\"{}\"}}", "x".repeat(9000)).into(),
        ))
    };
    let mut kept = 0;
    let refused = loop {
        let request = put(&format!("user-{kept}"), "openai", long());
        match client.call(async |mut shim| shim.put_credential(request).await) {
            Ok(_) => kept += 1,
            Err(status) => break status,
        }
        assert!(kept < 100, "it is never full");
    };
    assert_eq!(
        why(&refused),
        (Code::Unavailable, "STORE".into()),
        "{refused}"
    );
    assert_eq!(list(&client, "", 0).len(), kept);
}

#[test]
fn credentials_are_kept_in_postgresql() {
    let folder = Folder::new("pdcred-");
    let mut postgres = Postgres::start();
    is_a_store(&folder, &postgres.url(), &postgres.password);

    let keys = key_file(folder.path(), &[rand::random()]);
    let url = postgres.url();
    let options = ["--master-key-file", &keys, "--credential-store", &url];
    let password = postgres.password.clone();
    let environment = [("PGPASSWORD", password.as_str())];
    let shim = Shim::dev_in(&["openai=1"], &options, &environment);
    let client = shim.client();
    let key = fresh_key();
    let keep = || put("alice", "openai", api_key(&key));
    let put = || client.call(async |mut shim| shim.put_credential(keep()).await);
    put().unwrap();

    // One that is away, and one that does not answer: told so, in time, and no key in it. Who
    // brings his credential needs none.
    let own = || RunStart {
        credential: Some(api_key(&key)),
        ..shell("openai", "true")
    };
    let store = (Code::Unavailable, "STORE".to_owned());
    let backends = |postgres: &Postgres| -> Vec<i32> {
        let pids = postgres.sql(
            "polydev",
            "SELECT pid FROM pg_stat_activity WHERE usename = 'polydev'",
        );
        pids.lines().map(|pid| pid.parse().unwrap()).collect()
    };
    let asleep = backends(&postgres);
    assert!(!asleep.is_empty());
    for pid in &asleep {
        kill(Pid::from_raw(*pid), Signal::SIGSTOP).unwrap();
    }
    let refused = put().unwrap_err();
    for pid in &asleep {
        kill(Pid::from_raw(*pid), Signal::SIGCONT).unwrap();
    }
    assert_eq!(why(&refused), store, "{refused}");
    postgres.stop();
    let refused = put().unwrap_err();
    assert_eq!(why(&refused), store, "{refused}");
    assert!(!refused.message().contains(&key));
    client.run(own()).unwrap();
    postgres.begin();
    put().unwrap();

    // Tables of a later version are left alone.
    let later = "INSERT INTO polydev_migrations VALUES (99, 'later', now(), true, '\\x00', 1)";
    postgres.sql("polydev", later);
    drop(shim);
    let shim = Shim::dev_in(&["openai=0"], &options, &environment);
    let client = shim.client();
    let refused = client
        .call(async |mut shim| shim.put_credential(keep()).await)
        .unwrap_err();
    assert_eq!(why(&refused), store);
    assert!(
        refused.message().contains("not this version's"),
        "{refused}"
    );

    // What is on its disk, with everything that it was sent.
    assert!(
        !secrets::files(postgres.folder())
            .iter()
            .any(|file| { secrets::holds(&key, &fs::read(file).unwrap_or_default()) })
    );
    let wrong = Shim::dev_in(&["openai=0"], &options, &[("PGPASSWORD", "wrong")]);
    let request = keep();
    let refused = wrong
        .client()
        .call(async |mut shim| shim.put_credential(request).await);
    assert_eq!(why(&refused.unwrap_err()), store);
}

/// What every store does.
fn is_a_store(folder: &Folder, url: &str, password: &str) {
    let environment = [("PGPASSWORD", password)];
    let (old, new) = (rand::random(), rand::random());
    let keys = key_file(folder.path(), &[old]);
    let options = ["--master-key-file", &keys, "--credential-store", url];
    let shim = Shim::dev_in(&["anthropic=0"], &options, &environment);
    let client = shim.client();
    let key = fresh_key();

    // Kept, counted and listed, page by page.
    let mut expected = Vec::new();
    for (user, provider, version) in [
        ("alice", "anthropic", 1),
        ("alice", "anthropic", 2),
        ("alice", "openai", 1),
        ("bob/\u{20ac} '; --", "anthropic", 1),
        ("carol", "anthropic", 1),
    ] {
        let request = put(user, provider, api_key(&key));
        let kept = client
            .call(async |mut shim| shim.put_credential(request).await)
            .expect("it is done");
        let kept = kept.credential.expect("it is done");
        assert_eq!(kept.version, version);
        expected.retain(|name| *name != (user.to_owned(), provider.to_owned()));
        expected.push((user.to_owned(), provider.to_owned()));
    }
    for page_size in [1, 2, 3, 0] {
        assert_eq!(list(&client, "", page_size), expected, "{page_size}");
    }
    assert_eq!(list(&client, "alice", 1), expected[..2]);
    let printed = succeed(&mut shim.command(&[
        "credentials",
        "list",
        "--provider",
        "openai",
        "--output",
        "json",
    ]));
    let info: Value = serde_json::from_str(&printed).expect("it is done");
    assert_eq!(
        (&info["user_id"], &info["kind"]),
        (&"alice".into(), &"api_key".into())
    );
    assert!(info["created_at"].is_string() && !printed.contains(&key));

    // Deleted, once.
    let delete = |user: &str| DeleteCredentialRequest {
        user_id: user.into(),
        provider: "anthropic".into(),
    };
    let request = delete("carol");
    client
        .call(async |mut shim| shim.delete_credential(request).await)
        .expect("it is done");
    let request = delete("carol");
    let refused = client
        .call(async |mut shim| shim.delete_credential(request).await)
        .expect_err("it is refused");
    assert_eq!(why(&refused), (Code::NotFound, "NO_CREDENTIAL".into()));
    expected.pop();
    assert_eq!(list(&client, "", 0), expected);

    // Many at once are counted one by one.
    let versions: Vec<u64> = std::thread::scope(|scope| {
        let put = || {
            let request = put("dave", "google", api_key(&key));
            let kept = shim
                .client()
                .call(async |mut shim| shim.put_credential(request).await);
            kept.ok()
                .map(|kept| kept.credential.expect("it is done").version)
        };
        let puts: Vec<_> = (0..4).map(|_| scope.spawn(put)).collect();
        puts.into_iter()
            .filter_map(|put| put.join().expect("it is done"))
            .collect()
    });
    let mut counted = versions.clone();
    counted.sort_unstable();
    counted.dedup();
    assert_eq!(counted.len(), versions.len(), "{versions:?}");
    expected.push(("dave".into(), "google".into()));

    // Sealed anew, after which the old master key may go.
    drop(shim);
    let both = key_file(folder.path(), &[new, old]);
    let options = ["--master-key-file", &both, "--credential-store", url];
    let shim = Shim::dev_in(&["anthropic=0"], &options, &environment);
    let rotated = succeed(&mut shim.command(&["credentials", "rotate"]));
    assert_eq!(
        rotated,
        format!("sealed anew: {}, left: 0\n", expected.len())
    );
    drop(shim);
    let only = key_file(folder.path(), &[new]);
    let options = ["--master-key-file", &only, "--credential-store", url];
    let shim = Shim::dev_in(&["anthropic=1"], &options, &environment);
    let client = shim.client();
    assert_eq!(list(&client, "", 0), expected);
    let start = || RunStart {
        user_id: "alice".into(),
        credential: Some(stored()),
        ..shell("anthropic", "printf %s $ANTHROPIC_API_KEY")
    };
    assert_eq!(client.run(start()).expect("it is done").stdout(), key);
    let nobodys = RunStart {
        user_id: "nobody".into(),
        ..start()
    };
    let refused = client.run(nobodys).expect_err("it is refused");
    assert_eq!(why(&refused), (Code::NotFound, "NO_CREDENTIAL".into()));
    drop(shim);

    // Without it, nothing opens, and nothing is lost.
    let options = ["--master-key-file", &keys, "--credential-store", url];
    let shim = Shim::dev_in(&["anthropic=0"], &options, &environment);
    let refused = shim.client().run(start()).expect_err("it is refused");
    assert_eq!(
        why(&refused),
        (Code::FailedPrecondition, "UNKNOWN_MASTER_KEY".into())
    );
    let request = put("zoe", "google", api_key(&key));
    let kept = shim.client();
    let kept = kept.call(async |mut shim| shim.put_credential(request).await);
    kept.expect("it is done");
    drop(shim);
    // What does not open keeps nothing else from being sealed anew.
    let third = key_file(folder.path(), &[rand::random(), old]);
    let options = ["--master-key-file", &third, "--credential-store", url];
    let shim = Shim::dev_in(&["anthropic=0"], &options, &environment);
    let mut rotate = shim.command(&["credentials", "rotate"]);
    let output = rotate.output().expect("it is done");
    assert_eq!(output.status.code(), Some(125));
    let left = expected.len();
    let told = format!("sealed anew: 1, left: {left}\n");
    assert_eq!(String::from_utf8_lossy(&output.stdout), told);
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(words.lines().count(), left, "{words}");
    assert!(
        words.starts_with("that of alice for anthropic is as it was: "),
        "{words}"
    );
    for page_token in ["x", "openai/\0", "a b/alice"] {
        let request = ListCredentialsRequest {
            page_token: page_token.into(),
            ..Default::default()
        };
        let client = shim.client();
        let refused = client.call(async |mut shim| shim.list_credentials(request).await);
        let refused = refused.expect_err("it is refused");
        assert_eq!(why(&refused), (Code::InvalidArgument, "INVALID".into()));
    }
}

#[test]
fn what_cannot_be_kept_or_read_is_refused_by_name() {
    let folder = Folder::new("pdcred-");
    let shim = Shim::dev(&["anthropic=0"]);
    let client = shim.client();
    let refused = |request: PutCredentialRequest| {
        let status = client
            .call(async |mut shim| shim.put_credential(request).await)
            .unwrap_err();
        let details = status.get_error_details();
        let violations = details
            .bad_request()
            .map(|bad| bad.field_violations[0].field.clone());
        (why(&status), violations.unwrap_or_default())
    };
    let invalid = |field: &str| {
        (
            (Code::InvalidArgument, "INVALID".to_owned()),
            field.to_owned(),
        )
    };
    let key = || api_key("k");
    assert_eq!(refused(put("", "openai", key())), invalid("user_id"));
    assert_eq!(refused(put("a", "openia", key())), invalid("provider"));
    assert_eq!(
        refused(put("a", "openai", stored())),
        invalid("credential.stored")
    );
    assert_eq!(
        refused(put("a", "openai", Credential::default())),
        invalid("credential.source")
    );
    let (why, _) = refused(put("a", "openai", key()));
    assert_eq!(why, (Code::FailedPrecondition, "NO_STORE".into()));

    // At the start.
    let malformed = folder.path().join("malformed");
    fs::write(&malformed, "0123\n").unwrap();
    let fails = |options: &[&str], words: &str| {
        let mut command = Command::new(polydev_tests::program("polydev-shim"));
        command
            .args(["dev", "--listen", "unix:///nowhere/at/all"])
            .args(options);
        let output = command.output().unwrap();
        let printed = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            !output.status.success() && printed.contains(words),
            "{printed}"
        );
        assert!(!printed.contains("hunter2"), "{printed}");
    };
    let sqlite = format!("sqlite://{}", folder.path().join("store.db").display());
    fails(&["--credential-store", &sqlite], "needs a master key");
    fails(
        &["--master-key-file", "/nowhere"],
        "cannot read the master keys in `/nowhere`",
    );
    let malformed = malformed.display().to_string();
    fails(
        &["--master-key-file", &malformed],
        "line 1 of the master keys",
    );
    let mut from_variable = Command::new(polydev_tests::program("polydev-shim"));
    let password = "postgres://a:hunter2@db/x";
    from_variable.env("POLYDEV_CREDENTIAL_STORE", password);
    let help = from_variable.args(["serve", "--help"]).output().unwrap();
    assert!(!String::from_utf8_lossy(&help.stdout).contains("hunter2"));
    fails(
        &["--credential-store", "mysql://db/x"],
        "neither `postgres://",
    );
    fails(
        &["--credential-store", "postgres://a:hunter2@db/x"],
        "PGPASSWORD",
    );
}

/// The names of all that fit, by as many pages as it takes.
fn list(client: &Client, user_id: &str, page_size: u32) -> Vec<(String, String)> {
    let mut request = ListCredentialsRequest {
        user_id: user_id.into(),
        page_size,
        ..Default::default()
    };
    let mut names = Vec::new();
    loop {
        let page = request.clone();
        let page = client.call(async |mut shim| shim.list_credentials(page).await);
        let page = page.expect("they are listed");
        let infos = page.credentials.into_iter();
        names.extend(infos.map(|info| (info.user_id, info.provider)));
        request.page_token = page.next_page_token;
        if request.page_token.is_empty() {
            return names;
        }
    }
}

#[test]
fn the_real_clis_sign_in_with_their_users_accounts() {
    let host = Host::start();
    let shim = Shim::dev(&["openai=1", "anthropic=1", "google=1"]);
    let client = shim.client();
    for (provider, path) in [
        ("openai", "/v1/responses"),
        ("anthropic", "/v1/messages"),
        ("google", "/v1internal:streamGenerateContent"),
    ] {
        let (token, text) = (fresh_key(), format!("What is {}?", fresh_key()));
        let mut start = prompt(provider, &text, "", &host.url);
        start.credential = Some(account(provider, &token));
        if provider == "google" {
            // Google's own names, which lead to the stand-in.
            let variables = [
                ("HTTPS_PROXY", &*host.url),
                ("NODE_TLS_REJECT_UNAUTHORIZED", "0"),
            ];
            let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
            start.env = variables.into();
        }
        let before = host.requests().len();
        let outcome = client.run(start).unwrap();
        assert_eq!(outcome.exited.exit_code, 0, "{}", outcome.stderr());
        assert!(
            outcome.stdout().contains("The stand-in read"),
            "{}",
            outcome.stdout()
        );
        let asked = host.requests().split_off(before);
        let token = BTreeMap::from([("authorization".to_owned(), format!("Bearer {token}"))]);
        for request in asked
            .iter()
            .filter(|request| !request.credentials.is_empty())
        {
            assert_eq!(
                request.credentials, token,
                "{} {}",
                request.method, request.path
            );
        }
        let is_prompt = |request: &&Received| (&*request.method, &*request.path) == ("POST", path);
        let prompt = asked.iter().find(is_prompt).expect("the model was asked");
        assert_eq!(prompt.credentials, token);
    }
}

/// What a provider's CLI keeps of an account.
fn account(provider: &str, token: &str) -> Credential {
    let part = |json: Value| BASE64_URL_SAFE_NO_PAD.encode(json.to_string());
    let content = match provider {
        "openai" => {
            let claims = json!({
                "email": "tester@example.com",
                "exp": 4_000_000_000_u64,
                "https://api.openai.com/auth": {
                    "chatgpt_plan_type": "plus", "chatgpt_account_id": "account",
                    "chatgpt_user_id": "user",
                },
            });
            let id_token = [
                part(json!({ "alg": "none" })),
                part(claims),
                part(json!({})),
            ];
            json!({
                "OPENAI_API_KEY": null,
                "tokens": {
                    "id_token": id_token.join("."), "access_token": token,
                    "refresh_token": fresh_key(), "account_id": "account",
                },
                "last_refresh": "2099-01-01T00:00:00Z",
            })
        }
        "anthropic" => json!({
            "claudeAiOauth": {
                "accessToken": token, "refreshToken": fresh_key(),
                "expiresAt": 4_000_000_000_000_u64, "scopes": ["user:inference", "user:profile"],
                "subscriptionType": "max",
            },
        }),
        "google" => json!({
            "access_token": token, "refresh_token": fresh_key(), "token_type": "Bearer",
            "scope": "https://www.googleapis.com/auth/cloud-platform",
            "expiry_date": 4_000_000_000_000_u64,
        }),
        other => panic!("no provider `{other}`"),
    };
    in_the_clear(Kind::OauthFile(content.to_string().into()))
}
