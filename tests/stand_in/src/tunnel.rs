//! The stand-in as a proxy that acts as every server. A CLI that calls a name of its vendor
//! through the proxy gets the stand-in's answer. No authority has signed the certificate.

use std::sync::Arc;

use anyhow::Context;
use axum::{Router, body::Body, extract::Request};
use hyper::{body::Incoming, server::conn::http1, upgrade};
use hyper_util::{rt::TokioIo, service::TowerToHyperService};
use rustls::{
    ServerConfig,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
};
use tokio_rustls::TlsAcceptor;

/// Makes a certificate for one name of a server.
fn acceptor(host: &str) -> anyhow::Result<TlsAcceptor> {
    let signed = rcgen::generate_simple_self_signed([host.to_owned()])?;
    let key = PrivatePkcs8KeyDer::from(signed.signing_key.serialize_der());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![signed.cert.into()], PrivateKeyDer::from(key))?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// Answers requests through a `CONNECT` with `app`.
pub(crate) fn open(request: Request, app: Router) {
    tokio::spawn(async move {
        if let Err(error) = serve(request, app).await {
            eprintln!("a tunnel broke: {error:#}");
        }
    });
}

async fn serve(request: Request, app: Router) -> anyhow::Result<()> {
    let host = request.uri().host().context("no host is named")?.to_owned();
    let tunnel = TokioIo::new(upgrade::on(request).await?);
    let stream = acceptor(&host)?.accept(tunnel).await?;
    let service = tower::service_fn(move |request: hyper::Request<Incoming>| {
        let mut app = app.clone();
        async move { tower::Service::call(&mut app, request.map(Body::new)).await }
    });
    let served = http1::Builder::new()
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
    served.await.context("it was not served")
}
