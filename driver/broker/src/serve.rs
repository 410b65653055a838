//! Serves the connections of one container.

use std::{convert::Infallible, sync::Arc, time::Duration};

use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    time::sleep,
};

use crate::{
    container::{Container, Place},
    forward,
};

/// Most bytes of a request's headers.
const MAX_HEADERS: usize = 64 << 10;
/// Time for a connection to send the headers of its next request. An idle one is closed then.
const HEADER_TIMEOUT: Duration = Duration::from_secs(120);
/// When no connection can be accepted, for example for want of descriptors.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);

/// Accepts connections until the container is closed. They end then too.
///
/// # Cancel safety
/// Cancelling it lets connections go on.
pub(crate) async fn serve(listener: TcpListener, container: Arc<Container>) {
    loop {
        let place = container.place().await;
        match listener.accept().await {
            Ok((stream, _)) => {
                tokio::spawn(connection(stream, container.clone(), place));
            }
            Err(error) => {
                tracing::debug!(container = container.name(), %error, "cannot accept");
                sleep(RETRY_INTERVAL).await;
            }
        }
    }
}

async fn connection(stream: TcpStream, container: Arc<Container>, place: Place) {
    // A piece of a stream should not wait for the next one.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "cannot set TCP_NODELAY");
    }
    let service = service_fn(|request| {
        let (container, place) = (&container, &place);
        async move { Ok::<_, Infallible>(forward::answer(container, place, request).await) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(MAX_HEADERS)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    tokio::select! {
        served = served => if let Err(error) = served {
            tracing::debug!(container = container.name(), %error, "a connection broke");
        },
        () = container.over().cancelled() => {}
    }
}
