//! Credentials as callers, the store's database and a driver may give them, and what would be
//! in them once they have opened: a fuzzer does not get past a cipher.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use polydev_proto::{
    provider::Vendor,
    runtime::{self, Secret},
    sealed::PrivateKey,
};
use polydev_shim::{
    credentials::{Source, record::Record},
    provider::Cli,
    secret::Credential,
};
use prost::Message;

static KEY: LazyLock<PrivateKey> = LazyLock::new(|| PrivateKey::derive(&[7; 32]));

fuzz_target!(|data: &[u8]| {
    // The first byte says what it is.
    let Some((&kind, data)) = data.split_first() else {
        return;
    };
    match kind % 4 {
        0 => {
            let Ok(given) = runtime::Credential::decode(data) else {
                return;
            };
            if let Err(error) = Source::parse(given) {
                let text = error.to_string();
                assert!(
                    text.starts_with("`credential."),
                    "no field is named: {text}"
                );
            }
        }
        1 => {
            let Ok(secret) = Secret::decode(data) else {
                return;
            };
            if let Ok(credential) = Credential::parse(secret) {
                for provider in Vendor::all() {
                    let _unfit = provider.prepare(&credential);
                }
            }
        }
        2 => {
            if let Ok(record) = Record::read(data) {
                let again = Record::read(&record.encode_to_vec());
                assert_eq!(again.ok(), Some(record), "what is written is read");
            }
        }
        _ => {
            assert!(KEY.open(data, "run").is_err());
            assert!(KEY.open_refreshed(data, b"label").is_err());
        }
    }
});
