//! Signed-in accounts: later runs get an account as an earlier run has refreshed it.

use std::{fs, time::Duration};

use nix::unistd::Pid;
use polydev_proto::runtime::{
    CredentialInfo, ListCredentialsRequest, PutCredentialRequest, RunStart, secret::Kind,
};
use polydev_tests::{
    client::{Client, api_key, in_the_clear, prompt, shell},
    folder::Folder,
    fresh_key,
    host::Host,
    shim::Shim,
    wait_until,
};
use serde_json::json;
use sha2::{Digest, Sha256};
use tonic::Code;
use tonic_types::StatusExt;

use crate::{
    credentials::{account_file, key_file, put, stored},
    secrets,
};

/// A shim with a store, and pools.
fn shim(folder: &Folder, pools: &[&str]) -> Shim {
    let keys = key_file(folder.path(), &[rand::random()]);
    let url = format!("sqlite://{}", folder.path().join("store.db").display());
    let options = ["--master-key-file", &keys, "--credential-store", &url];
    Shim::dev_with(pools, &options)
}

/// Stores an account of `tester`. The store also keeps the account as runs refresh it.
pub(crate) fn keep(client: &Client, provider: &str, content: &str) {
    let file = in_the_clear(Kind::OauthFile(content.to_owned().into()));
    let request = PutCredentialRequest {
        keep_refreshed: true,
        ..put("tester", provider, file)
    };
    let kept = client.call(async |mut shim| shim.put_credential(request).await);
    kept.expect("the store takes it");
}

/// The store's entry for `tester`.
pub(crate) fn info(client: &Client) -> CredentialInfo {
    let request = ListCredentialsRequest {
        user_id: "tester".into(),
        ..Default::default()
    };
    let page = client.call(async |mut shim| shim.list_credentials(request).await);
    page.expect("the store answers").credentials.remove(0)
}

/// Waits until the store's entry for `tester` has this version.
pub(crate) fn wait_version(client: &Client, version: u64) -> CredentialInfo {
    let limit = Duration::from_secs(30);
    wait_until("the refreshed account", limit, || {
        let info = info(client);
        match info.version == version {
            true => Ok(info),
            false => Err(format!("{info:?}")),
        }
    })
}

/// The account that a run finds.
fn found(client: &Client) -> String {
    let start = RunStart {
        credential: Some(stored()),
        ..shell("anthropic", "cat ~/.claude/.credentials.json")
    };
    client.run(start).expect("a whole run").stdout()
}

#[test]
fn the_real_codex_refreshes_an_account_once_for_all_runs() {
    let (host, folder) = (Host::start(), Folder::new("pdfresh-"));
    let shim = shim(&folder, &["openai=1"]);
    let client = shim.client();
    let (token, refresh) = (fresh_key(), fresh_key());
    let mut account = account_file("openai", &token);
    account["last_refresh"] = "2020-01-01T00:00:00Z".into();
    account["tokens"]["refresh_token"] = refresh.clone().into();
    keep(&client, "openai", &account.to_string());
    for run in 1..=2 {
        let mut start = prompt("openai", "What is new?", "", &host.url);
        start.credential = Some(stored());
        let variable = "CODEX_REFRESH_TOKEN_URL_OVERRIDE".to_owned();
        let url = format!("{}/oauth/token", host.url);
        start.env.insert(variable, url);
        let before = host.requests().len();
        let outcome = client.run(start).unwrap();
        assert_eq!(outcome.exited.exit_code, 0, "{}", outcome.stderr());
        let asked = host.requests().split_off(before);
        let is_refresh = |path: &str| path == "/oauth/token";
        let refreshes = asked.iter().filter(|request| is_refresh(&request.path));
        assert_eq!(refreshes.count(), if run == 1 { 1 } else { 0 }, "run {run}");
        let prompted = asked
            .iter()
            .find(|request| (&*request.method, &*request.path) == ("POST", "/v1/responses"));
        let shown = &prompted.expect("the model was asked").credentials["authorization"];
        assert_eq!(*shown, format!("Bearer of {refresh}"), "run {run}");
        wait_version(&client, 2);
    }
}

#[test]
fn a_refreshed_account_takes_the_place_of_the_one_its_run_got_and_of_no_other() {
    let folder = Folder::new("pdfresh-");
    let shim = shim(&folder, &["anthropic=2"]);
    let client = shim.client();
    let written = |content: &str| format!("printf %s '{content}' > ~/.claude/.credentials.json");
    let run = |script: String| RunStart {
        credential: Some(stored()),
        stdin: true,
        ..shell("anthropic", &script)
    };
    let account = || account_file("anthropic", &fresh_key()).to_string();
    let [first, second, other] = [account(), account(), account()];
    keep(&client, "anthropic", &account());
    client.wait_idle("anthropic", 2);

    // A refreshed account is kept while its run continues, and when its run has ended.
    let script = [written(&first), "echo; read line".into(), written(&second)];
    let mut long = client.start(run(script.join("; "))).unwrap();
    let run_id = long.accepted.run_id.clone();
    assert_eq!(wait_version(&client, 2).refreshed_by_run_id, run_id);
    assert_eq!(found(&client), first);
    long.close();
    client.finish(long).unwrap();
    wait_version(&client, 3);
    assert_eq!(found(&client), second);

    // A new account of the user overrides a refreshed one.
    let script = format!("echo; read line; {}", written(&account()));
    let mut late = client.start(run(script)).unwrap();
    keep(&client, "anthropic", &other);
    late.close();
    client.finish(late).unwrap();
    let refused = |count: usize| {
        wait_until("it is refused", Duration::from_secs(10), || {
            let log = shim.process.log();
            match log.matches("refreshed account rejected").count() >= count {
                true => Ok(()),
                false => Err(log),
            }
        });
        assert_eq!(found(&client), other);
    };
    refused(1);

    // The store keeps nothing that is not an account, and nothing without the user's request.
    for (content, count) in [("{}", 2), (r#"{"claudeAiOauth":{}}"#, 3)] {
        client.run(run(written(content))).unwrap();
        refused(count);
    }
    let plain = account();
    let file = in_the_clear(Kind::OauthFile(plain.clone().into()));
    let request = put("tester", "anthropic", file);
    client
        .call(async |mut shim| shim.put_credential(request).await)
        .unwrap();
    client.run(run(written(&account()))).unwrap();
    assert_eq!(found(&client), plain);
    let request = PutCredentialRequest {
        keep_refreshed: true,
        ..put("tester", "anthropic", api_key("k"))
    };
    let refused = client.call(async |mut shim| shim.put_credential(request).await);
    let refused = refused.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    let details = refused.get_error_details();
    let violations = &details.bad_request().unwrap().field_violations;
    assert_eq!(violations[0].field, "keep_refreshed");
}

/// The command computes the token from its input, so that no call to a shim contains it.
#[test]
fn what_a_run_refreshes_is_in_nobody_elses_memory() {
    let folder = Folder::new("pdfresh-");
    let shim = shim(&folder, &["anthropic=1"]);
    let client = shim.client();
    keep(
        &client,
        "anthropic",
        &account_file("anthropic", &fresh_key()).to_string(),
    );
    let seed = fresh_key();
    let token = hex::encode(Sha256::digest(&seed));
    let content = json!({ "claudeAiOauth": { "accessToken": token, "refreshToken": token } });
    let script = format!(
        r#"t=$(printf %s {seed} | sha256sum | cut -c1-64)
           printf '{}' $t $t > ~/.claude/.credentials.json"#,
        content.to_string().replace(&token, "%s")
    );
    let start = |script: &str| RunStart {
        credential: Some(stored()),
        ..shell("anthropic", script)
    };
    client.run(start(&script)).unwrap();
    wait_version(&client, 2);
    // The store has this account, and a shim has read it once more.
    let found = client.run(start("sha256sum < ~/.claude/.credentials.json"));
    let hash = hex::encode(Sha256::digest(content.to_string()));
    assert_eq!(found.unwrap().stdout(), format!("{hash}  -\n"));
    client.wait_idle("anthropic", 1);
    let driver = fs::read_to_string(shim.state_dir().join("driver.lock")).unwrap();
    let driver = Pid::from_raw(driver.trim().parse().unwrap());
    for (name, pid) in [("shim", shim.process.pid()), ("driver", driver)] {
        assert!(
            !secrets::is_in_memory(&token, pid),
            "in the {name}'s memory"
        );
    }
    assert!(
        secrets::is_in_memory(&token, Pid::this()),
        "the search finds nothing"
    );
}
