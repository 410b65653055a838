//! The endpoint `/metrics`, for Prometheus.

use std::{collections::HashSet, net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::get,
};
use futures_util::StreamExt;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use opentelemetry::Key;
use opentelemetry_prometheus::{PrometheusExporter, ResourceSelector};
use opentelemetry_sdk::error::OTelSdkError;
use polydev_transport::{accept::accept, address::Address};
use prometheus::{Encoder, Registry, TextEncoder};
use tokio::{net::TcpListener, sync::Semaphore, time::timeout};

/// Most connections at a time; further ones wait.
const MAX_CONNECTIONS: usize = 16;
/// Time for the head of a request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);
/// A scraper comes at intervals and may keep its connection; after this time it makes a new one.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(300);

/// What is shown. Clones show the same.
#[derive(Debug, Clone, Default)]
pub struct Shown(Registry);

impl Shown {
    /// The reader for a provider of meters. Each series gets the name of the host, as it does on its
    /// way through a collector; Prometheus adds `job` and `instance`.
    ///
    /// # Errors
    /// If there is one already.
    pub fn reader(&self) -> Result<PrometheusExporter, OTelSdkError> {
        let of_host = HashSet::from([Key::from_static_str("host.name")]);
        opentelemetry_prometheus::exporter()
            .with_registry(self.0.clone())
            .with_resource_selector(ResourceSelector::KeyAllowList(of_host))
            .scope_info_enabled(false)
            .build()
    }

    fn text(&self) -> prometheus::Result<Vec<u8>> {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.0.gather(), &mut text)?;
        Ok(text)
    }
}

/// Reads where metrics are shown: an address of this machine, as `http://127.0.0.1:PORT`.
///
/// # Errors
/// What is allowed.
pub fn address(given: &str) -> Result<SocketAddr, &'static str> {
    match given.parse() {
        Ok(Address::Loopback(address)) => Ok(address),
        _ => Err("must be http://127.0.0.1:PORT or http://[::1]:PORT"),
    }
}

/// Answers scrapers, forever.
pub async fn serve(listener: TcpListener, shown: Shown) {
    let router = Router::new()
        .route("/metrics", get(metrics))
        .with_state(shown);
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = std::pin::pin!(accept(listener));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else {
            return; // The semaphore is never closed.
        };
        let Some(stream) = connections.next().await else {
            return; // They never end.
        };
        let service = TowerToHyperService::new(router.clone());
        tokio::spawn(async move {
            let mut server = http1::Builder::new();
            server
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIMEOUT);
            let served = server.serve_connection(TokioIo::new(stream), service);
            // Whoever sends something else, or is slow, is of no interest.
            let _ended = timeout(CONNECTION_TIMEOUT, served).await;
            drop(place);
        });
    }
}

async fn metrics(State(shown): State<Shown>) -> Response {
    match shown.text() {
        Ok(text) => ([(CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_shown_on_this_machine_alone() {
        assert_eq!(address("http://[::1]:9465").unwrap().port(), 9465);
        for wrong in [
            "",
            "127.0.0.1:9465",
            "http://0.0.0.0:9465",
            "https://host:1",
        ] {
            assert!(address(wrong).is_err(), "{wrong}");
        }
    }
}
