//! The parts of Nomad's HTTP API that the shim uses. [`settings`] says how the shim reaches it.
//! [`job`] has the calls about jobs, and [`node`] those about nodes.

pub mod job;
pub mod node;
mod settings;

use std::{path::PathBuf, sync::Arc};

use polydev_transport::reload::Reloaded;
use reqwest::{Client, Method, RequestBuilder, StatusCode};

pub use settings::Settings;

/// How long a query waits for a change; Nomad adds up to a sixteenth.
const WATCH_WAIT: &str = "60s";
/// Large enough for thousands of nodes: the stub of a node takes about 2 KB.
const MAX_BODY: usize = 64 << 20;

/// Why Nomad did not answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("Nomad's address, token or certificates cannot be used: {0}")]
    Settings(String),
    #[error("cannot read --nomad-token-file `{}`", path.display())]
    Token {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("cannot reach Nomad at {address}")]
    Reach {
        address: String,
        source: reqwest::Error,
    },
    #[error("Nomad answered {status}: {text}")]
    Status { status: StatusCode, text: String },
    #[error("Nomad has no leader: its server at {address} may have outdated data")]
    NoLeader { address: String },
    #[error("Nomad's answer is longer than {MAX_BODY} bytes")]
    TooLong,
    #[error("cannot read Nomad's answer")]
    Decode(#[source] serde_json::Error),
}

impl Error {
    /// Whether Nomad does not know the job or other object.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Status { status, text }
            // For a dispatch of an unknown job Nomad sends the status of an internal error.
            if *status == StatusCode::NOT_FOUND || text == "parameterized job not found")
    }

    /// Whether Nomad has refused the request and would refuse it again.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Status { status, .. } if status.is_client_error())
    }

    /// Whether Nomad refuses a change of a job's size because a deployment of the job is active.
    #[must_use]
    pub fn is_deployment(&self) -> bool {
        matches!(self, Self::Status { status, text }
            if *status == StatusCode::BAD_REQUEST && text.contains("active deployment"))
    }
}

/// A connection to one Nomad agent, which knows the whole region; clones share it.
#[derive(Debug, Clone)]
pub struct Nomad {
    settings: Arc<Settings>,
    /// Follows the files of certificates.
    client: Arc<Reloaded<Client>>,
    /// Of the settings, with the name in the agent's certificate.
    base: String,
}

impl Nomad {
    /// Does not connect yet.
    ///
    /// # Errors
    /// [`Error::Settings`], [`Error::Token`]
    pub fn new(settings: Settings) -> Result<Self, Error> {
        settings.check()?;
        let client = Reloaded::new(settings.files(), || settings.client())?;
        Ok(Self {
            base: settings.base(),
            client: client.into(),
            settings: settings.into(),
        })
    }

    /// A request for `path`, in the namespace and the region of the settings.
    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let (client, refused) = self.client.get(|| self.settings.client());
        if let Some(error) = refused {
            tracing::warn!(%error, "cannot use Nomad's new certificates, keeping the old ones");
        }
        let Settings {
            namespace, region, ..
        } = &*self.settings;
        let query = [("namespace", namespace), ("region", region)];
        let given = query
            .iter()
            .filter_map(|(name, value)| Some((name, value.as_ref()?)));
        let given: Vec<_> = given.collect();
        let request = client.request(method, format!("{}{path}", self.base));
        request.query(&given)
    }

    /// An answer as soon as there is something newer than `index`, or after a minute. Also returns
    /// the index for the next query.
    async fn watch<T: serde::de::DeserializeOwned>(
        &self,
        path: &str,
        index: u64,
    ) -> Result<(u64, T), Error> {
        let known = index.to_string();
        let query = [
            ("index", known.as_str()),
            ("wait", WATCH_WAIT),
            ("stale", "true"),
        ];
        let request = self.request(Method::GET, path).query(&query);
        let (next, answer) = self.ask(request).await?;
        // A smaller index means that Nomad's state was reset.
        Ok((if next < index { 0 } else { next }, answer))
    }

    /// An answer with its index.
    async fn ask<T: serde::de::DeserializeOwned>(
        &self,
        mut request: RequestBuilder,
    ) -> Result<(u64, T), Error> {
        if let Some(token) = self.settings.token()? {
            request = request.header("X-Nomad-Token", token);
        }
        let reach = |source: reqwest::Error| Error::Reach {
            address: self.settings.address.clone(),
            source: source.without_url(),
        };
        let mut response = request.send().await.map_err(reach)?;
        let status = response.status();
        let index = response.headers().get("X-Nomad-Index");
        let index = index.and_then(|index| index.to_str().ok()?.parse().ok());
        // A server that has just started answers stale queries from an empty state.
        let leader = response.headers().get("X-Nomad-KnownLeader");
        if status.is_success() && leader.is_some_and(|known| known == "false") {
            let address = self.settings.address.clone();
            return Err(Error::NoLeader { address });
        }
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(reach)? {
            if body.len() + chunk.len() > MAX_BODY {
                return Err(Error::TooLong);
            }
            body.extend_from_slice(&chunk);
        }
        if !status.is_success() {
            let text = String::from_utf8_lossy(&body)
                .trim()
                .chars()
                .take(500)
                .collect();
            return Err(Error::Status { status, text });
        }
        let answer = serde_json::from_slice(&body).map_err(Error::Decode)?;
        Ok((index.unwrap_or(0), answer))
    }
}
