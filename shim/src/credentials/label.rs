//! The label of an account file that goes to a run. The label says what was sent, and comes back
//! with the refreshed file. The key for the refreshed file is derived from the label and a master
//! key.

use polydev_proto::{id::RunId, init::Refreshable, sealed::PrivateKey};
use prost::Message;
use secrecy::ExposeSecret;
use zeroize::Zeroizing;

use super::{keys::MasterKey, record::Binding, store::Info};
use crate::provider::Cli;

const PURPOSE: &[u8] = b"polydev refreshed account";

/// Which credential was sent to which run.
#[derive(Clone, PartialEq, Eq, Message)]
pub(super) struct Label {
    /// The id of the master key from which the file's key is derived.
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
    /// When version 1 was put: versions start again after a deletion.
    #[prost(message, optional, tag = "6")]
    pub(super) created_at: Option<prost_types::Timestamp>,
}

/// Asks the run to send back the account file of `info` if the run refreshes the file.
pub(super) fn refreshable(
    info: &Info,
    binding: Binding,
    run_id: RunId,
    key: &MasterKey,
) -> Refreshable {
    let label = Label {
        key_id: key.id.clone(),
        user_id: info.user_id.clone().into(),
        provider: info.provider.clone(),
        run_id: run_id.into(),
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

/// The key that opens a file with this label: HPKE's `DeriveKeyPair` of master key, purpose and
/// label.
pub(super) fn private_key(key: &MasterKey, label: &[u8]) -> PrivateKey {
    let seed = [key.bytes.expose_secret(), PURPOSE, label].concat();
    PrivateKey::derive(&Zeroizing::new(seed))
}
