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
    run::request::check_user,
    secret::Credential,
};
use prost::Message;

#[derive(clap::Args)]
pub(in crate::command) struct Seal {
    #[command(flatten)]
    name: Name,
    #[command(flatten)]
    given: Given,
    /// File with master keys, as `serve` has it: the first seals.
    #[arg(long, env = "POLYDEV_MASTER_KEY_FILE", value_name = "FILE")]
    master_key_file: Option<PathBuf>,
}

pub(super) fn seal(arguments: &Seal) -> anyhow::Result<ExitCode> {
    let Name { provider, user } = &arguments.name;
    check_user(user)?;
    let keys = KeyRing::load(arguments.master_key_file.as_deref())?;
    let keys = keys.context("there is no master key: --master-key-file names a file with one")?;
    if arguments.given.is_sealed() {
        bail!("what is to be sealed is sealed already: `credentials put` takes records");
    }
    let secret = arguments.given.secret(*provider)?;
    let secret = secret.context("no credential is given in the clear: see --help")?;
    let credential = Credential::parse(secret)?;
    provider.prepare(&credential)?;
    let binding = Binding {
        user_id: user,
        provider: *provider,
    };
    let record = Record::seal(&credential, binding, 1, keys.first());
    let record = BASE64_STANDARD.encode(record.encode_to_vec());
    print(&format!("{record}\n"))?;
    Ok(ExitCode::SUCCESS)
}
