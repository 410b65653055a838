//! What goes with an account's file to a run, and comes back with what the run refreshed of
//! it: what was sent, and a key that is made of that and of a master key.

use polydev_proto::{init::Refreshable, sealed::PrivateKey};
use prost::Message;
use secrecy::ExposeSecret;
use zeroize::Zeroizing;

use super::{keys::MasterKey, record::Binding, store::Info};
use crate::provider::Cli;

const PURPOSE: &[u8] = b"polydev refreshed account";

/// What was sent to which run.
#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Label {
    /// Of the master key that the key is made of.
    #[prost(string, tag = "1")]
    pub(super) key_id: String,
    #[prost(string, tag = "2")]
    pub(super) user_id: String,
    #[prost(string, tag = "3")]
    pub(super) provider: String,
    #[prost(string, tag = "4")]
    pub(super) run_id: String,
    #[prost(uint64, tag = "5")]
    pub(super) version: u64,
    /// When the first was put: versions begin anew after a deletion.
    #[prost(message, optional, tag = "6")]
    pub(super) created_at: Option<prost_types::Timestamp>,
}

/// What asks for the account's file that `info` is of, should the run refresh it.
pub(super) fn refreshable(
    info: &Info,
    binding: Binding,
    run_id: &str,
    key: &MasterKey,
) -> Refreshable {
    let label = Label {
        key_id: key.id.clone(),
        user_id: info.user_id.clone(),
        provider: info.provider.clone(),
        run_id: run_id.to_owned(),
        version: info.version,
        created_at: Some(info.created_at.into()),
    };
    let label = label.encode_to_vec();
    Refreshable {
        path: binding.provider.account_file().to_owned(),
        public_key: private_key(key, &label).public(),
        label: label.into(),
    }
}

/// What opens a file with this label: HPKE's `DeriveKeyPair` of master key, purpose and label.
pub(super) fn private_key(key: &MasterKey, label: &[u8]) -> PrivateKey {
    let seed = [key.bytes.expose_secret(), PURPOSE, label].concat();
    PrivateKey::derive(&Zeroizing::new(seed))
}
