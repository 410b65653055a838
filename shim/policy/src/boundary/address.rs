//! A URL must lead to a public host by its name or address, whatever form the address has.

use std::net::IpAddr;

use polydev_proto::egress::is_closed;
use url::{Host, Url};

/// Names that lead into the machine or its network, or below them.
const LOCAL: [&str; 6] = [
    "localhost",
    "local",
    "internal",
    "intranet",
    "lan",
    "home.arpa",
];

/// What is not a URL of a public host.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotPublic {
    #[error("the target is not a URL with `http` or `https` and a host")]
    NoUrl,
    #[error("the URL has a user name or a password")]
    User,
    #[error("programs could read the URL in different ways; write it as `{0}`")]
    Ambiguous(String),
    #[error("the address {0} is not public")]
    Closed(IpAddr),
    #[error("the name `{0}` is not public")]
    Local(String),
    #[error("the host `{0}` is not in `allowed_domains`")]
    NotListed(String),
}

/// The URL that a request goes to.
///
/// # Errors
/// [`NotPublic`]
pub fn public(target: &str) -> Result<Url, NotPublic> {
    let url = Url::parse(target).map_err(|_| NotPublic::NoUrl)?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(NotPublic::NoUrl);
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(NotPublic::User);
    }
    match url.host() {
        None => return Err(NotPublic::NoUrl),
        Some(Host::Ipv4(address)) => check_resolved(&[address.into()])?,
        Some(Host::Ipv6(address)) => check_resolved(&[address.into()])?,
        Some(Host::Domain(name)) => {
            let name = name.trim_end_matches('.');
            let is_local = |local: &str| {
                let above = name.strip_suffix(local);
                above.is_some_and(|above| above.is_empty() || above.ends_with('.'))
            };
            if !name.contains('.') || LOCAL.iter().any(|local| is_local(local)) {
                return Err(NotPublic::Local(name.into()));
            }
        }
    }
    // The tool gets the text, and may read it otherwise than it was read here.
    let is_plain = url.as_str() == target || url.as_str().strip_suffix('/') == Some(target);
    match is_plain {
        true => Ok(url),
        false => Err(NotPublic::Ambiguous(url.into())),
    }
}

/// Checks the addresses that a name has led to. The request must go to one of these, and not ask
/// again.
///
/// # Errors
/// [`NotPublic::Closed`] with the first address that is not public.
pub fn check_resolved(addresses: &[IpAddr]) -> Result<(), NotPublic> {
    match addresses.iter().find(|address| is_closed(**address)) {
        Some(closed) => Err(NotPublic::Closed(*closed)),
        None => Ok(()),
    }
}

pub(super) fn check(target: &str, domains: &[String]) -> Result<(), NotPublic> {
    let url = public(target)?;
    let host = url.host_str().unwrap_or_default().trim_end_matches('.');
    let fits = |domain: &String| match domain.strip_prefix("*.") {
        Some(suffix) => {
            let above = host.strip_suffix(suffix);
            above.is_some_and(|above| above.len() > 1 && above.ends_with('.'))
        }
        None => host == domain,
    };
    if domains.is_empty() || domains.iter().any(fits) {
        Ok(())
    } else {
        Err(NotPublic::NotListed(host.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn public_hosts_are_taken() {
        for target in [
            "https://api.example.com/upload?x=1",
            "http://8.8.8.8/",
            "https://[2606:4700::1111]/",
        ] {
            public(target).unwrap();
        }
    }

    #[test]
    fn an_address_that_is_not_public_is_refused_in_every_form() {
        for host in [
            "127.0.0.1",
            "127.0.0.2",
            "127.1",
            "0x7f000001",
            "2130706433",
            "017700000001",
            "0",
            "10.1.2.3",
            "172.16.0.1",
            "172.31.255.255",
            "192.168.0.1",
            "169.254.169.254",
            "100.100.100.200",
            "168.63.129.16",
            "100.64.0.1",
            "0.0.0.0",
            "224.0.0.1",
            "255.255.255.255",
            "[::1]",
            "[::]",
            "[::ffff:127.0.0.1]",
            "[::ffff:a9fe:a9fe]",
            "[64:ff9b::10.0.0.1]",
            "[2002:7f00:1::]",
            "[fe80::1]",
            "[fd00:ec2::254]",
            "[ff02::1]",
            "１２７.0.0.1",
        ] {
            let refused = public(&format!("http://{host}/"));
            assert!(
                matches!(refused, Err(NotPublic::Closed(_))),
                "{host}: {refused:?}"
            );
        }
    }

    #[test]
    fn names_of_the_own_network_and_other_texts_are_refused() {
        for (target, refused) in [
            ("http://localhost/", NotPublic::Local("localhost".into())),
            ("http://LOCALHOST./", NotPublic::Local("localhost".into())),
            (
                "http://a.localhost/",
                NotPublic::Local("a.localhost".into()),
            ),
            (
                "http://metadata.google.internal/",
                NotPublic::Local("metadata.google.internal".into()),
            ),
            (
                "http://printer.local/",
                NotPublic::Local("printer.local".into()),
            ),
            ("http://vault/", NotPublic::Local("vault".into())),
            ("http://me@example.com/", NotPublic::User),
            ("file:///etc/passwd", NotPublic::NoUrl),
            ("ftp://example.com/", NotPublic::NoUrl),
            ("example.com", NotPublic::NoUrl),
            ("", NotPublic::NoUrl),
        ] {
            assert_eq!(public(target), Err(refused), "{target}");
        }
        public("https://notlocalhost.example/").unwrap();
    }

    #[test]
    fn a_url_that_programs_could_read_in_different_ways_is_refused() {
        for target in [
            "https://api.example.com\\@10.0.0.1/",
            "https://api.example.com\t/",
            " https://api.example.com/",
            "https:/api.example.com/",
            "https://api.example.com:443/",
            "https://API.example.com/",
            "https://api.example.com/a/../b",
            "https://bücher.example/",
        ] {
            let refused = public(target);
            let is_refused = matches!(refused, Err(NotPublic::Ambiguous(_)));
            assert!(is_refused, "{target:?}: {refused:?}");
        }
    }

    #[test]
    fn a_list_of_domains_names_hosts_and_what_is_below_them() {
        let domains = ["api.example.com".to_owned(), "*.example.org".to_owned()];
        for (target, is_allowed) in [
            ("https://api.example.com/", true),
            ("https://api.example.com", true),
            ("https://a.b.example.org/", true),
            ("https://example.org/", false),
            ("https://badexample.org/", false),
            ("https://example.com/", false),
        ] {
            assert_eq!(check(target, &domains).is_ok(), is_allowed, "{target}");
        }
    }

    #[test]
    fn a_name_that_leads_to_an_address_that_is_not_public_is_refused() {
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        check_resolved(&[address("8.8.8.8")]).unwrap();
        let refused = check_resolved(&[address("8.8.8.8"), address("10.0.0.1")]);
        assert_eq!(refused, Err(NotPublic::Closed(address("10.0.0.1"))));
    }
}
