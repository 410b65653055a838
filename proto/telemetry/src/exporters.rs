//! What sends traces, metrics and logs to a [`Collector`].

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use axum::http::HeaderMap;
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{
    ExporterBuildError, LogExporter, MetricExporter, SpanExporter, WithExportConfig,
    WithHttpConfig, WithTonicConfig,
};
use opentelemetry_sdk::metrics::Temporality;
use polydev_proto::error::chain;
use polydev_transport::{address::Address, tls::Trust};
use reqwest::{Certificate, Client, redirect::Policy};
use tokio::runtime::Handle;
use tonic::{
    metadata::MetadataMap,
    transport::{Channel, Endpoint},
};

use crate::{
    collector::{Collector, Error, Protocol},
    watched::Watched,
};

/// Time for the collector to accept a connection, and to respond on an open one.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Time for one export.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(10);

/// Exporters to one collector, which share its connections.
#[derive(Debug, Clone)]
pub struct Exporters {
    endpoint: String,
    way: Way,
}

#[derive(Debug, Clone)]
enum Way {
    Grpc(Channel, MetadataMap),
    Http(OnRuntime, HeaderMap),
}

/// An exporter of one of the three builders, which have no trait in common.
macro_rules! built {
    ($self:ident, $builder:expr, $signal:literal) => {
        match &$self.way {
            Way::Grpc(channel, metadata) => $builder
                .with_tonic()
                .with_channel(channel.clone())
                .with_metadata(metadata.clone())
                .build(),
            Way::Http(client, headers) => $builder
                .with_http()
                .with_http_client(client.clone())
                .with_headers(texts(headers))
                // Otherwise the environment would say which.
                .with_protocol(opentelemetry_otlp::Protocol::HttpBinary)
                .with_endpoint($self.path($signal))
                .build(),
        }
    };
}

impl Exporters {
    /// Needs a runtime. Connects when there is something to send, and again whenever that is
    /// needed.
    ///
    /// # Errors
    /// [`Error`]
    pub fn new(collector: &Collector) -> Result<Self, Error> {
        collector.check()?;
        let headers = collector.headers()?;
        let way = match collector.protocol {
            Protocol::Grpc => Way::Grpc(channel(collector)?, MetadataMap::from_headers(headers)),
            Protocol::Http => Way::Http(OnRuntime::new(collector)?, headers),
        };
        Ok(Self {
            endpoint: collector.endpoint.trim_end_matches('/').to_owned(),
            way,
        })
    }

    /// # Errors
    /// If OpenTelemetry's variables in the environment are wrong.
    pub fn spans(&self) -> Result<Watched<SpanExporter>, Error> {
        self.watched("traces", built!(self, SpanExporter::builder(), "traces"))
    }

    /// # Errors
    /// As of [`Exporters::spans`].
    pub fn metrics(&self) -> Result<Watched<MetricExporter>, Error> {
        let builder = MetricExporter::builder().with_temporality(Temporality::Cumulative);
        self.watched("metrics", built!(self, builder, "metrics"))
    }

    /// # Errors
    /// As of [`Exporters::spans`].
    pub fn logs(&self) -> Result<Watched<LogExporter>, Error> {
        self.watched("logs", built!(self, LogExporter::builder(), "logs"))
    }

    fn watched<E>(
        &self,
        signal: &'static str,
        built: Result<E, ExporterBuildError>,
    ) -> Result<Watched<E>, Error> {
        let exporter = built.map_err(|error| Error::Exporter {
            endpoint: self.endpoint.clone(),
            source: error.into(),
        })?;
        Ok(Watched::new(exporter, signal, self.endpoint.clone()))
    }

    /// Where a signal goes over HTTP: <https://opentelemetry.io/docs/specs/otlp/#otlphttp-request>.
    fn path(&self, signal: &str) -> String {
        format!("{}/v1/{signal}", self.endpoint)
    }
}

fn channel(collector: &Collector) -> Result<Channel, Error> {
    let settings = |endpoint: Endpoint| {
        endpoint
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(EXPORT_TIMEOUT)
            .http2_keep_alive_interval(CONNECT_TIMEOUT)
            .keep_alive_timeout(CONNECT_TIMEOUT)
    };
    let exporter = |source| Error::Exporter {
        endpoint: collector.endpoint.clone(),
        source,
    };
    if !collector.is_tls() {
        let endpoint = Endpoint::from_shared(collector.endpoint.clone());
        let endpoint = endpoint.map_err(|error| exporter(error.into()))?;
        return Ok(settings(endpoint).connect_lazy());
    }
    let trust = match &collector.authority {
        Some(authority) => Trust::Server {
            authority: authority.clone(),
        },
        None => Trust::Machine,
    };
    trust.client().map_err(|error| exporter(error.into()))?;
    let address: Address = (collector.endpoint.parse())
        .map_err(|error: polydev_transport::address::Error| exporter(error.into()))?;
    address
        .connect_lazy(Some(&trust), settings)
        .map_err(exporter)
}

fn file(path: &std::path::Path, source: Box<dyn std::error::Error + Send + Sync>) -> Error {
    Error::File {
        field: "otlp_ca",
        path: path.into(),
        source,
    }
}

fn texts(headers: &HeaderMap) -> HashMap<String, String> {
    let text = |value: &axum::http::HeaderValue| value.to_str().unwrap_or_default().to_owned();
    let texts = headers.iter();
    texts
        .map(|(name, value)| (name.to_string(), text(value)))
        .collect()
}

/// A client for the threads of the SDK, which have no runtime.
#[derive(Debug, Clone)]
struct OnRuntime {
    client: Client,
    runtime: Handle,
    is_failing: Arc<AtomicBool>,
}

impl OnRuntime {
    fn new(collector: &Collector) -> Result<Self, Error> {
        // Only the first call in a process has an effect.
        let _installed = rustls::crypto::ring::default_provider().install_default();
        let mut client = Client::builder()
            .no_proxy()
            .redirect(Policy::none())
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(EXPORT_TIMEOUT);
        if let Some(path) = &collector.authority {
            let pem = std::fs::read(path).map_err(|error| file(path, error.into()))?;
            let trusted = Certificate::from_pem_bundle(&pem);
            let trusted = trusted.map_err(|error| file(path, error.into()))?;
            if trusted.is_empty() {
                return Err(file(path, "it has no certificate".into()));
            }
            client = client.tls_certs_only(trusted);
        } else if !collector.is_tls() {
            // Otherwise there is no client on a machine without authorities (reqwest 0.13.5).
            client = client.tls_certs_only([]);
        }
        let client = client.build().map_err(|error| Error::Exporter {
            endpoint: collector.endpoint.clone(),
            source: error.into(),
        })?;
        Ok(Self {
            client,
            runtime: Handle::current(),
            is_failing: Arc::default(),
        })
    }
}

#[async_trait]
impl HttpClient for OnRuntime {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let client = self.client.clone();
        let sent = async move { HttpClient::send_bytes(&client, request).await };
        let answered = self.runtime.spawn(sent).await?;
        let was_failing = self.is_failing.swap(answered.is_err(), Ordering::Relaxed);
        // The exporter does not say why.
        if let Some(error) = answered.as_ref().err().filter(|_| !was_failing) {
            tracing::warn!(error = chain(&**error), "the collector does not answer");
        }
        answered
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use axum::{Router, routing::post};
    use opentelemetry_sdk::trace::SpanExporter as _;
    use tokio::{net::TcpListener, sync::mpsc};

    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn an_export_over_http_has_the_headers_of_the_file_and_its_signals_path() {
        let (told, mut exports) = mpsc::channel(1);
        let router = Router::new().route(
            "/base/v1/traces",
            post(move |headers: HeaderMap| async move {
                let _nobody_waits = told.send(headers).await;
            }),
        );
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move { axum::serve(listener, router).await });

        let mut file = tempfile::NamedTempFile::new().unwrap();
        writeln!(file, "Authorization: Bearer one").unwrap();
        let exporters = Exporters::new(&Collector {
            endpoint: format!("http://127.0.0.1:{port}/base/"),
            protocol: Protocol::Http,
            authority: None,
            headers: Some(file.path().into()),
        });
        let exporters = exporters.unwrap();
        assert!(
            !format!("{exporters:?}").contains("Bearer"),
            "{exporters:?}"
        );
        let spans = exporters.spans().unwrap();
        spans.export(Vec::new()).await.unwrap();
        let headers = exports.recv().await.unwrap();
        assert_eq!(headers["authorization"], "Bearer one");
        assert_eq!(headers["content-type"], "application/x-protobuf");
    }
}
