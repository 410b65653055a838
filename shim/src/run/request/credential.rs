//! The credential of a run, as the caller names it, and where it is during the run.

use polydev_proto::{
    provider::{Provider, Vendor},
    runtime::{self, CredentialMode},
};

use super::Invalid;
use crate::credentials::Source;

/// A caller that names another server for the model gives it the key itself.
pub(super) fn mode(given: i32, server: Option<&str>) -> Result<CredentialMode, Invalid> {
    match CredentialMode::try_from(given) {
        Ok(CredentialMode::Unspecified) if server.is_some() => Ok(CredentialMode::Inject),
        Ok(mode) => Ok(mode),
        Err(unknown) => Err(Invalid::Value {
            field: "credential_mode",
            given: unknown.to_string(),
            allowed: "CREDENTIAL_MODE_BROKER or CREDENTIAL_MODE_INJECT",
        }),
    }
}

/// The named credential, and whose it is.
pub(super) fn credential_of(
    provider: Provider,
    given: runtime::Credential,
) -> Result<(Vendor, Source), Invalid> {
    let vendor = provider.vendor().map_err(|_| Invalid::Value {
        field: "credential",
        given: "set".into(),
        allowed: "absent, because scripts in Python have no credential",
    })?;
    Ok((vendor, Source::parse(given)?))
}
