//! Bytes in both directions between a container and a server, at the container's speed.

use std::{io, pin::pin, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, split},
    time::{sleep_until, timeout},
};

use crate::{container::Container, rate::Bucket};

/// Most bytes that are read at once.
const MAX_PIECE: usize = 16 << 10;

/// How long one direction may last after the other has ended: a peer that is gone for good may
/// never say so.
const HALF_CLOSED_TIMEOUT: Duration = Duration::from_secs(5 * 60);

/// Carries both directions until both have ended, or one breaks. `up` gets what the container
/// sends and may stop it, `down` what the server sends.
///
/// # Cancel safety
/// Cancelling closes both connections.
pub(crate) async fn carry(
    container: impl AsyncRead + AsyncWrite,
    server: impl AsyncRead + AsyncWrite,
    rates: &Container,
    up: impl FnMut(&[u8]) -> io::Result<()>,
    mut down: impl FnMut(&[u8]),
) -> io::Result<()> {
    let (mut from_container, mut to_container) = split(container);
    let (mut from_server, mut to_server) = split(server);
    let mut up = pin!(pass(&mut from_container, &mut to_server, &rates.upload, up));
    let mut down = pin!(pass(
        &mut from_server,
        &mut to_container,
        &rates.download,
        |piece| {
            down(piece);
            Ok(())
        }
    ));
    tokio::select! {
        ended = &mut up => {
            ended?;
            timeout(HALF_CLOSED_TIMEOUT, down).await?
        }
        ended = &mut down => {
            ended?;
            timeout(HALF_CLOSED_TIMEOUT, up).await?
        }
    }
}

async fn pass(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    bucket: &Bucket,
    mut see: impl FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut piece = vec![0; MAX_PIECE];
    loop {
        let count = from.read(&mut piece).await?;
        if count == 0 {
            return to.shutdown().await;
        }
        see(&piece[..count])?;
        to.write_all(&piece[..count]).await?;
        sleep_until(bucket.pass(count)).await;
    }
}
