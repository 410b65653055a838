//! `polydev-shim credentials put|list|delete|rotate`

use std::process::ExitCode;

use anyhow::Context;
use polydev_proto::{
    provider::Vendor,
    runtime::{
        CredentialInfo, DeleteCredentialRequest, ListCredentialsRequest, PutCredentialRequest,
        RotateCredentialsRequest, RotationFailure,
    },
};
use serde_json::{Value, json};

use super::{Given, Name, given::key_variable};
use crate::{FAILED, Options, Output, age, answer, print};

#[derive(clap::Args)]
pub struct Put {
    #[command(flatten)]
    name: Name,
    #[command(flatten)]
    given: Given,
    /// With `--oauth-file`: when the provider's CLI refreshes the file in a run, store the new
    /// file for later runs, until another credential is put. Other holders of the old file may
    /// then have to sign in again.
    #[arg(long)]
    keep_refreshed: bool,
    #[command(flatten)]
    options: Options,
}

#[derive(clap::Args)]
pub struct List {
    /// Only credentials of this user.
    #[arg(long)]
    user: Option<String>,
    /// Only credentials for this provider: openai, anthropic or google.
    #[arg(long)]
    provider: Option<Vendor>,
    #[command(flatten)]
    options: Options,
}

#[derive(clap::Args)]
pub struct Delete {
    #[command(flatten)]
    name: Name,
    #[command(flatten)]
    options: Options,
}

#[derive(clap::Args)]
pub struct Rotate {
    #[command(flatten)]
    options: Options,
}

pub(super) async fn put(arguments: Put) -> anyhow::Result<ExitCode> {
    let Put {
        name,
        given,
        keep_refreshed,
        options,
    } = arguments;
    let credential = given.read(name.provider)?;
    let credential = credential.with_context(|| {
        let variable = key_variable(name.provider);
        format!("no credential is given: set {variable}, or use an option such as --key-file")
    })?;
    let mut shim = options.connect().await?;
    let request = PutCredentialRequest {
        user_id: name.user,
        provider: name.provider.name().into(),
        credential: Some(credential),
        keep_refreshed,
    };
    let kept = answer(shim.put_credential(request)).await?.credential;
    let kept = kept.unwrap_or_default();
    print(&match options.output {
        Output::Json => format!("{}\n", to_json(&kept)),
        Output::Text => format!(
            "stored {} of {} for {}, version {}\n",
            kind(&kept),
            kept.user_id,
            kept.provider,
            kept.version
        ),
    })?;
    Ok(ExitCode::SUCCESS)
}

pub(super) async fn list(arguments: List) -> anyhow::Result<ExitCode> {
    let List { options, .. } = &arguments;
    let mut shim = options.connect().await?;
    if options.output == Output::Text {
        print(&format!(
            "{:<16}  {:<9}  {:<11}  {:>7}  {:<5}  {:<16}  REFRESHED\n",
            "USER", "PROVIDER", "KIND", "VERSION", "AGE", "MASTER KEY"
        ))?;
    }
    let provider = arguments.provider.map(|provider| provider.to_string());
    let mut request = ListCredentialsRequest {
        user_id: arguments.user.clone().unwrap_or_default(),
        provider: provider.unwrap_or_default(),
        ..Default::default()
    };
    loop {
        let page = answer(shim.list_credentials(request.clone())).await?;
        let lines = page.credentials.iter().map(|info| match options.output {
            Output::Text => line(info),
            Output::Json => format!("{}\n", to_json(info)),
        });
        print(&lines.collect::<String>())?;
        request.page_token = page.next_page_token;
        if request.page_token.is_empty() {
            return Ok(ExitCode::SUCCESS);
        }
    }
}

pub(super) async fn delete(arguments: Delete) -> anyhow::Result<ExitCode> {
    let Delete { name, options } = arguments;
    let mut shim = options.connect().await?;
    let request = DeleteCredentialRequest {
        user_id: name.user.clone(),
        provider: name.provider.name().into(),
    };
    answer(shim.delete_credential(request)).await?;
    print(&match options.output {
        Output::Json => "{}\n".to_owned(),
        Output::Text => format!(
            "deleted the credential of {} for {}\n",
            name.user, name.provider
        ),
    })?;
    Ok(ExitCode::SUCCESS)
}

pub(super) async fn rotate(Rotate { options }: Rotate) -> anyhow::Result<ExitCode> {
    let mut shim = options.connect().await?;
    let (mut sealed, mut failed) = (0, 0);
    let mut request = RotateCredentialsRequest::default();
    loop {
        let rotated = answer(shim.rotate_credentials(request.clone())).await?;
        sealed += u64::from(rotated.sealed);
        failed += rotated.failed.len();
        for failure in &rotated.failed {
            let RotationFailure {
                user_id,
                provider,
                reason,
            } = failure;
            eprintln!("the credential of {user_id} for {provider} is unchanged: {reason}");
        }
        let left = rotated.left;
        print(&match options.output {
            Output::Json => format!("{}\n", json!({ "sealed": sealed, "left": left })),
            Output::Text => format!("sealed again: {sealed}, left: {left}\n"),
        })?;
        request.page_token = rotated.next_page_token;
        if request.page_token.is_empty() {
            return Ok(match failed {
                0 => ExitCode::SUCCESS,
                _ => ExitCode::from(FAILED),
            });
        }
    }
}

fn line(info: &CredentialInfo) -> String {
    format!(
        "{:<16}  {:<9}  {:<11}  {:>7}  {:<5}  {:<16}  {}\n",
        info.user_id,
        info.provider,
        kind(info),
        info.version,
        age(info.updated_at),
        info.key_id,
        match (info.keep_refreshed, &*info.refreshed_by_run_id) {
            (false, _) => "-",
            (true, "") => "not yet",
            (true, run_id) => run_id,
        }
    )
}

fn to_json(info: &CredentialInfo) -> Value {
    let time = |at: &Option<prost_types::Timestamp>| at.as_ref().map(ToString::to_string);
    json!({
        "user_id": info.user_id, "provider": info.provider, "kind": kind(info),
        "version": info.version, "key_id": info.key_id, "created_at": time(&info.created_at),
        "updated_at": time(&info.updated_at), "keep_refreshed": info.keep_refreshed,
        "refreshed_by_run_id": info.refreshed_by_run_id,
    })
}

fn kind(info: &CredentialInfo) -> String {
    let name = info.kind().as_str_name();
    name.trim_start_matches("CREDENTIAL_KIND_").to_lowercase()
}
