//! Keeps web pages away. A browser on the same machine can reach a listener that does not identify
//! callers, and sends whatever a page asks for. Requests of a page of another site have a header
//! with the page's origin. Requests to a host name that an attacker points at this machine
//! contain that name.

use std::net::IpAddr;

use axum::{
    Extension,
    extract::Request,
    http::Version,
    middleware::Next,
    response::{IntoResponse, Response},
};

use polydev_transport::connection::Known;

use super::error::Problem;

/// The name that listeners give to callers on the loopback address.
const LOOPBACK: &str = "loopback";

pub(in crate::service) async fn no_browser(
    Extension(known): Extension<Known>,
    request: Request,
    next: Next,
) -> Response {
    match refusal(&known.caller.0, &request) {
        Some(words) => Problem::browser(words).into_response(),
        None => next.run(request).await,
    }
}

fn refusal(caller: &str, request: &Request) -> Option<String> {
    let text = |name: &str| {
        let value = request.headers().get(name)?;
        Some(value.to_str().unwrap_or("?").to_owned())
    };
    if text("sec-fetch-site").is_some_and(|site| site != "none") {
        return Some("web pages cannot call this service, which is for programs".into());
    }
    // Browsers use HTTP/2 only over TLS. gRPC always uses HTTP/2.
    let is_old = request.version() < Version::HTTP_2;
    if is_old && !request.uri().path().starts_with("/v1/") {
        return Some("over HTTP/1 only paths below /v1/ are served".into());
    }
    if let Some(origin) = text("origin") {
        return Some(format!(
            "pages of `{origin}` cannot call this service, which is for programs"
        ));
    }
    let host = request
        .uri()
        .host()
        .map(str::to_owned)
        .or_else(|| text("host"));
    let host = host.unwrap_or_default();
    if is_old && caller == LOOPBACK && !is_loopback(&host) {
        return Some(format!(
            "`Host` is `{host}`: allowed are localhost and loopback addresses"
        ));
    }
    None
}

/// Whether a host, with or without a port, is this machine's own name or address.
fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(v6) => v6.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    name.eq_ignore_ascii_case("localhost")
        || name
            .parse::<IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_address_has_few_names() {
        for name in [
            "localhost",
            "LocalHost:50051",
            "127.0.0.1:1",
            "127.1.2.3",
            "[::1]:7",
            "[::1]",
        ] {
            assert!(is_loopback(name), "{name}");
        }
        for name in [
            "",
            "example.org",
            "localhost.example.org:80",
            "10.0.0.1",
            "[fe80::1]",
        ] {
            assert!(!is_loopback(name), "{name}");
        }
    }
}
