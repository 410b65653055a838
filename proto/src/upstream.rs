//! Where requests with a user's key may go.

use std::net::IpAddr;

use url::{Host, Url};

/// An address that no key is sent to.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("must be https://HOST[:PORT][/PATH], or http:// to a loopback address")]
pub struct NotAllowed;

/// Reads a base URL: a key goes to another machine by TLS only. The result has no slash at
/// its end.
///
/// # Errors
/// [`NotAllowed`]
pub fn base_url(text: &str) -> Result<String, NotAllowed> {
    let url = Url::parse(text).map_err(|_| NotAllowed)?;
    let is_loopback = match url.host() {
        Some(Host::Domain(name)) => name == "localhost",
        Some(Host::Ipv4(address)) => IpAddr::from(address).is_loopback(),
        Some(Host::Ipv6(address)) => IpAddr::from(address).is_loopback(),
        None => false,
    };
    let scheme_fits = url.scheme() == "https" || (url.scheme() == "http" && is_loopback);
    let is_bare = url.query().is_none() && url.fragment().is_none();
    let is_named = url.username().is_empty() && url.password().is_none();
    if scheme_fits && is_bare && is_named {
        Ok(url.as_str().trim_end_matches('/').to_owned())
    } else {
        Err(NotAllowed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_go_by_tls_or_stay_on_the_machine() {
        for (good, read) in [
            (
                "https://gateway.example/openai/",
                "https://gateway.example/openai",
            ),
            (
                "https://gateway.example:8443",
                "https://gateway.example:8443",
            ),
            ("http://127.0.0.1:4000/", "http://127.0.0.1:4000"),
            ("http://[::1]:4000", "http://[::1]:4000"),
            ("http://localhost", "http://localhost"),
        ] {
            assert_eq!(base_url(good).as_deref(), Ok(read));
        }
        for bad in [
            "http://gateway.example",
            "http://127.0.0.1.example",
            "http://10.0.0.1",
            "https://user:word@gateway.example",
            "https://gateway.example?x=1",
            "unix:///run/x.sock",
            "gateway.example",
            "",
        ] {
            assert_eq!(base_url(bad), Err(NotAllowed), "{bad}");
        }
    }
}
