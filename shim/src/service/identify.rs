//! Identifies callers. A token overrides the name from the connection.

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
use polydev_transport::connection::NOBODY;
use tonic::{Code, Status};

use super::http::Problem;
use crate::{
    access::Caller,
    rate::Rate,
    run::Error,
    token::{Refused, Tokens},
};

/// What every caller must pass.
#[derive(Clone)]
pub(super) struct Door {
    /// `None` if the shim accepts no tokens.
    pub(super) tokens: Option<Arc<Tokens>>,
    /// The limit of each caller.
    pub(super) rate: Arc<Rate>,
}

/// Replaces the [`Caller`] of the connection with the caller that a token names. A request without
/// a known caller is answered here.
pub(super) async fn identify(State(door): State<Door>, request: Request, next: Next) -> Response {
    let (mut head, body) = request.into_parts();
    match caller(door.tokens.as_deref(), &head).await {
        Ok(caller) => {
            if let Err(exceeded) = door.rate.check(&caller.0) {
                return answer(&head.headers, Error::from(exceeded).into());
            }
            // No later layer needs the token.
            head.headers.remove(AUTHORIZATION);
            head.extensions.insert(caller);
            next.run(Request::from_parts(head, body)).await
        }
        Err(refused) => {
            tracing::info!(%refused, "caller rejected");
            answer(&head.headers, refused.into())
        }
    }
}

async fn caller(tokens: Option<&Tokens>, head: &Parts) -> Result<Caller, Refused> {
    let of_connection = head.extensions.get::<Caller>().cloned();
    match (bearer(&head.headers)?, tokens) {
        (Some(token), Some(tokens)) => tokens.caller(token).await,
        (Some(_), None) => Err(Refused::NotTaken),
        (None, _) => of_connection
            .filter(|caller| caller.0 != NOBODY)
            .ok_or(Refused::Nothing),
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
