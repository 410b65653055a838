//! The calls about credentials.

use polydev_proto::{
    id::UserId,
    provider::Vendor,
    runtime::{
        CredentialInfo, DeleteCredentialRequest, DeleteCredentialResponse, ListCredentialsRequest,
        ListCredentialsResponse, PutCredentialRequest, PutCredentialResponse,
        RotateCredentialsRequest, RotateCredentialsResponse, RotationFailure,
    },
};
use prost_types::Timestamp;

use super::{Api, page};
use crate::{
    access::{Action, Caller},
    audit::record::{Operation, Record},
    credentials::{
        Error as VaultError, Source,
        record::Binding,
        store::{Filter, Info},
    },
    run::{
        Error,
        request::{Invalid, parse_user},
    },
    secret,
};

impl Api {
    pub(in crate::service) async fn put_credential(
        &self,
        caller: &Caller,
        request: PutCredentialRequest,
    ) -> Result<PutCredentialResponse, Error> {
        self.check_credentials(
            caller,
            &request.user_id,
            &request.provider,
            Operation::PutCredential,
        )?;
        let (user_id, provider) = parse(request.user_id, &request.provider)?;
        let credential = request.credential.ok_or_else(|| Invalid::Value {
            field: "credential",
            given: String::new(),
            allowed: "a credential",
        })?;
        let source = Source::parse(credential).map_err(Invalid::from)?;
        if matches!(source, Source::Stored) {
            return Err(Error::Invalid(Invalid::Credential(secret::Invalid {
                field: "stored".into(),
                problem: "is already in the store: allowed are `secret`, `sealed_record` and \
                          `scrypt_record`",
            })));
        }
        if source.is_unbound() {
            let user_id = user_id.as_str();
            let record = Record::new(caller, Operation::Unbound);
            let record = record.user(user_id).provider(provider.name());
            let provider = provider.into();
            self.permit(caller, Action::Unbound { user_id, provider }, &record)?;
        }
        let binding = Binding {
            user_id: &user_id,
            provider,
        };
        let put = self.vault.put(source, binding, request.keep_refreshed);
        let info = put.await?;
        tracing::info!(
            user_id = %info.user_id,
            provider = info.provider,
            version = info.version,
            "credential stored"
        );
        Ok(PutCredentialResponse {
            credential: Some(encode(info)),
        })
    }

    pub(in crate::service) async fn list_credentials(
        &self,
        caller: &Caller,
        request: ListCredentialsRequest,
    ) -> Result<ListCredentialsResponse, Error> {
        self.check_credentials(
            caller,
            &request.user_id,
            &request.provider,
            Operation::ListCredentials,
        )?;
        let (filter, most) = parse_list(request)?;
        let mut infos = self.vault.list(&filter, most + 1).await?;
        let has_more = infos.len() > most as usize;
        infos.truncate(most as usize);
        let last = infos.last().filter(|_| has_more);
        let next = last.map(|info| token(info.user_id.as_str(), &info.provider));
        Ok(ListCredentialsResponse {
            next_page_token: next.unwrap_or_default(),
            credentials: infos.into_iter().map(encode).collect(),
        })
    }

    pub(in crate::service) async fn delete_credential(
        &self,
        caller: &Caller,
        request: DeleteCredentialRequest,
    ) -> Result<DeleteCredentialResponse, Error> {
        let DeleteCredentialRequest { user_id, provider } = request;
        self.check_credentials(caller, &user_id, &provider, Operation::DeleteCredential)?;
        let (user_id, provider) = parse(user_id, &provider)?;
        let binding = Binding {
            user_id: &user_id,
            provider,
        };
        self.vault.delete(binding).await?;
        tracing::info!(%user_id, %provider, "credential deleted");
        Ok(DeleteCredentialResponse {})
    }

    pub(in crate::service) async fn rotate_credentials(
        &self,
        caller: &Caller,
        request: RotateCredentialsRequest,
    ) -> Result<RotateCredentialsResponse, Error> {
        self.check_credentials(caller, "", "", Operation::RotateCredentials)?;
        let after = parse_token(request.page_token)?;
        let rotated = self.vault.rotate(after).await?;
        tracing::info!(
            sealed = rotated.sealed,
            left = rotated.left,
            "credentials sealed with the first master key"
        );
        let next = rotated.next;
        let next = next.map(|(user_id, provider)| token(user_id.as_str(), &provider));
        Ok(RotateCredentialsResponse {
            sealed: rotated.sealed,
            left: rotated.left,
            next_page_token: next.unwrap_or_default(),
            failed: rotated.failed.into_iter().map(encode_failure).collect(),
        })
    }
}

/// Which credentials to list, and how many per page.
fn parse_list(request: ListCredentialsRequest) -> Result<(Filter, u32), Invalid> {
    let ListCredentialsRequest {
        user_id,
        provider,
        page_size,
        page_token,
    } = request;
    let user_id = Some(user_id).filter(|user_id| !user_id.is_empty());
    let user_id = user_id.map(parse_user).transpose()?;
    let provider = match provider.as_str() {
        "" => None,
        name => Some(name.parse::<Vendor>()?),
    };
    let after = parse_token(page_token)?;
    let most = page::size(page_size)?;
    let filter = Filter {
        user_id,
        provider,
        after,
    };
    Ok((filter, most))
}

fn encode_failure((info, error): (Info, VaultError)) -> RotationFailure {
    RotationFailure {
        user_id: info.user_id.into(),
        provider: info.provider,
        reason: crate::chain(&error),
    }
}

/// The page begins after this credential. The first slash ends the provider, whose name has none.
fn token(user_id: &str, provider: &str) -> String {
    format!("{provider}/{user_id}")
}

fn parse_token(token: String) -> Result<Option<(UserId, String)>, Invalid> {
    if token.is_empty() {
        return Ok(None);
    }
    let parts = token.split_once('/').filter(|(provider, user_id)| {
        let is_name = |byte: u8| byte.is_ascii_graphic();
        provider.bytes().all(is_name) && parse_user((*user_id).to_owned()).is_ok()
    });
    match parts {
        Some((provider, user_id)) => Ok(Some((user_id.into(), provider.to_owned()))),
        None => Err(page::invalid_token(token)),
    }
}

fn parse(user_id: String, provider: &str) -> Result<(UserId, Vendor), Invalid> {
    let provider = provider.parse()?;
    Ok((parse_user(user_id)?, provider))
}

fn encode(info: Info) -> CredentialInfo {
    CredentialInfo {
        user_id: info.user_id.into(),
        provider: info.provider,
        kind: info.kind,
        version: info.version,
        key_id: info.key_id,
        created_at: Some(Timestamp::from(info.created_at)),
        updated_at: Some(Timestamp::from(info.updated_at)),
        keep_refreshed: info.keep_refreshed,
        refreshed_by_run_id: info.refreshed_by,
    }
}
