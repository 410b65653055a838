//! The calls about credentials.

use polydev_proto::runtime::{
    CredentialInfo, DeleteCredentialRequest, DeleteCredentialResponse, ListCredentialsRequest,
    ListCredentialsResponse, PutCredentialRequest, PutCredentialResponse,
    RotateCredentialsResponse,
};
use prost_types::Timestamp;

use super::page;
use crate::{
    credentials::{
        Invalid as InvalidCredential, Source, Vault,
        record::Binding,
        store::{Filter, Row},
    },
    provider::Provider,
    run::{
        Error,
        request::{Invalid, check_user},
    },
};

pub(super) async fn put(
    vault: &Vault,
    request: PutCredentialRequest,
) -> Result<PutCredentialResponse, Error> {
    let provider = parse(&request.user_id, &request.provider)?;
    let credential = request.credential.ok_or_else(|| Invalid::Value {
        field: "credential",
        given: String::new(),
        allowed: "a credential",
    })?;
    let source = Source::parse(credential).map_err(Invalid::from)?;
    let source = match source {
        Source::Given(credential) => {
            // One that no run could use is not kept.
            provider.prepare(&credential).map_err(Invalid::from)?;
            Source::Given(credential)
        }
        Source::Stored => {
            return Err(Error::Invalid(Invalid::Credential(InvalidCredential {
                field: "stored".into(),
                problem: "names what is in the store already: another source is needed",
            })));
        }
        sealed => sealed,
    };
    let binding = Binding {
        user_id: &request.user_id,
        provider,
    };
    let row = vault.put(source, binding).await?;
    tracing::info!(
        user_id = row.user_id,
        provider = row.provider,
        version = row.version,
        "credential put"
    );
    Ok(PutCredentialResponse {
        credential: Some(encode(row)),
    })
}

pub(super) async fn list(
    vault: &Vault,
    request: ListCredentialsRequest,
) -> Result<ListCredentialsResponse, Error> {
    let ListCredentialsRequest {
        user_id,
        provider,
        page_size,
        page_token,
    } = request;
    let user_id = Some(user_id).filter(|user_id| !user_id.is_empty());
    user_id.as_deref().map_or(Ok(()), check_user)?;
    let provider = match provider.as_str() {
        "" => None,
        name => Some(name.parse().map_err(Invalid::from)?),
    };
    let after = match page_token.split_once('/') {
        _ if page_token.is_empty() => None,
        Some((provider, user_id)) => Some((user_id.to_owned(), provider.to_owned())),
        None => return Err(page::invalid_token(page_token).into()),
    };
    let most = page::size(page_size)?;
    let filter = Filter {
        user_id,
        provider,
        after,
    };
    let mut rows = vault.list(&filter, most + 1).await?;
    let has_more = rows.len() > most as usize;
    rows.truncate(most as usize);
    let last = rows.last().filter(|_| has_more);
    Ok(ListCredentialsResponse {
        next_page_token: last.map_or_else(String::new, |row| {
            // No provider's name has a slash.
            format!("{}/{}", row.provider, row.user_id)
        }),
        credentials: rows.into_iter().map(encode).collect(),
    })
}

pub(super) async fn delete(
    vault: &Vault,
    request: DeleteCredentialRequest,
) -> Result<DeleteCredentialResponse, Error> {
    let DeleteCredentialRequest { user_id, provider } = request;
    let provider = parse(&user_id, &provider)?;
    let user = &user_id;
    let binding = Binding {
        user_id: user,
        provider,
    };
    vault.delete(binding).await?;
    tracing::info!(user_id, %provider, "credential deleted");
    Ok(DeleteCredentialResponse {})
}

pub(super) async fn rotate(vault: &Vault) -> Result<RotateCredentialsResponse, Error> {
    let rotated = vault.rotate().await?;
    tracing::info!(
        sealed = rotated.sealed,
        left = rotated.left,
        "credentials sealed anew"
    );
    Ok(RotateCredentialsResponse {
        sealed: rotated.sealed,
        left: rotated.left,
    })
}

fn parse(user_id: &str, provider: &str) -> Result<Provider, Invalid> {
    let provider = provider.parse()?;
    check_user(user_id)?;
    Ok(provider)
}

fn encode(row: Row) -> CredentialInfo {
    CredentialInfo {
        user_id: row.user_id,
        provider: row.provider,
        kind: row.kind,
        version: row.version,
        key_id: row.key_id,
        created_at: Some(Timestamp::from(row.created_at)),
        updated_at: Some(Timestamp::from(row.updated_at)),
    }
}
