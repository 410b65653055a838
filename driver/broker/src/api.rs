//! The providers' APIs: where each is, which of its paths a run may use, and which header
//! carries its key.
//!
//! Hosts, paths and headers are those of the providers' documentation, and of the requests of
//! Claude Code 2.1.332, Codex 0.171 and Gemini CLI 0.61.

use http::{HeaderName, HeaderValue, header};
use polydev_proto::provider::Vendor;

/// A path that may be requested, by its segments. `*` is any one segment, and a segment that
/// begins with `*:` is one that ends with the rest, such as `gemini-2.5-flash:countTokens`.
type Path = &'static [&'static str];

/// One provider's API.
#[derive(Debug)]
pub(crate) struct Api {
    pub(crate) provider: Vendor,
    /// Without a slash at the end.
    pub(crate) base_url: &'static str,
    paths: &'static [Path],
    key_header: HeaderName,
    /// What stands before the key in the header.
    key_prefix: &'static str,
}

static OPENAI: Api = Api {
    provider: Vendor::OpenAi,
    base_url: "https://api.openai.com",
    paths: &[
        &["v1", "responses"],
        &["v1", "responses", "*"],
        &["v1", "responses", "*", "cancel"],
        &["v1", "responses", "*", "input_items"],
        &["v1", "chat", "completions"],
        &["v1", "models"],
        &["v1", "models", "*"],
    ],
    key_header: header::AUTHORIZATION,
    key_prefix: "Bearer ",
};

static ANTHROPIC: Api = Api {
    provider: Vendor::Anthropic,
    base_url: "https://api.anthropic.com",
    paths: &[
        &["v1", "messages"],
        &["v1", "messages", "count_tokens"],
        &["v1", "models"],
        &["v1", "models", "*"],
    ],
    key_header: HeaderName::from_static("x-api-key"),
    key_prefix: "",
};

static GOOGLE: Api = Api {
    provider: Vendor::Google,
    base_url: "https://generativelanguage.googleapis.com",
    paths: &[
        &["v1", "models"],
        &["v1", "models", "*"],
        &["v1beta", "models"],
        &["v1beta", "models", "*"],
        &["v1beta", "models", "*:generateContent"],
        &["v1beta", "models", "*:streamGenerateContent"],
        &["v1beta", "models", "*:countTokens"],
        &["v1beta", "models", "*:embedContent"],
        &["v1beta", "models", "*:batchEmbedContents"],
    ],
    key_header: HeaderName::from_static("x-goog-api-key"),
    key_prefix: "",
};

impl Api {
    /// The API of a provider.
    pub(crate) fn of(provider: Vendor) -> &'static Self {
        match provider {
            Vendor::OpenAi => &OPENAI,
            Vendor::Anthropic => &ANTHROPIC,
            Vendor::Google => &GOOGLE,
        }
    }

    /// Whether a run may request the path. `path` begins with a slash.
    pub(crate) fn has(&self, path: &str) -> bool {
        let segments: Vec<&str> = path.split('/').skip(1).collect();
        segments.iter().all(|segment| is_plain(segment))
            && self.paths.iter().any(|allowed| fits(allowed, &segments))
    }

    /// The header that carries the key, marked so that nobody prints it. `None` if a header
    /// cannot hold the key.
    pub(crate) fn credential(&self, key: &[u8]) -> Option<(HeaderName, HeaderValue)> {
        let value = [self.key_prefix.as_bytes(), key].concat();
        let mut value = HeaderValue::from_maybe_shared(bytes::Bytes::from(value)).ok()?;
        value.set_sensitive(true);
        Some((self.key_header.clone(), value))
    }
}

/// Whether every reader of a URL reads the segment in the same way.
fn is_plain(segment: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:@".contains(&byte);
    !segment.is_empty() && segment != "." && segment != ".." && segment.bytes().all(plain)
}

fn fits(allowed: Path, segments: &[&str]) -> bool {
    let pairs = || allowed.iter().zip(segments);
    allowed.len() == segments.len()
        && pairs().all(|(allowed, segment)| match allowed.strip_prefix('*') {
            None => allowed == segment,
            Some("") => !segment.contains(':'),
            Some(end) => segment.len() > end.len() && segment.ends_with(end),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clis_paths_are_allowed_and_no_others() {
        let (openai, anthropic, google) = (&OPENAI, &ANTHROPIC, &GOOGLE);
        for (api, path) in [
            (openai, "/v1/responses"),
            (openai, "/v1/responses/resp_68af4030"),
            (openai, "/v1/models"),
            (anthropic, "/v1/messages"),
            (anthropic, "/v1/messages/count_tokens"),
            (google, "/v1beta/models/gemini-2.5-flash:generateContent"),
            (
                google,
                "/v1beta/models/gemini-2.5-pro:streamGenerateContent",
            ),
        ] {
            assert!(api.has(path), "{path}");
        }
        for (api, path) in [
            (openai, "/v1/files"),
            (openai, "/v1/organization/admin_api_keys"),
            (openai, "/v1/responses/"),
            (openai, "/v1/responses/.."),
            (openai, "/v1/responses/%2e%2e"),
            (openai, "/v1//responses"),
            (openai, "/v1/responses\\x"),
            (anthropic, "/v1/organizations/users"),
            (anthropic, "/v1/messages/../organizations"),
            (anthropic, ""),
            (anthropic, "/"),
            (google, "/v1beta/models/gemini:somethingElse"),
            (google, "/v1beta/models/:generateContent"),
            (google, "/upload/v1beta/files"),
        ] {
            assert!(!api.has(path), "{path}");
        }
    }

    #[test]
    fn a_key_is_in_its_providers_header_and_is_not_printed() {
        let credential = |provider, key| Api::of(provider).credential(key);
        let (name, value) = credential(Vendor::OpenAi, b"hunter2").unwrap();
        assert!(name == "authorization" && value == "Bearer hunter2");
        assert_eq!(format!("{value:?}"), "Sensitive");
        let (name, value) = credential(Vendor::Anthropic, b"hunter2").unwrap();
        assert!(name == "x-api-key" && value == "hunter2");
        let (name, _) = credential(Vendor::Google, b"hunter2").unwrap();
        assert_eq!(name, "x-goog-api-key");
        assert_eq!(credential(Vendor::OpenAi, b"two\r\nlines"), None);
    }
}
