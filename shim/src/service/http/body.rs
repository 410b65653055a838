//! Reads the message in a request's body.

use axum::{
    body::{Body, to_bytes},
    extract::Request,
    http::header::CONTENT_TYPE,
};
use tokio::time::timeout;
use tonic::Status;

use super::{error::Problem, json};
use crate::service::{FIRST_MESSAGE_TIMEOUT, MAX_MESSAGE};

/// The longest body, in bytes. Letters that are not ASCII may take three times as many bytes in
/// JSON as in a message.
const MAX_BODY: usize = 3 * MAX_MESSAGE;

/// The message in a request's body.
pub(super) async fn body<M: json::Message>(request: Request) -> Result<M, Problem> {
    let kind = request.headers().get(CONTENT_TYPE);
    let kind = kind.and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim();
    // Browsers ask with a preflight request before a page of another site may send this type. The
    // shim refuses that request.
    if !kind.eq_ignore_ascii_case("application/json") {
        return Err(Problem::media_type(kind));
    }
    let read = timeout(
        FIRST_MESSAGE_TIMEOUT,
        to_bytes(Body::new(request.into_body()), MAX_BODY),
    )
    .await;
    let late = |_| Status::deadline_exceeded("the body did not arrive within 10 s");
    let bytes = read.map_err(late)?;
    let bytes = bytes.map_err(|error| Problem::body(&error, MAX_BODY))?;
    json::from_slice(&bytes)
}

/// Checks that a body that names what the path names agrees with the path.
pub(super) fn same(field: &str, path: &str, body: &str) -> Result<(), Status> {
    if body.is_empty() || path == body {
        return Ok(());
    }
    Err(Status::invalid_argument(format!(
        "`{field}` is `{body}` in the body and `{path}` in the path: both must be the same"
    )))
}
