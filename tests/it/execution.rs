//! A node that requires execution tokens runs what a shim has allowed, and nothing else.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use polydev_proto::runtime::RunStart;
use polydev_tests::{client::shell, folder::Folder, nomad::Nomad, shim::Shim, wait_until};
use rcgen::{KeyPair, PKCS_ED25519};

const LIMIT: Duration = Duration::from_secs(30);

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
    replace(&path("keys.pem"), &first.public_key_pem());
    replace(&path("key.pem"), &first.serialize_pem());
    let keys = path("keys.pem");
    let nomad = Nomad::start_with(&format!(
        "execution_tokens {{\n  keys = \"{}\"\n}}",
        keys.display()
    ));
    nomad.submit_pool("anthropic", 2);
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
