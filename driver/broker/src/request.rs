//! What a container asks for, checked: which API, and which of its headers go there. Nothing
//! in this file waits or knows a key.

use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header, request::Parts};
use polydev_proto::{budget::Exhausted, provider::Vendor};

use crate::api::Api;

/// Most bytes of a path with its query.
const MAX_PATH: usize = 4096;

/// Headers that may carry a credential, of any provider. The container's are removed,
/// whatever is in them.
static CREDENTIALS: [HeaderName; 6] = [
    header::AUTHORIZATION,
    header::COOKIE,
    HeaderName::from_static("api-key"),
    HeaderName::from_static("x-api-key"),
    HeaderName::from_static("x-goog-api-key"),
    HeaderName::from_static("x-goog-user-project"),
];
/// Query parameters that may carry a credential.
const CREDENTIAL_PARAMETERS: [&str; 4] = ["key", "api_key", "access_token", "oauth_token"];

/// Headers that are for one connection only (RFC 9110, section 7.6.1), and those that name
/// another host than the one of the connection.
static CONNECTION: [HeaderName; 12] = [
    header::CONNECTION,
    header::HOST,
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    header::EXPECT,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::FORWARDED,
];

/// Why a request goes nowhere.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("no run has this container")]
    NoRun,
    #[error("the run has ended")]
    Over,
    #[error("this run has no key for {0}")]
    NoKey(Vendor),
    #[error(
        "`{0}` is not a path of the broker: it must begin with /openai/, /anthropic/ or /google/"
    )]
    NotOurs(String),
    #[error("`{path}` is not a path of {provider} that a run may use")]
    Path { provider: Vendor, path: String },
    #[error("the method is {0}; allowed are GET and POST")]
    Method(Method),
    #[error("the path has more than {MAX_PATH} bytes")]
    TooLong,
    #[error("`{0}` is neither HOST:PORT nor a URL with http://")]
    Target(String),
    #[error("the container has {most} tunnels, which is the most")]
    Tunnels { most: usize },
    #[error(transparent)]
    OverBudget(#[from] Exhausted),
}

impl Refusal {
    pub(crate) fn status(&self) -> StatusCode {
        match self {
            Self::NoRun | Self::Over | Self::NoKey(_) | Self::Path { .. } => StatusCode::FORBIDDEN,
            Self::NotOurs(_) => StatusCode::NOT_FOUND,
            Self::Method(_) => StatusCode::METHOD_NOT_ALLOWED,
            Self::TooLong => StatusCode::URI_TOO_LONG,
            Self::Target(_) => StatusCode::BAD_REQUEST,
            Self::Tunnels { .. } => StatusCode::SERVICE_UNAVAILABLE,
            Self::OverBudget(_) => StatusCode::TOO_MANY_REQUESTS,
        }
    }
}

/// A request for an API, without a credential.
#[derive(Debug)]
pub struct Asked {
    pub(crate) api: &'static Api,
    pub(crate) method: Method,
    /// Below the API's base URL, with a query.
    pub path: String,
    pub headers: HeaderMap,
    /// Whether the container asks for a WebSocket.
    pub(crate) is_websocket: bool,
}

impl Asked {
    /// Whether it asks for something that costs. An answer that was stored states it again.
    pub(crate) fn is_charged(&self) -> bool {
        let path = self.path.split('?').next().unwrap_or_default();
        self.method == Method::POST && !path.ends_with("/cancel")
    }
}

/// Reads a container's request.
///
/// # Errors
/// [`Refusal`]
pub fn read(parts: &Parts) -> Result<Asked, Refusal> {
    let (api, path) = target(&parts.uri)?;
    if ![Method::GET, Method::POST].contains(&parts.method) {
        return Err(Refusal::Method(parts.method.clone()));
    }
    let upgrade = parts.headers.get(header::UPGRADE);
    let mut headers = end_to_end(&parts.headers);
    // What it cannot read, the broker cannot count.
    headers.insert(
        header::ACCEPT_ENCODING,
        HeaderValue::from_static("identity"),
    );
    Ok(Asked {
        api,
        method: parts.method.clone(),
        path,
        headers,
        is_websocket: upgrade.is_some_and(|to| to.as_bytes().eq_ignore_ascii_case(b"websocket")),
    })
}

fn target(uri: &Uri) -> Result<(&'static Api, String), Refusal> {
    let path = uri.path();
    if path.len() + uri.query().map_or(0, str::len) > MAX_PATH {
        return Err(Refusal::TooLong);
    }
    let not_ours = || Refusal::NotOurs(short(uri));
    if uri.authority().is_some() {
        return Err(not_ours());
    }
    let rest = path.strip_prefix('/').ok_or_else(not_ours)?;
    let (name, _) = rest.split_once('/').ok_or_else(not_ours)?;
    let provider = Vendor::named(name).ok_or_else(not_ours)?;
    let (api, below) = (Api::of(provider), &rest[name.len()..]);
    if !api.has(below) {
        return Err(Refusal::Path {
            provider,
            path: short(uri),
        });
    }
    let query = uri.query().map(without_credentials).unwrap_or_default();
    let mark = if query.is_empty() { "" } else { "?" };
    Ok((api, format!("{below}{mark}{query}")))
}

/// A URL for a message, without what may be secret.
fn short(uri: &Uri) -> String {
    let host = uri.host().unwrap_or_default();
    host.chars().chain(uri.path().chars()).take(200).collect()
}

fn without_credentials(query: &str) -> String {
    let is_safe = |pair: &&str| {
        let name = pair.split_once('=').map_or(*pair, |(name, _)| name);
        // An escaped name may be any name.
        !name.contains(['%', '+'])
            && !CREDENTIAL_PARAMETERS
                .iter()
                .any(|known| name.eq_ignore_ascii_case(known))
    };
    let kept: Vec<&str> = query.split('&').filter(is_safe).collect();
    kept.join("&")
}

/// The headers for the other side of the broker, without a credential.
pub(crate) fn end_to_end(headers: &HeaderMap) -> HeaderMap {
    let mut kept = without_hops(headers);
    for name in &CREDENTIALS {
        kept.remove(name);
    }
    kept
}

/// The headers for the other side of the broker.
pub(crate) fn without_hops(headers: &HeaderMap) -> HeaderMap {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    let mut kept = headers.clone();
    for name in named.iter().chain(&CONNECTION) {
        kept.remove(name);
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::Request;
    use proptest::prelude::*;

    fn asked(method: &str, uri: &str, headers: &[(&str, &str)]) -> Result<Asked, Refusal> {
        let mut request = Request::builder().method(method).uri(uri);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        read(&request.body(()).expect("a request").into_parts().0)
    }

    #[test]
    fn a_request_keeps_its_query_and_loses_every_credential() {
        let asked = asked(
            "POST",
            "/google/v1beta/models/gemini-2.5-pro:streamGenerateContent?alt=sse&key=hunter2&KEY=x&k%65y=y",
            &[
                ("authorization", "Bearer hunter2"),
                ("x-api-key", "hunter2"),
                ("X-Goog-Api-Key", "hunter2"),
                ("cookie", "session=hunter2"),
                ("content-type", "application/json"),
                ("connection", "keep-alive, x-hop"),
                ("x-hop", "1"),
                ("host", "127.0.0.1:8100"),
            ],
        )
        .unwrap();
        assert_eq!(
            asked.path,
            "/v1beta/models/gemini-2.5-pro:streamGenerateContent?alt=sse"
        );
        let names: Vec<_> = asked.headers.keys().map(HeaderName::as_str).collect();
        assert_eq!(names, ["content-type", "accept-encoding"]);
        assert!(!asked.is_websocket);
    }

    #[test]
    fn what_is_for_no_api_is_refused_by_name() {
        let refused = |method, uri| asked(method, uri, &[]).unwrap_err();
        for uri in [
            "/",
            "/anthropic",
            "/v1/messages",
            "/Anthropic/v1/messages",
            "*",
        ] {
            assert!(matches!(refused("GET", uri), Refusal::NotOurs(_)), "{uri}");
        }
        for uri in [
            "http://api.anthropic.com/anthropic/v1/messages",
            "127.0.0.1:80",
        ] {
            assert!(matches!(refused("GET", uri), Refusal::NotOurs(_)), "{uri}");
        }
        assert_eq!(
            refused("GET", "/anthropic/v1/files").to_string(),
            "`/anthropic/v1/files` is not a path of anthropic that a run may use"
        );
        assert_eq!(
            refused("DELETE", "/openai/v1/responses/x").to_string(),
            "the method is DELETE; allowed are GET and POST"
        );
        let long = format!("/openai/v1/responses?{}", "x".repeat(MAX_PATH));
        assert_eq!(refused("GET", &long), Refusal::TooLong);
    }

    #[test]
    fn a_websocket_is_known_as_one() {
        let upgrade = [("connection", "Upgrade"), ("upgrade", "WebSocket")];
        let asked = asked("GET", "/openai/v1/responses", &upgrade).unwrap();
        assert!(asked.is_websocket);
        assert!(!asked.headers.contains_key("upgrade"));
    }

    proptest! {
        #[test]
        fn no_query_brings_a_credential(
            pairs in prop::collection::vec("[a-zA-Z_%+]{0,12}=[a-z&=%]{0,6}", 0..6),
        ) {
            let kept = without_credentials(&pairs.join("&"));
            for (name, _) in url::form_urlencoded::parse(kept.as_bytes()) {
                let name = name.to_ascii_lowercase();
                prop_assert!(!CREDENTIAL_PARAMETERS.contains(&&*name), "{}", kept);
            }
        }
    }
}
