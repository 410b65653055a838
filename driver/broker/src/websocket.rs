//! A container's WebSocket to an API: bytes both ways, at the container's speed.

use std::{io, sync::Arc};

use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use http_body_util::{BodyExt, Empty};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, split},
    time::sleep_until,
};

use crate::{
    answer::{self, AnswerBody},
    container::{Container, Place},
    grant::Grant,
    meter::{Messages, Meter},
    rate::Bucket,
};

/// Most bytes that are read at once.
const MAX_PIECE: usize = 16 << 10;

/// Asks the API for a WebSocket. An API without one is answered for with 426: on any other
/// status Codex 0.169 tries again for six seconds, on this one it uses requests at once.
pub(crate) async fn open(
    container: &Arc<Container>,
    grant: &Arc<Grant>,
    client: &reqwest::Client,
    mut outgoing: reqwest::Request,
    upgrade: OnUpgrade,
    place: Place,
    meter: Meter,
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
    meter.answered(answered.status());
    let body = Empty::new().map_err(|never| match never {}).boxed_unsync();
    let mut answer = Response::new(body);
    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    *answer.headers_mut() = answer::headers(answered.headers());
    mark(answer.headers_mut());
    let (container, grant) = (container.clone(), grant.clone());
    tokio::spawn(async move {
        let _until_it_ends = place;
        let carried = async {
            let api = answered.upgrade().await.map_err(io::Error::other)?;
            let ours = upgrade.await.map_err(io::Error::other)?;
            carry(TokioIo::new(ours), api, &container, Messages::new(meter)).await
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

/// Carries both directions until both have ended, or one breaks.
async fn carry(
    ours: impl AsyncRead + AsyncWrite,
    api: impl AsyncRead + AsyncWrite,
    container: &Container,
    mut messages: Messages,
) -> io::Result<()> {
    let (mut from_us, mut to_us) = split(ours);
    let (mut from_api, mut to_api) = split(api);
    tokio::try_join!(
        pass(&mut from_us, &mut to_api, &container.upload, |_| {}),
        pass(&mut from_api, &mut to_us, &container.download, |piece| {
            messages.read(piece)
        }),
    )?;
    Ok(())
}

async fn pass(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    bucket: &Bucket,
    mut see: impl FnMut(&[u8]),
) -> io::Result<()> {
    let mut piece = vec![0; MAX_PIECE];
    loop {
        let count = from.read(&mut piece).await?;
        if count == 0 {
            return to.shutdown().await;
        }
        see(&piece[..count]);
        to.write_all(&piece[..count]).await?;
        sleep_until(bucket.pass(count)).await;
    }
}
