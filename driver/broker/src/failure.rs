//! What an API says within an answer whose status is 200: that it has too much to do.

use http::StatusCode;
use polydev_proto::provider::Vendor;
use serde_json::Value;

/// Anthropic's own status of an overload.
const OVERLOADED: u16 = 529;

/// The status that says the same as `error` or `code` of an answer; `None` if that is no overload.
///
/// Sources: Anthropic's API reference ("Errors", and "Streaming Messages" for errors after the
/// status), OpenAI's (`response.failed`, `error`), and the codes that Codex 0.171 tries again
/// after; `google.rpc.Status` for Google.
pub(crate) fn overload(provider: Vendor, json: &[u8]) -> Option<StatusCode> {
    let error: Value = serde_json::from_slice(json).ok()?;
    let named = |name: &str| error[name].as_str();
    let status = match provider {
        Vendor::Anthropic => match named("type")? {
            "rate_limit_error" => 429,
            "api_error" => 500,
            "timeout_error" => 504,
            "overloaded_error" => OVERLOADED,
            _ => return None,
        },
        Vendor::OpenAi => match error.as_str().or(named("code")).or(named("type"))? {
            "rate_limit_exceeded" => 429,
            "server_error" => 500,
            "server_is_overloaded" | "slow_down" => 503,
            _ => return None,
        },
        Vendor::Google => match error["code"].as_u64()? {
            code @ (429 | 500..600) => u16::try_from(code).ok()?,
            _ => return None,
        },
    };
    StatusCode::from_u16(status).ok()
}
