//! The credential store: in SQLite and in PostgreSQL, with all that databases do.

use std::{fs, time::Duration};

use nix::{
    mount::{MsFlags, mount},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use polydev_proto::runtime::{
    DeleteCredentialRequest, ListCredentialsRequest, RunStart, secret::Kind,
};
use polydev_tests::{
    client::{Client, api_key, in_the_clear, shell},
    folder::Folder,
    fresh_key,
    postgres::Postgres,
    process::{succeed, wait_for_log},
    shim::Shim,
};
use serde_json::Value;
use tonic::Code;

use crate::{
    credentials::{account_file, key_file, put, stored, why},
    refreshed, secrets,
};

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
    let account = account_file("openai", &key);
    refreshed::keep(&client, "openai", &account.to_string());
    let refreshing = RunStart {
        credential: Some(stored()),
        stdin: true,
        ..shell("openai", "read line; echo >> ~/.codex/auth.json")
    };
    let mut refreshing = client.start(refreshing).unwrap();
    postgres.stop();
    let refused = put().unwrap_err();
    assert_eq!(why(&refused), store, "{refused}");
    assert!(!refused.message().contains(&key));
    // What a run refreshes waits for it.
    refreshing.close();
    client.finish(refreshing).unwrap();
    client.run(own()).unwrap();
    wait_for_log(
        &shim.process,
        "waits for the store",
        Duration::from_secs(20),
    );
    postgres.begin();
    put().unwrap();
    refreshed::wait_version(&client, 2);
    // A shim of before that puts another counts on, and knows nothing of it.
    postgres.sql(
        "polydev",
        "UPDATE polydev_credentials SET version = version + 1",
    );
    let info = refreshed::wait_version(&client, 3);
    assert!(
        !info.keep_refreshed && info.refreshed_by_run_id.is_empty(),
        "{info:?}"
    );

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
