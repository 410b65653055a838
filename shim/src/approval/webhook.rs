//! Tells a server of the operator's what waits for an approval, and what becomes of it: one request
//! each, signed as Standard Webhooks 1.0 has it (github.com/standard-webhooks/standard-webhooks).

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use polydev_transport::{address::is_safe_url, backoff::Backoff};
use prost_types::Timestamp;
use reqwest::{Client, StatusCode, header::CONTENT_TYPE};
use ring::hmac;
use serde_json::{Value, json};
use tokio::{
    sync::{Semaphore, broadcast},
    time::sleep,
};
use url::Url;
use uuid::Uuid;

use super::{Approval, State};
use crate::{private, web};

/// How long the server may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Requests at a time.
const MAX_REQUESTS: usize = 8;
/// Tries of one request. With the pauses they take about a minute.
const MAX_TRIES: usize = 6;
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
const MAX_RETRY_INTERVAL: Duration = Duration::from_secs(30);
/// The form of a secret, and how many bytes it has.
const SECRET_PREFIX: &str = "whsec_";
const SECRET_BYTES: std::ops::RangeInclusive<usize> = 24..=64;

/// Where requests go; without a place nobody is told.
#[derive(Debug, Default)]
pub struct Webhook(Option<Arc<Place>>);

#[derive(Debug)]
struct Place {
    url: Url,
    key: hmac::Key,
    client: Client,
}

/// Why nobody can be told.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "--approval-webhook is `{given}`: allowed are https URLs, and http URLs of the loopback address"
    )]
    Url { given: Url },
    #[error("cannot use the secret of the webhook")]
    File(#[from] private::Error),
    #[error(
        "the secret of the webhook `{}` must be `{SECRET_PREFIX}` and {} to {} bytes in base64",
        path.display(), SECRET_BYTES.start(), SECRET_BYTES.end()
    )]
    Secret { path: PathBuf },
    #[error("cannot make a client for the webhook")]
    Client(#[source] reqwest::Error),
}

impl Webhook {
    /// Requests to this URL, signed with the secret of a file.
    ///
    /// # Errors
    /// [`Error`]
    pub fn open(url: Url, secret: &Path) -> Result<Self, Error> {
        if !is_safe_url(url.as_str()) {
            return Err(Error::Url { given: url });
        }
        let text = private::read(secret)?;
        let text = std::str::from_utf8(&text).ok();
        let encoded = text.and_then(|text| text.trim().strip_prefix(SECRET_PREFIX));
        let bytes = encoded.and_then(|encoded| BASE64_STANDARD.decode(encoded).ok());
        let bytes = bytes.map(zeroize::Zeroizing::new);
        let bytes = bytes.filter(|bytes| SECRET_BYTES.contains(&bytes.len()));
        let bytes = bytes.ok_or_else(|| Error::Secret {
            path: secret.into(),
        })?;
        Ok(Self(Some(Arc::new(Place {
            url,
            key: hmac::Key::new(hmac::HMAC_SHA256, &bytes),
            client: web::client(ANSWER_TIMEOUT).map_err(Error::Client)?,
        }))))
    }

    /// Tells all news, for as long as there may be some.
    pub async fn tell(&self, mut news: broadcast::Receiver<Approval>) {
        let places = Arc::new(Semaphore::new(MAX_REQUESTS));
        loop {
            let approval = match news.recv().await {
                Ok(approval) => approval,
                Err(broadcast::error::RecvError::Lagged(missed)) => {
                    tracing::warn!(missed, "the webhook of approvals is too slow");
                    continue;
                }
                Err(broadcast::error::RecvError::Closed) => return,
            };
            let Some(place) = self.0.clone() else {
                continue;
            };
            let Ok(permit) = places.clone().acquire_owned().await else {
                return;
            };
            tokio::spawn(async move {
                place.tell(&approval).await;
                drop(permit);
            });
        }
    }
}

impl Place {
    async fn tell(&self, approval: &Approval) {
        // The same in each try, so the server can tell them apart from others.
        let id = format!("msg_{}", Uuid::now_v7().simple());
        let body = body(approval).to_string();
        let mut retry = Backoff::new(RETRY_INTERVAL, MAX_RETRY_INTERVAL);
        for left in (0..MAX_TRIES).rev() {
            let why = match self.send(&id, &body).await {
                Ok(status) if status.is_success() => return,
                Ok(status) => status.to_string(),
                Err(error) => crate::chain(&error.without_url()),
            };
            tracing::warn!(approval_id = %approval.id, why, left, "the webhook of approvals has failed");
            if left > 0 {
                sleep(retry.next_wait()).await;
            }
        }
    }

    async fn send(&self, id: &str, body: &str) -> reqwest::Result<StatusCode> {
        let since = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        let at = since.as_secs().to_string();
        let request = self.client.post(self.url.clone());
        let request = request
            .header(CONTENT_TYPE, "application/json")
            .header("webhook-id", id)
            .header("webhook-signature", signature(&self.key, id, &at, body))
            .header("webhook-timestamp", at);
        let answer = request.body(body.to_owned()).send().await?;
        Ok(answer.status())
    }
}

fn signature(key: &hmac::Key, id: &str, at: &str, body: &str) -> String {
    let signed = hmac::sign(key, format!("{id}.{at}.{body}").as_bytes());
    format!("v1,{}", BASE64_STANDARD.encode(signed))
}

/// It has neither the command nor the prompt: whoever is to see them calls `GetApproval`.
fn body(approval: &Approval) -> Value {
    let time = |at: SystemTime| Timestamp::from(at).to_string();
    let record = &approval.record;
    let kind = match approval.state {
        State::Pending => "approval.requested",
        State::Approved => "approval.approved",
        State::Denied => "approval.denied",
        State::Expired => "approval.expired",
        State::Withdrawn => "approval.withdrawn",
    };
    json!({
        "type": kind,
        "timestamp": time(SystemTime::now()),
        "data": {
            "approval_id": approval.id.to_string(),
            "what": approval.what,
            "caller": record.who,
            "user_id": record.user_id,
            "provider": record.provider,
            "run_id": record.run_id,
            "tool": record.tool,
            "reason": approval.reason(),
            "requested_at": time(approval.requested_at),
            "expires_at": time(approval.expires_at),
            "decided_by": approval.decided_by,
            "comment": approval.comment,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against Python's `hmac`.
    #[test]
    fn a_request_is_signed_as_the_specification_says() {
        let key = hmac::Key::new(hmac::HMAC_SHA256, &[b'k'; 24]);
        let signature = signature(&key, "msg_1", "1614265330", r#"{"test": 1}"#);
        assert_eq!(signature, "v1,xLkJJn6jeODra+KvgH4WQ1CGOXfQxIy/pQPkZnzPjug=");
    }
}
