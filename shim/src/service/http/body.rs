//! The message in a request's body.

use axum::{
    body::{Body, to_bytes},
    extract::Request,
    http::header::CONTENT_TYPE,
};
use tokio::time::timeout;
use tonic::Status;

use super::{error::Problem, json};
use crate::service::{FIRST_MESSAGE_TIMEOUT, MAX_MESSAGE};

/// What JSON makes of a message: letters that are not ASCII may take three times as much.
const MAX_BODY: usize = 3 * MAX_MESSAGE;

/// The message in a request's body.
pub(super) async fn body<M: json::Message>(request: Request) -> Result<M, Problem> {
    let kind = request.headers().get(CONTENT_TYPE);
    let kind = kind.and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim();
    // Pages of other sites can send none without being asked first, and are refused then.
    if !kind.eq_ignore_ascii_case("application/json") {
        return Err(Problem::media_type(kind));
    }
    let read = timeout(
        FIRST_MESSAGE_TIMEOUT,
        to_bytes(Body::new(request.into_body()), MAX_BODY),
    )
    .await;
    let late = |_| Status::deadline_exceeded("the body did not come in 10 s");
    let bytes = read.map_err(late)?;
    let bytes = bytes.map_err(|error| Problem::body(&error, MAX_BODY))?;
    json::from_slice(&bytes)
}

/// What a path names, a body may name too.
pub(super) fn same(field: &str, path: &str, body: &str) -> Result<(), Status> {
    if body.is_empty() || path == body {
        return Ok(());
    }
    Err(Status::invalid_argument(format!(
        "`{field}` is `{body}`, and `{path}` in the path"
    )))
}
