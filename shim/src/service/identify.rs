//! Identifies callers. A token overrides the name from the connection. Who can have no right to a
//! call is refused before the call is read.

use std::sync::Arc;

use axum::{
    extract::{Request, State},
    http::{
        HeaderMap, HeaderValue,
        header::{AUTHORIZATION, CONTENT_TYPE, WWW_AUTHENTICATE},
        request::Parts,
    },
    middleware::Next,
    response::{IntoResponse, Response},
};
use polydev_transport::connection::Known;
use tonic::{Code, Status};

use super::{http::Problem, needs};
use crate::{
    access::{Access, Caller, Denied},
    audit::{
        Audit,
        record::{Operation, Record},
    },
    rate::Rate,
    run::Error,
    token::{Refused, Subject, Tokens},
};

/// What every caller must pass.
#[derive(Clone)]
pub(super) struct Door {
    /// `None` if the shim accepts no tokens.
    pub(super) tokens: Option<Arc<Tokens>>,
    pub(super) access: Arc<Access>,
    pub(super) audit: Audit,
    /// The limit of each caller.
    pub(super) rate: Arc<Rate>,
}

impl Door {
    /// Records a denial. Callers without any role must not fill the disk with records.
    fn denied(&self, caller: &Caller, record: &Record, denied: Denied) -> Error {
        if !self.access.has_role(caller) {
            record.log();
            return denied.into();
        }
        let recorded = self.audit.record(record);
        recorded.map_or_else(Error::from, |()| denied.into())
    }
}

/// Replaces the [`Caller`] of the connection with the caller that a token names. A request without
/// a known caller is answered here.
pub(super) async fn identify(State(door): State<Door>, request: Request, next: Next) -> Response {
    let (mut head, body) = request.into_parts();
    // Every connection has it.
    let Some(known) = head.extensions.get::<Known>().cloned() else {
        return answer(&head.headers, Refused::Nothing.into());
    };
    match caller(door.tokens.as_deref(), &known, &head).await {
        Ok(caller) => {
            if let Err(exceeded) = door.rate.check(&caller.name) {
                return answer(&head.headers, Error::from(exceeded).into());
            }
            // Before its body is read. Later the call itself is checked.
            let may = needs::of(head.uri.path())
                .map_or(Ok(()), |need| door.access.may_ever(&caller, need));
            if let Err(denied) = may {
                let record = Record::new(&caller, Operation::Call).denied(&denied.to_string());
                return answer(&head.headers, door.denied(&caller, &record, denied).into());
            }
            known.stays();
            // No later layer needs the token.
            head.headers.remove(AUTHORIZATION);
            head.extensions.insert(caller);
            next.run(Request::from_parts(head, body)).await
        }
        Err(refused) => {
            tracing::info!(%refused, from = %known.origin, "caller rejected");
            answer(&head.headers, refused.into())
        }
    }
}

async fn caller(tokens: Option<&Tokens>, known: &Known, head: &Parts) -> Result<Caller, Refused> {
    match (bearer(&head.headers)?, tokens) {
        (Some(token), Some(tokens)) => {
            let Subject { name, user } = tokens.subject(token).await?;
            let origin = known.origin;
            Ok(Caller { name, user, origin })
        }
        (Some(_), None) => Err(Refused::NotTaken),
        (None, _) => Caller::of_connection(known).ok_or(Refused::Nothing),
    }
}

fn bearer(headers: &HeaderMap) -> Result<Option<&str>, Refused> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    let (scheme, token) = value
        .to_str()
        .ok()
        .and_then(|value| value.split_once(' '))
        .ok_or(Refused::Header)?;
    match scheme.eq_ignore_ascii_case("bearer") && values.next().is_none() {
        true => Ok(Some(token.trim())),
        false => Err(Refused::Header),
    }
}

fn answer(headers: &HeaderMap, status: Status) -> Response {
    let kind = headers.get(CONTENT_TYPE);
    if kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc")) {
        return status.into_http();
    }
    let is_unknown = status.code() == Code::Unauthenticated;
    let mut response = Problem::from(status).into_response();
    if is_unknown {
        let challenge = HeaderValue::from_static("Bearer error=\"invalid_token\"");
        response.headers_mut().insert(WWW_AUTHENTICATE, challenge);
    }
    response
}
