//! A broker, before an API that answers for all three providers.

use std::{net::SocketAddr, time::Duration};

use polydev_broker::{broker::Broker, upstream::Upstreams};
use polydev_proto::{
    broker::{Grant, Key, Keys, Open, Policy, Seen, Upstream, from_broker::Message},
    provider::Vendor,
    sealed::{PrivateKey, seal_keys},
};
use rustls::RootCertStore;
use tokio::{net::TcpListener, time::timeout};

use crate::api::Api;

pub(crate) const RUN: &str = "0192d4e0-0000-7000-8000-000000000001";
pub(crate) const FAST: u64 = 1 << 30;
pub(crate) const LIMIT: Duration = Duration::from_secs(20);

pub(crate) struct Node {
    pub(crate) broker: Broker,
    pub(crate) api: Api,
}

impl Node {
    pub(crate) async fn new() -> Self {
        let _installed = rustls::crypto::ring::default_provider().install_default();
        let upstreams = Upstreams::new(RootCertStore::empty()).expect("TLS");
        Self {
            broker: Broker::new(PrivateKey::generate(), upstreams),
            api: Api::serve(None).await,
        }
    }

    /// Opens a container; returns what it connects to.
    pub(crate) async fn open(&self, container: &str) -> SocketAddr {
        self.open_with(container, Open::default()).await
    }

    /// The same, with more than its name and its servers.
    pub(crate) async fn open_with(&self, container: &str, open: Open) -> SocketAddr {
        let upstream = |provider: Vendor| Upstream {
            provider: provider.to_string(),
            base_url: format!("http://{}", self.api.address),
            ..Upstream::default()
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let open = Open {
            container: container.into(),
            bytes_per_second: FAST,
            upstreams: Vendor::all().map(upstream).collect(),
            ..open
        };
        self.broker.open(&open, listener).expect("it is opened");
        address
    }

    pub(crate) fn grant(&self, container: &str, run_id: &str, keys: &[(&str, &str)]) -> Message {
        self.grant_with(container, run_id, keys, None)
    }

    /// The same, with what the role of the caller says.
    pub(crate) fn grant_with(
        &self,
        container: &str,
        run_id: &str,
        keys: &[(&str, &str)],
        policy: Option<Policy>,
    ) -> Message {
        let keys = Keys {
            keys: keys
                .iter()
                .map(|(provider, value)| Key {
                    provider: (*provider).into(),
                    value: value.as_bytes().to_vec().into(),
                })
                .collect(),
        };
        let sealed_keys =
            seal_keys(&self.broker.public_key(), run_id, &keys).expect("a key of the broker");
        self.broker.grant(&Grant {
            container: container.into(),
            run_id: run_id.into(),
            sealed_keys,
            bytes_per_second: 2 * FAST,
            seen: None,
            policy,
        })
    }

    pub(crate) fn granted(&self, container: &str, run_id: &str, keys: &[(&str, &str)]) {
        let told = self.grant(container, run_id, keys);
        assert!(matches!(told, Message::Granted(_)), "{told:?}");
    }

    pub(crate) async fn news(&self) -> Seen {
        let news = timeout(LIMIT, self.broker.news()).await;
        match news.expect("it is told in time") {
            Message::Seen(seen) => seen,
            other => panic!("{other:?}"),
        }
    }

    /// Ends the container; returns what was seen of its run.
    pub(crate) fn close(&self, container: &str) -> Seen {
        match self.broker.close(container) {
            Message::Closed(closed) => closed.seen.expect("it had a run"),
            other => panic!("{other:?}"),
        }
    }
}
