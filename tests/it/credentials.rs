//! Credentials reach the one container that may use them, and nobody else sees them.

use std::{collections::BTreeMap, fs, path::Path, process::Command};

use base64::{
    Engine,
    prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD},
};
use nix::unistd::Pid;
use polydev_proto::runtime::{
    Credential, PutCredentialRequest, RunStart, ScryptRecord, SecretEnvironment, StoredCredential,
    credential::Source, run_event::Event, secret::Kind,
};
use polydev_stand_in::Received;
use polydev_tests::{
    client::{Client, api_key, in_the_clear, prompt, shell},
    folder::Folder,
    fresh_key,
    host::Host,
    process::{output, succeed},
    shim::Shim,
};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::secrets;

pub(crate) fn stored() -> Credential {
    Credential {
        source: Some(Source::Stored(StoredCredential {})),
    }
}

pub(crate) fn put(user_id: &str, provider: &str, credential: Credential) -> PutCredentialRequest {
    PutCredentialRequest {
        user_id: user_id.into(),
        provider: provider.into(),
        credential: Some(credential),
        keep_refreshed: false,
    }
}

/// The code and the reason of an error.
pub(crate) fn why(status: &Status) -> (Code, String) {
    let details = status.get_error_details();
    let info = details.error_info().expect("every error has it");
    (status.code(), info.reason.clone())
}

/// A file with master keys, the first of which seals.
pub(crate) fn key_file(folder: &Path, keys: &[[u8; 32]]) -> String {
    let path = folder.join(format!("keys-{:08x}", rand::random::<u32>()));
    let lines = keys.iter().map(|key| format!("{}\n", hex::encode(key)));
    fs::write(&path, lines.collect::<String>()).expect("a file can be written");
    path.display().to_string()
}

/// Puts `tester`'s key for Anthropic into the store, as a record that another process has sealed.
pub(crate) fn put_sealed(shim: &Shim, folder: &Path, keys: &str, key: &str) {
    let mut seal = shim.command(&["credentials", "seal", "anthropic", "--user", "tester"]);
    seal.args(["--master-key-file", keys]);
    let sealed = folder.join("sealed");
    let record = succeed(seal.env("ANTHROPIC_API_KEY", key));
    fs::write(&sealed, record).expect("a file can be written");
    let mut put = shim.command(&["credentials", "put", "anthropic", "--user", "tester"]);
    let told = succeed(put.arg("--sealed-file").arg(sealed));
    assert_eq!(told, "stored api_key of tester for anthropic, version 1\n");
}

/// A sealed credential goes from the store into the container. Neither the driver nor the
/// shim has it in memory, neither while the command has it nor afterwards.
#[test]
fn a_stored_key_is_in_the_container_and_in_nobody_elses_memory() {
    let folder = Folder::new("pdcred-");
    let keys = key_file(folder.path(), &[rand::random()]);
    let store = folder.path().join("store.db");
    let url = format!("sqlite://{}", store.display());
    let options = ["--master-key-file", &keys, "--credential-store", &url];
    let shim = Shim::dev_with(&["anthropic=1"], &options);
    let client = shim.client();

    // Another process seals the key, so that no call to the shim contains it.
    let key = fresh_key();
    put_sealed(&shim, folder.path(), &keys, &key);

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
            None => panic!("the stream ended"),
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

/// A shim with master keys and without a store.
struct Site {
    // Dropped before the folder with the shim's keys.
    shim: Shim,
    client: Client,
    keys: String,
    /// The credentials of users.
    token: String,
    folder: Folder,
}

impl Site {
    fn start(pools: &[&str]) -> Self {
        let folder = Folder::new("pdcred-");
        // This key opens the record of an earlier system.
        let golden: [u8; 32] = std::array::from_fn(|at| u8::try_from(at).expect("it is small"));
        let keys = key_file(folder.path(), &[rand::random(), golden]);
        let shim = Shim::dev_with(pools, &["--master-key-file", &keys]);
        Self {
            client: shim.client(),
            shim,
            keys,
            token: fresh_key(),
            folder,
        }
    }

    /// The output of the command.
    #[track_caller]
    fn run(&self, provider: &str, credential: Credential, script: &str) -> String {
        let start = RunStart {
            credential: Some(credential),
            ..shell(provider, script)
        };
        let outcome = self.client.run(start).expect("a whole run");
        assert_eq!(outcome.exited.exit_code, 0, "{}", outcome.stderr());
        outcome.stdout()
    }

    /// The reason and the message of the refusal. The message never contains the token.
    #[track_caller]
    fn refused(&self, provider: &str, credential: Credential) -> ((Code, String), String) {
        let start = RunStart {
            credential: Some(credential),
            ..shell(provider, "true")
        };
        let status = self.client.run(start).expect_err("a refusal");
        assert!(!status.message().contains(&self.token), "{status}");
        (why(&status), status.message().to_owned())
    }

    /// The token, which another process has sealed.
    fn seal(&self, user: &str, provider: &str, master: &str) -> Credential {
        let mut seal = self.shim.command(&["credentials", "seal", provider]);
        seal.args(["--user", user, "--master-key-file", master]);
        seal.env("OPENAI_API_KEY", &self.token);
        let record = succeed(seal.env("ANTHROPIC_API_KEY", &self.token));
        let record = BASE64_STANDARD.decode(record.trim());
        Credential {
            source: Some(Source::SealedRecord(record.expect("valid base64").into())),
        }
    }
}

fn not_opened() -> (Code, String) {
    (Code::FailedPrecondition, "NOT_OPENED".into())
}

fn invalid() -> (Code, String) {
    (Code::InvalidArgument, "INVALID".into())
}

#[test]
fn an_account_is_a_file_in_memory_where_its_cli_looks() {
    let site = Site::start(&["openai=1", "anthropic=1", "google=1"]);
    let account = format!("{{\"token\":\"{}\"}}", site.token);
    for (provider, path) in [
        ("openai", ".codex/auth.json"),
        ("anthropic", ".claude/.credentials.json"),
        ("google", ".gemini/oauth_creds.json"),
    ] {
        let file = in_the_clear(Kind::OauthFile(account.clone().into()));
        let script = format!("cd ~; cat {path}; stat -c ' %a %u' {path}; stat -f -c %T {path}");
        assert_eq!(
            site.run(provider, file, &script),
            format!("{account} 600 1000\ntmpfs\n")
        );
    }
    let settings = site.run(
        "google",
        in_the_clear(Kind::OauthFile("{}".into())),
        "cat ~/.gemini/settings.json",
    );
    assert!(settings.contains("oauth-personal"), "{settings}");
}

#[test]
fn secret_variables_are_in_the_commands_environment() {
    let site = Site::start(&["openai=1"]);
    let value = format!("{}\n=\u{20ac}", site.token);
    let variables = BTreeMap::from([("MY_TOKEN".to_owned(), value.clone())]);
    let environment = in_the_clear(Kind::Environment(SecretEnvironment { variables }));
    let printed = site.run("openai", environment, "printf %s \"$MY_TOKEN\"");
    assert_eq!(printed, value);
}

#[test]
fn a_record_of_an_earlier_system_opens_for_its_provider() {
    let site = Site::start(&["openai=1", "google=1"]);
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
    let printed = site.run(
        "google",
        scrypt(record.clone()),
        "echo ${#GOOGLE_API_KEY} $GOOGLE_CLOUD_PROJECT",
    );
    assert_eq!(printed, "10 project-123\n");
    let changed = ScryptRecord {
        auth_tag: sixteen(0),
        ..record.clone()
    };
    assert_eq!(site.refused("google", scrypt(changed)).0, not_opened());
    // Other providers cannot use a project.
    let (reason, words) = site.refused("openai", scrypt(record));
    assert_eq!(reason, invalid());
    assert!(
        words.starts_with("`credential.secret.api_key.project_id`"),
        "{words}"
    );
}

#[test]
fn a_sealed_record_opens_for_its_user_and_provider_alone() {
    let site = Site::start(&["openai=1"]);
    let sealed = site.folder.path().join("sealed");
    fs::write(&sealed, "").unwrap();
    let mut again = site.shim.command(&["credentials", "seal", "openai"]);
    again.arg("--sealed-file").arg(&sealed);
    again.env("OPENAI_API_KEY", &site.token);
    let again = output(again.args(["--master-key-file", &site.keys]));
    assert!(!again.status.success(), "a file was replaced");
    let record = site.seal("tester", "openai", &site.keys);
    let printed = site.run("openai", record, "printf %s $CODEX_API_KEY");
    assert_eq!(printed, site.token);
    for (user, provider) in [("tester", "anthropic"), ("mallory", "openai")] {
        let record = site.seal(user, provider, &site.keys);
        assert_eq!(site.refused("openai", record).0, not_opened());
    }
    let another = key_file(site.folder.path(), &[rand::random()]);
    let (unknown, _) = site.refused("openai", site.seal("tester", "openai", &another));
    assert_eq!(
        unknown,
        (Code::FailedPrecondition, "UNKNOWN_MASTER_KEY".into())
    );
}

#[test]
fn a_credential_that_cannot_be_one_is_refused() {
    let site = Site::start(&["openai=0"]);
    let (no_store, _) = site.refused("openai", stored());
    assert_eq!(no_store, (Code::FailedPrecondition, "NO_STORE".into()));
    let no_json = in_the_clear(Kind::OauthFile(site.token.clone().into()));
    assert_eq!(site.refused("openai", no_json).0, invalid());
    let too_long = Credential {
        source: Some(Source::SealedRecord(vec![b'a'; 200_000].into())),
    };
    assert_eq!(site.refused("openai", too_long).0, invalid());
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

/// The file in which a provider's CLI keeps an account.
fn account(provider: &str, token: &str) -> Credential {
    let content = account_file(provider, token);
    in_the_clear(Kind::OauthFile(content.to_string().into()))
}

/// The file of an account that was refreshed recently.
pub(crate) fn account_file(provider: &str, token: &str) -> Value {
    let part = |json: Value| BASE64_URL_SAFE_NO_PAD.encode(json.to_string());
    match provider {
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
    }
}
