//! `polydev-shim credentials seal`

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context, bail};
use base64::{Engine, prelude::BASE64_STANDARD};
use polydev_cli::{
    credentials::{Given, Name},
    print,
};
use polydev_shim::{
    credentials::{
        keys::KeyRing,
        record::{Binding, Record},
    },
    provider::Cli,
    run::request::parse_user,
    secret::Credential,
};
use prost::Message;

#[derive(clap::Args)]
pub(in crate::command) struct Seal {
    #[command(flatten)]
    name: Name,
    #[command(flatten)]
    given: Given,
    /// File with master keys, as for `serve`: the first key seals. [default: systemd's credential
    /// polydev-master-keys, or ENCRYPTION_MASTER_KEY]
    #[arg(long, env = "POLYDEV_MASTER_KEY_FILE", value_name = "FILE")]
    master_key_file: Option<PathBuf>,
}

pub(super) fn seal(arguments: &Seal) -> anyhow::Result<ExitCode> {
    let Name { provider, user } = &arguments.name;
    let user_id = parse_user(user.clone())?;
    let keys = KeyRing::load(arguments.master_key_file.as_deref())?;
    let keys = keys.context("no master key: --master-key-file must name a file with a key")?;
    if arguments.given.is_sealed() {
        bail!("the credential is already sealed: store the record with `credentials put`");
    }
    let secret = arguments.given.secret(*provider)?;
    let secret = secret.context("no credential given in the clear: see --help")?;
    let credential = Credential::parse(secret)?;
    provider.prepare(&credential)?;
    let binding = Binding {
        user_id: &user_id,
        provider: *provider,
    };
    let record = Record::seal(&credential, binding, 1, keys.first());
    let record = BASE64_STANDARD.encode(record.encode_to_vec());
    print(&format!("{record}\n"))?;
    Ok(ExitCode::SUCCESS)
}
