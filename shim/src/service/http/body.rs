//! Reads the message in a request's body.

use axum::{body::Body, extract::Request, http::header::CONTENT_TYPE};
use futures_util::StreamExt;
use http_body_util::Limited;
use tokio::time::timeout;
use tonic::Status;

use super::{error::Problem, json};
use crate::service::{
    FIRST_MESSAGE_TIMEOUT, MAX_MESSAGE,
    bodies::{Bodies, MAX_SHORT, Share},
};

/// The longest body, in bytes. Letters that are not ASCII may take three times as many bytes in
/// JSON as in a message.
const MAX_BODY: usize = 3 * MAX_MESSAGE;

/// The message in a request's body.
pub(super) async fn body<M: json::Message>(
    bodies: &Bodies,
    request: Request,
) -> Result<M, Problem> {
    let kind = request.headers().get(CONTENT_TYPE);
    let kind = kind.and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim();
    // Browsers ask with a preflight request before a page of another site may send this type. The
    // shim refuses that request.
    if !kind.eq_ignore_ascii_case("application/json") {
        return Err(Problem::media_type(kind));
    }
    let read = timeout(FIRST_MESSAGE_TIMEOUT, read(bodies, request.into_body())).await;
    let late = |_| Status::deadline_exceeded("the body did not arrive within 10 s");
    let (bytes, _held) = read.map_err(late)??;
    json::from_slice(&bytes)
}

/// The whole body, with its share of the memory if it is a long one.
async fn read(bodies: &Bodies, body: Body) -> Result<(Vec<u8>, Option<Share>), Problem> {
    let mut pieces = Body::new(Limited::new(body, MAX_BODY)).into_data_stream();
    let (mut read, mut share) = (Vec::new(), None);
    while let Some(piece) = pieces.next().await {
        let piece = piece.map_err(|error| Problem::body(&error, MAX_BODY))?;
        read.extend_from_slice(&piece);
        if read.len() > MAX_SHORT {
            let share = match &mut share {
                Some(share) => share,
                none => none.insert(bodies.share()?),
            };
            share.grow_to(read.len())?;
        }
    }
    Ok((read, share))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn bodies_have_one_memory_together() {
        let bodies = Bodies::new();
        let read = async || read(&bodies, Body::from(vec![b' '; MAX_BODY - 1024])).await;
        let mut held = Vec::new();
        let refused = loop {
            match read().await {
                Ok(read) => held.push(read),
                Err(refused) => break refused,
            }
        };
        assert!(
            format!("{refused:?}").contains("64 MiB of request bodies"),
            "{refused:?}"
        );
        assert!(held.len() > 1);
        super::read(&bodies, Body::from("short")).await.unwrap();
        held.pop();
        read().await.unwrap();
    }

    #[tokio::test]
    async fn a_body_has_an_end() {
        let body = Body::from(vec![b' '; MAX_BODY + 1]);
        let refused = read(&Bodies::new(), body).await.map(drop).unwrap_err();
        assert!(format!("{refused:?}").contains("more than"), "{refused:?}");
    }
}
