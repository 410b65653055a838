//! An API that says back what it is sent, or what the header `x-test` asks for.

use std::{
    convert::Infallible,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body::{Body, Frame};
use http_body_util::{BodyExt, combinators::UnsyncBoxBody};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use rustls::ServerConfig;
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
};
use tokio_rustls::TlsAcceptor;

/// A request that has arrived.
#[derive(Clone)]
pub(crate) struct Seen {
    pub(crate) uri: String,
    pub(crate) headers: HeaderMap,
}

/// The API, for one stream at a time.
pub(crate) struct Api {
    pub(crate) address: SocketAddr,
    inner: Arc<Inner>,
}

struct Inner {
    seen: Mutex<Vec<Seen>>,
    say: Mutex<Option<mpsc::Sender<Bytes>>>,
    /// Whether somebody receives the stream.
    heard: watch::Sender<bool>,
}

impl Api {
    /// With TLS if there is a configuration for it.
    pub(crate) async fn serve(tls: Option<ServerConfig>) -> Self {
        let tls = tls.map(|tls| TlsAcceptor::from(Arc::new(tls)));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let inner = Arc::new(Inner {
            seen: Mutex::default(),
            say: Mutex::default(),
            heard: watch::Sender::new(false),
        });
        let serving = inner.clone();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.expect("another connection");
                let inner = serving.clone();
                let service = service_fn(move |request| {
                    let inner = inner.clone();
                    async move { Ok::<_, Infallible>(answer(inner, request).await) }
                });
                let tls = tls.clone();
                tokio::spawn(async move {
                    let server = http1::Builder::new();
                    let Some(tls) = tls else {
                        let served = server.serve_connection(TokioIo::new(stream), service);
                        return served.with_upgrades().await.unwrap_or_default();
                    };
                    // A client that does not trust it goes away.
                    if let Ok(stream) = tls.accept(stream).await {
                        let served = server.serve_connection(TokioIo::new(stream), service);
                        served.await.unwrap_or_default();
                    }
                });
            }
        });
        Self { address, inner }
    }

    pub(crate) fn count(&self) -> usize {
        self.inner.seen.lock().len()
    }

    pub(crate) fn last(&self) -> Seen {
        self.inner.seen.lock().last().expect("a request").clone()
    }

    /// Sends a piece on the stream.
    pub(crate) fn say(&self, piece: &'static str) {
        let say = self.inner.say.lock();
        let say = say.as_ref().expect("a stream");
        say.try_send(piece.into()).expect("somebody receives it");
    }

    /// Waits until nobody receives the stream any longer.
    pub(crate) async fn unheard(&self) {
        let mut heard = self.inner.heard.subscribe();
        heard
            .wait_for(|heard| !heard)
            .await
            .expect("the API is there");
    }
}

async fn answer(
    inner: Arc<Inner>,
    mut request: Request<Incoming>,
) -> Response<UnsyncBoxBody<Bytes, hyper::Error>> {
    let upgrade = hyper::upgrade::on(&mut request);
    let test = request.headers().get("x-test").cloned();
    inner.seen.lock().push(Seen {
        uri: request.uri().to_string(),
        headers: request.headers().clone(),
    });
    let body = request.into_body();
    match test.as_ref().map(|test| test.to_str().expect("text")) {
        None => Response::new(body.boxed_unsync()),
        Some("stream") => {
            let (say, said) = mpsc::channel(16);
            *inner.say.lock() = Some(say);
            inner.heard.send_replace(true);
            let body = Said { said, inner };
            Response::new(body.map_err(|never| match never {}).boxed_unsync())
        }
        Some("websocket") => {
            tokio::spawn(async move {
                let upgraded = upgrade.await.expect("the broker switches");
                let (mut from, mut to) = tokio::io::split(TokioIo::new(upgraded));
                let _broken = tokio::io::copy(&mut from, &mut to).await;
            });
            let answer = Response::builder()
                .status(StatusCode::SWITCHING_PROTOCOLS)
                .header("connection", "upgrade")
                .header("upgrade", "websocket");
            answer.body(body.boxed_unsync()).expect("an answer")
        }
        Some(status) => {
            let status: StatusCode = status.parse().expect("a status");
            let answer = Response::builder()
                .status(status)
                .header("location", "http://127.0.0.1/");
            answer.body(body.boxed_unsync()).expect("an answer")
        }
    }
}

struct Said {
    said: mpsc::Receiver<Bytes>,
    inner: Arc<Inner>,
}

impl Body for Said {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let said = self.said.poll_recv(context);
        said.map(|piece| piece.map(|piece| Ok(Frame::data(piece))))
    }
}

impl Drop for Said {
    fn drop(&mut self) {
        self.inner.heard.send_replace(false);
    }
}
