//! A container's WebSocket to an API: bytes both ways, at the container's speed.

use std::{io, sync::Arc};

use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;

use crate::{
    answer::{self, AnswerBody},
    container::{Container, Place},
    frames::{Frames, Part},
    grant::Grant,
    meter::{Messages, Meter},
    tunnel::carry,
};

/// Asks the API for a WebSocket. An API without one is answered for with 426: on any other
/// status Codex 0.169 tries again for six seconds, on this one it uses requests at once.
pub(crate) async fn open(
    container: &Arc<Container>,
    grant: &Arc<Grant>,
    client: &reqwest::Client,
    mut outgoing: reqwest::Request,
    upgrade: OnUpgrade,
    place: Place,
    mut meter: Meter,
) -> reqwest::Result<Response<AnswerBody>> {
    let headers = outgoing.headers_mut();
    mark(headers);
    // Compressed messages state no tokens that the broker could read.
    headers.remove(header::SEC_WEBSOCKET_EXTENSIONS);
    let answered = client.execute(outgoing).await?;
    if answered.status() != StatusCode::SWITCHING_PROTOCOLS {
        let message = format!(
            "the API offers no WebSocket: it answered with {}",
            answered.status()
        );
        return Ok(answer::error(StatusCode::UPGRADE_REQUIRED, &message));
    }
    meter.answered(answered.status(), false);
    let mut answer = Response::new(answer::empty());
    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    *answer.headers_mut() = answer::headers(answered.headers());
    mark(answer.headers_mut());
    let (container, grant) = (container.clone(), grant.clone());
    tokio::spawn(async move {
        let _until_it_ends = place;
        let mut messages = Messages::new(meter);
        let carried = async {
            let api = answered.upgrade().await.map_err(io::Error::other)?;
            let ours = upgrade.await.map_err(io::Error::other)?;
            let mut frames = Frames::default();
            let ask = |part: Part| match part {
                Part::Begin => (container.ask(&grant))
                    .map_err(|exhausted| io::Error::new(io::ErrorKind::QuotaExceeded, exhausted)),
                Part::Text(_) | Part::End => Ok(()),
            };
            let ask = |piece: &[u8]| frames.read(piece, ask);
            let read = |piece: &[u8]| messages.read(piece);
            carry(TokioIo::new(ours), api, &container, ask, read).await
        };
        tokio::select! {
            carried = carried => if let Err(error) = carried {
                tracing::debug!(container = container.name(), %error, "a WebSocket broke");
            },
            () = grant.over().cancelled() => {}
        }
    });
    Ok(answer)
}

fn mark(headers: &mut HeaderMap) {
    headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
}
