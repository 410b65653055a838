//! What a shim has allowed is signed for one claim.

use std::{fs, os::unix::fs::PermissionsExt, path::PathBuf, time::SystemTime};

use polydev_proto::{
    execution::{Invalid, Permit, Presented},
    node::Claim,
    signing::PublicKeys,
};
use polydev_tests::{folder::Folder, wait_until};
use rcgen::{KeyPair, PKCS_ED25519};

use crate::site::{LIMIT, Site, steps};

/// A folder with the key of a shim.
struct Key {
    folder: Folder,
}

impl Key {
    fn new() -> (Self, String) {
        let key = Self {
            folder: Folder::new("pdkey-"),
        };
        let public = key.replace();
        (key, public)
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("key.pem")
    }

    /// Writes another private key, and returns its public key.
    fn replace(&self) -> String {
        let pair = KeyPair::generate_for(&PKCS_ED25519).expect("a key");
        let new = self.folder.path().join("new");
        fs::write(&new, pair.serialize_pem()).expect("a file can be written");
        fs::set_permissions(&new, fs::Permissions::from_mode(0o600)).expect("it is ours");
        fs::rename(new, self.path()).expect("a file can be renamed");
        pair.public_key_pem()
    }
}

/// Runs a command, and returns the claim that the node has got.
fn claim(site: &Site) -> Claim {
    site.shim.client().run(steps(&["true"])).expect("it runs");
    site.node().asked().claims.pop().expect("a claim")
}

/// As a driver with this public key checks it.
fn check(mut claim: Claim, public: &str, site: &Site) -> Result<Permit, Invalid> {
    let presented = Presented::take(&mut claim);
    let keys = PublicKeys::read(public.as_bytes()).expect("a public key");
    let (audience, image) = (site.node().identity(), "polydev-anthropic-runtime:latest");
    presented.check(&keys, audience, image, None, SystemTime::now())
}

#[test]
fn a_claim_is_signed_with_the_key_that_the_file_has_now() {
    let (key, first) = Key::new();
    let path = key.path().display().to_string();
    let site = Site::start_with(&[("anthropic", 2)], &["--execution-key-file", &path]);
    let signed = claim(&site);
    let permit = check(signed.clone(), &first, &site).unwrap();
    assert_eq!((permit.nonce.len(), permit.policy_hash.as_str()), (32, ""));
    // Each claim has a nonce of its own.
    assert_ne!(
        check(claim(&site), &first, &site).unwrap().nonce,
        permit.nonce
    );
    // Other words than those that were allowed.
    let mut other = signed;
    other.spec.as_mut().unwrap().argv.push("more".into());
    assert_eq!(check(other, &first, &site), Err(Invalid::Claim));

    let second = key.replace();
    wait_until("the new key", LIMIT, || {
        check(claim(&site), &second, &site).map_err(|error| error.to_string())
    });
}

#[test]
fn a_token_names_the_policy_and_without_a_key_there_is_none() {
    let (key, public) = Key::new();
    let path = key.path().display().to_string();
    let rules = key.folder.path().join("rules.cedar").display().to_string();
    fs::write(&rules, "permit (principal, action, resource);").unwrap();
    let options = ["--execution-key-file", &path, "--policy", &rules];
    let site = Site::start_with(&[("anthropic", 1)], &options);
    let permit = check(claim(&site), &public, &site).unwrap();
    assert_eq!(permit.policy_hash.len(), 64);

    let site = Site::start(&[("anthropic", 1)]);
    assert_eq!(check(claim(&site), &public, &site), Err(Invalid::Missing));
}
