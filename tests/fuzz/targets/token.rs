//! Tokens of tool calls and of runs: whatever is read, nobody without the key makes one that is
//! right.
#![no_main]

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    time::SystemTime,
};

use base64::prelude::{BASE64_STANDARD, Engine};
use libfuzzer_sys::fuzz_target;
use polydev_policy::{secrets::Secrets, token::Token};
use polydev_proto::{
    execution::Presented,
    node::{Claim, ExecutionToken},
    signing::PublicKeys,
};
use prost::Message;

fuzz_target!(|data: &[u8]| {
    if let Ok(token) = serde_json::from_slice::<Token>(data) {
        // The fuzzer sees what is compared, and would learn the code for a secret that stays the
        // same.
        let mut hasher = DefaultHasher::new();
        data.hash(&mut hasher);
        let secrets = Secrets::read(&format!("a secret of this input: {}", hasher.finish()));
        let secrets = secrets.expect("it is long enough");
        assert!(!secrets.verify(&token.signed(), &token.signature, token.key_id.as_deref()));
        let again = serde_json::to_string(&token).expect("it has texts alone");
        assert_eq!(
            serde_json::from_str::<Token>(&again).expect("its own form"),
            token
        );
    }
    if let Ok(token) = ExecutionToken::decode(data) {
        let mut claim = Claim {
            token: Some(token),
            ..Claim::default()
        };
        let presented = Presented::take(&mut claim);
        let keys = PublicKeys::read(public_key().as_bytes()).expect("a public key");
        let checked = presented.check(&keys, "", "", None, SystemTime::UNIX_EPOCH);
        assert!(checked.is_err(), "nobody has its private key");
    }
});

/// The form of an Ed25519 key in X.509 (RFC 8410, section 4), with a point that nobody has the
/// private key of.
fn public_key() -> String {
    let form = [
        0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00,
    ];
    let text = BASE64_STANDARD.encode([&form[..], &[9; 32]].concat());
    format!("-----BEGIN PUBLIC KEY-----\n{text}\n-----END PUBLIC KEY-----\n")
}
