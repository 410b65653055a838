//! The parts of Nomad's HTTP API that the shim uses. [`job`] has the calls about jobs, and
//! [`node`] those about nodes.

pub mod job;
pub mod node;

use std::time::Duration;

use reqwest::{
    Client, StatusCode,
    header::{HeaderMap, HeaderValue},
};
use zeroize::Zeroizing;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a query waits for a change; Nomad adds up to a sixteenth.
const WATCH_WAIT: &str = "60s";
const ANSWER_TIMEOUT: Duration = Duration::from_secs(75);
/// Large enough for thousands of nodes: the stub of a node takes about 2 KB.
const MAX_BODY: usize = 64 << 20;

/// Why Nomad did not answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("Nomad's address or token cannot be used: {0}")]
    Settings(String),
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

/// A connection to one Nomad agent, which knows the whole region.
#[derive(Debug, Clone)]
pub struct Nomad {
    client: Client,
    address: String,
}

impl Nomad {
    /// # Errors
    /// [`Error::Settings`]
    pub fn new(address: &str, token: Option<Zeroizing<String>>) -> Result<Self, Error> {
        if !address.starts_with("http://") && !address.starts_with("https://") {
            return Err(Error::Settings(format!(
                "`{address}` is not an http(s) URL"
            )));
        }
        let mut headers = HeaderMap::new();
        if let Some(token) = token {
            let value = HeaderValue::from_str(&token);
            let mut value =
                value.map_err(|_| Error::Settings("the token must be one line of text".into()))?;
            value.set_sensitive(true);
            headers.insert("X-Nomad-Token", value);
        }
        // Only the first call in a process has an effect; tests call this more than once.
        let _installed = rustls::crypto::ring::default_provider().install_default();
        // The token must go only to Nomad.
        let client = Client::builder()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(ANSWER_TIMEOUT)
            .default_headers(headers)
            .build()
            .map_err(|error| Error::Settings(crate::chain(&error)))?;
        Ok(Self {
            client,
            address: address.trim_end_matches('/').to_owned(),
        })
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.address)
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
        let request = self.client.get(self.url(path)).query(&query);
        let (next, answer) = self.ask(request).await?;
        // A smaller index means that Nomad's state was reset.
        Ok((if next < index { 0 } else { next }, answer))
    }

    /// An answer with its index.
    async fn ask<T: serde::de::DeserializeOwned>(
        &self,
        request: reqwest::RequestBuilder,
    ) -> Result<(u64, T), Error> {
        let reach = |source| Error::Reach {
            address: self.address.clone(),
            source,
        };
        let mut response = request.send().await.map_err(reach)?;
        let status = response.status();
        let index = response.headers().get("X-Nomad-Index");
        let index = index.and_then(|index| index.to_str().ok()?.parse().ok());
        // A server that has just started answers stale queries from an empty state.
        let leader = response.headers().get("X-Nomad-KnownLeader");
        if status.is_success() && leader.is_some_and(|known| known == "false") {
            let address = self.address.clone();
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
