//! Nomad's HTTP API, as far as the shim needs it; alone in naming reqwest.

use std::{collections::BTreeMap, time::Duration};

use reqwest::{
    Client, StatusCode,
    header::{HeaderMap, HeaderValue},
};
use serde::Deserialize;
use zeroize::Zeroizing;

const CONNECT: Duration = Duration::from_secs(5);
/// How long a query waits for a change; Nomad adds up to a sixteenth.
const WAIT: Duration = Duration::from_secs(60);
const ANSWER: Duration = Duration::from_secs(75);
/// A stub of a node takes about 2 KB: room for thousands of nodes.
const BODY_MOST: usize = 64 << 20;

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
    #[error("Nomad's answer is longer than {BODY_MOST} bytes")]
    TooLong,
    #[error("cannot read Nomad's answer")]
    Decode(#[source] serde_json::Error),
}

impl Error {
    /// Whether Nomad takes no change of a job's size because it still acts on the last one.
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

/// A node as the list of nodes shows it.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Node {
    #[serde(rename = "ID")]
    pub id: String,
    pub status: String,
    #[serde(default)]
    pub drivers: BTreeMap<String, Driver>,
}

/// A driver on a node.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Driver {
    #[serde(default)]
    pub attributes: Option<BTreeMap<String, String>>,
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
                value.map_err(|_| Error::Settings("the token is not one line of text".into()))?;
            value.set_sensitive(true);
            headers.insert("X-Nomad-Token", value);
        }
        // A second call, as in tests, finds it done.
        let _installed = rustls::crypto::ring::default_provider().install_default();
        // The token goes to Nomad and to nobody else.
        let client = Client::builder()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(CONNECT)
            .timeout(ANSWER)
            .default_headers(headers)
            .build()
            .map_err(|error| Error::Settings(crate::chain(&error)))?;
        Ok(Self {
            client,
            address: address.trim_end_matches('/').to_owned(),
        })
    }

    /// All nodes, as soon as there is something newer than `index`, or after a minute.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn nodes(&self, index: u64) -> Result<(u64, Vec<Node>), Error> {
        let wait = format!("{}s", WAIT.as_secs());
        let request = self.client.get(self.url("/v1/nodes")).query(&[
            ("index", index.to_string().as_str()),
            ("wait", &wait),
            ("stale", "true"),
        ]);
        let (next, nodes) = self.ask(request).await?;
        // An index that goes back means that Nomad has begun anew.
        Ok((if next < index { 0 } else { next }, nodes))
    }

    /// The counts that a job's groups should have; `None` without such a job.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn counts(&self, job: &str) -> Result<Option<BTreeMap<String, u32>>, Error> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Scale {
            task_groups: BTreeMap<String, Group>,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Group {
            desired: u32,
        }
        let request = self.client.get(self.url(&format!("/v1/job/{job}/scale")));
        match self.ask::<Scale>(request).await {
            Ok((_, Scale { task_groups })) => Ok(Some(
                task_groups
                    .into_iter()
                    .map(|(name, group)| (name, group.desired))
                    .collect(),
            )),
            Err(Error::Status {
                status: StatusCode::NOT_FOUND,
                ..
            }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Sets the count of a job's group, as `nomad job scale` does; `message` stands in the
    /// job's scaling events.
    ///
    /// # Errors
    /// [`Error`]; [`Error::is_deployment`] while a deployment of the job is going on.
    pub async fn scale(
        &self,
        job: &str,
        group: &str,
        count: u32,
        message: &str,
    ) -> Result<(), Error> {
        #[derive(Deserialize)]
        struct Taken {}
        let body = serde_json::json!({
            "Count": count, "Target": { "Group": group }, "Message": message,
        });
        let url = self.url(&format!("/v1/job/{job}/scale"));
        let request = self.client.post(url).body(body.to_string());
        self.ask::<Taken>(request).await.map(drop)
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.address)
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
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(reach)? {
            if body.len() + chunk.len() > BODY_MOST {
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
