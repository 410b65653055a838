//! The credential store in SQLite and in PostgreSQL, also while a database fails.

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
use tonic::{Code, Status};

use crate::{
    credentials::{account_file, key_file, put, stored, why},
    refreshed, secrets,
};

/// A store, and what shims need for it.
struct Store<'a> {
    folder: &'a Folder,
    url: String,
    password: String,
}

impl Store<'_> {
    fn keys(&self, keys: &[[u8; 32]]) -> String {
        key_file(self.folder.path(), keys)
    }

    /// A shim with the master keys of a file.
    fn shim(&self, pool: &str, keys: &str) -> Shim {
        let options = ["--master-key-file", keys, "--credential-store", &self.url];
        Shim::dev_in(&[pool], &options, &[("PGPASSWORD", &*self.password)])
    }
}

/// Stores a key, and returns its version.
fn keep(client: &Client, user: &str, provider: &str, key: &str) -> Result<u64, Status> {
    let request = put(user, provider, api_key(key));
    let kept = client.call(async |mut shim| shim.put_credential(request).await)?;
    Ok(kept.credential.expect("an answer has it").version)
}

/// A run of alice's, which prints her key.
fn prints_its_key() -> RunStart {
    RunStart {
        user_id: "alice".into(),
        credential: Some(stored()),
        ..shell("anthropic", "printf %s $ANTHROPIC_API_KEY")
    }
}

/// The refusal of a shim whose store fails.
fn store_fails() -> (Code, String) {
    (Code::Unavailable, "STORE".into())
}

#[test]
fn credentials_are_kept_in_sqlite() {
    let folder = Folder::new("pdcred-");
    let url = format!("sqlite://{}", folder.path().join("store.db").display());
    is_a_store(&Store {
        folder: &folder,
        url,
        password: String::new(),
    });
}

#[test]
fn a_full_store_refuses_more_and_loses_nothing_of_what_it_has() {
    let folder = Folder::new("pdcred-");
    let full = folder.path().join("full");
    fs::create_dir(&full).unwrap();
    let size = Some("size=64k");
    mount(Some("tmpfs"), &full, Some("tmpfs"), MsFlags::empty(), size).unwrap();
    let store = Store {
        folder: &folder,
        url: format!("sqlite://{}", full.join("store.db").display()),
        password: String::new(),
    };
    let shim = store.shim("openai=0", &store.keys(&[rand::random()]));
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
        assert!(kept < 100, "the disk is never full");
    };
    assert_eq!(why(&refused), store_fails(), "{refused}");
    assert_eq!(list(&client, "", 0).len(), kept);
}

#[test]
fn credentials_are_kept_in_postgresql() {
    let folder = Folder::new("pdcred-");
    let mut postgres = Postgres::start();
    let store = Store {
        folder: &folder,
        url: postgres.url(),
        password: postgres.password.clone(),
    };
    is_a_store(&store);

    let (keys, key) = (store.keys(&[rand::random()]), fresh_key());
    let shim = store.shim("openai=1", &keys);
    let client = shim.client();
    keep(&client, "alice", "openai", &key).unwrap();
    a_store_that_does_not_answer_is_told_in_time(&client, &postgres, &key);
    what_a_run_refreshes_waits_for_its_store(&shim, &mut postgres, &key);
    a_version_of_an_earlier_shim_counts_on(&client, &postgres);
    drop(shim);
    tables_of_a_later_version_are_left_alone(&store, &postgres, &keys, &key);

    // The database has received only the sealed key: no file of the database contains the key.
    assert!(
        !secrets::files(postgres.folder())
            .iter()
            .any(|file| { secrets::holds(&key, &fs::read(file).unwrap_or_default()) })
    );
    let wrong = Store {
        password: "wrong".to_owned(),
        ..store
    };
    let wrong = wrong.shim("openai=0", &keys);
    let refused = keep(&wrong.client(), "alice", "openai", &key).unwrap_err();
    assert_eq!(why(&refused), store_fails());
}

/// Meanwhile the database's processes for shims are paused.
fn a_store_that_does_not_answer_is_told_in_time(client: &Client, postgres: &Postgres, key: &str) {
    let backends = postgres.sql(
        "polydev",
        "SELECT pid FROM pg_stat_activity WHERE usename = 'polydev'",
    );
    let pid = |pid: &str| Pid::from_raw(pid.parse().expect("a number"));
    let backends: Vec<Pid> = backends.lines().map(pid).collect();
    assert!(!backends.is_empty());
    for backend in &backends {
        kill(*backend, Signal::SIGSTOP).expect("a live process");
    }
    let refused = keep(client, "alice", "openai", key).expect_err("a refusal");
    for backend in &backends {
        kill(*backend, Signal::SIGCONT).expect("a live process");
    }
    assert_eq!(why(&refused), store_fails(), "{refused}");
}

/// Meanwhile the store is down. A run that brings its own credential needs no store.
fn what_a_run_refreshes_waits_for_its_store(shim: &Shim, postgres: &mut Postgres, key: &str) {
    let client = shim.client();
    let account = account_file("openai", key);
    refreshed::keep(&client, "openai", &account.to_string());
    let refreshing = RunStart {
        credential: Some(stored()),
        stdin: true,
        ..shell("openai", "read line; echo >> ~/.codex/auth.json")
    };
    let mut refreshing = client.start(refreshing).expect("a slot is idle");
    postgres.stop();
    let refused = keep(&client, "alice", "openai", key).expect_err("a refusal");
    assert_eq!(why(&refused), store_fails(), "{refused}");
    assert!(!refused.message().contains(key));
    refreshing.close();
    client.finish(refreshing).expect("a clean end");
    let own = RunStart {
        credential: Some(api_key(key)),
        ..shell("openai", "true")
    };
    client.run(own).expect("it needs no store");
    wait_for_log(
        &shim.process,
        "waits for the store",
        Duration::from_secs(20),
    );
    postgres.begin();
    keep(&client, "alice", "openai", key).expect("the store is there");
    refreshed::wait_version(&client, 2);
}

/// An earlier shim does not know that runs refresh accounts.
fn a_version_of_an_earlier_shim_counts_on(client: &Client, postgres: &Postgres) {
    postgres.sql(
        "polydev",
        "UPDATE polydev_credentials SET version = version + 1",
    );
    let info = refreshed::wait_version(client, 3);
    assert!(
        !info.keep_refreshed && info.refreshed_by_run_id.is_empty(),
        "{info:?}"
    );
}

fn tables_of_a_later_version_are_left_alone(
    store: &Store<'_>,
    postgres: &Postgres,
    keys: &str,
    key: &str,
) {
    let later = "INSERT INTO polydev_migrations VALUES (99, 'later', now(), true, '\\x00', 1)";
    postgres.sql("polydev", later);
    let shim = store.shim("openai=0", keys);
    let refused = keep(&shim.client(), "alice", "openai", key).expect_err("a refusal");
    assert_eq!(why(&refused), store_fails());
    assert!(
        refused.message().contains("do not fit this version"),
        "{refused}"
    );
}

/// The users and providers of a store's entries, in order.
type Names = Vec<(String, String)>;

/// What every store does.
fn is_a_store(store: &Store<'_>) {
    let (old, new): ([u8; 32], [u8; 32]) = (rand::random(), rand::random());
    let (keys, key) = (store.keys(&[old]), fresh_key());
    let shim = store.shim("anthropic=0", &keys);
    let mut expected = credentials_are_counted_and_listed(&shim, &key);
    a_credential_is_deleted_once(&shim.client(), &mut expected);
    puts_at_the_same_time_are_counted_one_by_one(&shim, &key);
    expected.push(("dave".into(), "google".into()));
    drop(shim);
    the_old_master_key_may_go_after_a_rotation(store, [new, old], &key, &expected);
    without_its_master_key_no_credential_opens(store, &keys, &key);
    let third = store.keys(&[rand::random(), old]);
    let shim = store.shim("anthropic=0", &third);
    a_rotation_leaves_what_does_not_open_as_it_is(&shim, expected.len());
    page_tokens_that_are_none_are_refused(&shim.client());
}

fn credentials_are_counted_and_listed(shim: &Shim, key: &str) -> Names {
    let client = shim.client();
    let mut expected = Names::new();
    for (user, provider, version) in [
        ("alice", "anthropic", 1),
        ("alice", "anthropic", 2),
        ("alice", "openai", 1),
        ("bob/\u{20ac} '; --", "anthropic", 1),
        ("carol", "anthropic", 1),
    ] {
        let kept = keep(&client, user, provider, key).expect("it is kept");
        assert_eq!(kept, version);
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
    let info: Value = serde_json::from_str(&printed).expect("valid JSON");
    assert_eq!(
        (&info["user_id"], &info["kind"]),
        (&"alice".into(), &"api_key".into())
    );
    assert!(info["created_at"].is_string() && !printed.contains(key));
    expected
}

/// Deletes the last entry of the list.
fn a_credential_is_deleted_once(client: &Client, expected: &mut Names) {
    let delete = || {
        let request = DeleteCredentialRequest {
            user_id: "carol".into(),
            provider: "anthropic".into(),
        };
        client.call(async |mut shim| shim.delete_credential(request).await)
    };
    delete().expect("it is deleted");
    let refused = delete().expect_err("a refusal");
    assert_eq!(why(&refused), (Code::NotFound, "NO_CREDENTIAL".into()));
    expected.pop();
    assert_eq!(list(client, "", 0), *expected);
}

fn puts_at_the_same_time_are_counted_one_by_one(shim: &Shim, key: &str) {
    let versions: Vec<u64> = std::thread::scope(|scope| {
        let put = || keep(&shim.client(), "dave", "google", key).ok();
        let puts: Vec<_> = (0..4).map(|_| scope.spawn(put)).collect();
        puts.into_iter()
            .filter_map(|put| put.join().expect("no panic"))
            .collect()
    });
    let mut counted = versions.clone();
    counted.sort_unstable();
    counted.dedup();
    assert_eq!(counted.len(), versions.len(), "{versions:?}");
}

fn the_old_master_key_may_go_after_a_rotation(
    store: &Store<'_>,
    [new, old]: [[u8; 32]; 2],
    key: &str,
    expected: &[(String, String)],
) {
    let shim = store.shim("anthropic=0", &store.keys(&[new, old]));
    let rotated = succeed(&mut shim.command(&["credentials", "rotate"]));
    assert_eq!(
        rotated,
        format!("sealed again: {}, left: 0\n", expected.len())
    );
    drop(shim);
    let shim = store.shim("anthropic=1", &store.keys(&[new]));
    let client = shim.client();
    assert_eq!(list(&client, "", 0), *expected);
    let printed = client.run(prints_its_key()).expect("its key opens");
    assert_eq!(printed.stdout(), key);
    let nobodys = RunStart {
        user_id: "nobody".into(),
        ..prints_its_key()
    };
    let refused = client.run(nobodys).expect_err("a refusal");
    assert_eq!(why(&refused), (Code::NotFound, "NO_CREDENTIAL".into()));
}

/// Meanwhile the shim seals new credentials with the key of `keys`.
fn without_its_master_key_no_credential_opens(store: &Store<'_>, keys: &str, key: &str) {
    let shim = store.shim("anthropic=0", keys);
    let client = shim.client();
    let refused = client.run(prints_its_key()).expect_err("a refusal");
    assert_eq!(
        why(&refused),
        (Code::FailedPrecondition, "UNKNOWN_MASTER_KEY".into())
    );
    keep(&client, "zoe", "google", key).expect("it is kept");
}

/// One credential opens with the old master key; the others do not.
fn a_rotation_leaves_what_does_not_open_as_it_is(shim: &Shim, left: usize) {
    let mut rotate = shim.command(&["credentials", "rotate"]);
    let output = rotate.output().expect("a built program");
    assert_eq!(output.status.code(), Some(125));
    let told = format!("sealed again: 1, left: {left}\n");
    assert_eq!(String::from_utf8_lossy(&output.stdout), told);
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(words.lines().count(), left, "{words}");
    assert!(
        words.starts_with("the credential of alice for anthropic is unchanged: "),
        "{words}"
    );
}

fn page_tokens_that_are_none_are_refused(client: &Client) {
    for page_token in ["x", "openai/\0", "a b/alice"] {
        let request = ListCredentialsRequest {
            page_token: page_token.into(),
            ..Default::default()
        };
        let refused = client.call(async |mut shim| shim.list_credentials(request).await);
        let refused = refused.expect_err("a refusal");
        assert_eq!(why(&refused), (Code::InvalidArgument, "INVALID".into()));
    }
}

/// The names of all entries that match, from as many pages as necessary.
fn list(client: &Client, user_id: &str, page_size: u32) -> Names {
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
