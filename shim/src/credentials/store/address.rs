//! The address of the credential store, and the defaults of its options.

use std::{net::IpAddr, path::Path, str::FromStr};

/// The address of the store: `postgres://USER@HOST/DATABASE` or `sqlite:///PATH`, without a
/// password.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    url: url::Url,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Postgres,
    Sqlite,
}

/// Why an address is refused. Never quotes the address.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidAddress {
    #[error("the address is neither `postgres://USER@HOST/DATABASE` nor `sqlite:///PATH`")]
    Form,
    #[error(
        "the address contains a password, which every process of the machine could read: the \
         password must be in PGPASSWORD or in a file that PGPASSFILE names"
    )]
    Password,
}

impl FromStr for Address {
    type Err = InvalidAddress;

    fn from_str(given: &str) -> Result<Self, InvalidAddress> {
        let url = url::Url::parse(given).map_err(|_| InvalidAddress::Form)?;
        let kind = match url.scheme() {
            "postgres" | "postgresql" => Kind::Postgres,
            "sqlite" if Path::new(url.path()).is_absolute() && !url.has_host() => Kind::Sqlite,
            _ => return Err(InvalidAddress::Form),
        };
        let has_password =
            url.password().is_some() || url.query_pairs().any(|(name, _)| name == "password");
        match has_password {
            true => Err(InvalidAddress::Password),
            false => Ok(Self { url, kind }),
        }
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.url.fmt(f)
    }
}

impl Address {
    pub(super) fn kind(&self) -> Kind {
        self.kind
    }

    /// The address for the database's driver, with the defaults of missing options.
    pub(super) fn url(&self) -> url::Url {
        let mut url = self.url.clone();
        match self.kind {
            // SQLite creates the file if it is missing.
            Kind::Sqlite if url.query().is_none() => url.set_query(Some("mode=rwc")),
            Kind::Postgres if is_elsewhere(&url) && !says_sslmode(&url) => {
                url.query_pairs_mut().append_pair("sslmode", "verify-full");
            }
            Kind::Sqlite | Kind::Postgres => {}
        }
        url
    }
}

/// Whether a connection to this address crosses a network. The host may be in the address or in
/// the address's options; if it is in neither, it may be in the environment.
fn is_elsewhere(url: &url::Url) -> bool {
    let options = url.query_pairs();
    let options = options.filter(|(name, _)| matches!(&**name, "host" | "hostaddr"));
    let mut hosts: Vec<String> = options.map(|(_, host)| host.into_owned()).collect();
    match url.host_str() {
        Some(host) if !host.is_empty() => hosts.push(host.to_owned()),
        _ => hosts.extend(
            ["PGHOSTADDR", "PGHOST"]
                .iter()
                .filter_map(|name| std::env::var(name).ok()),
        ),
    }
    hosts.iter().any(|host| is_another_machine(host))
}

fn is_another_machine(host: &str) -> bool {
    // A path is the folder of a unix socket.
    if host.starts_with('/') || host.starts_with("%2F") {
        return false;
    }
    match host.trim_matches(['[', ']']).parse::<IpAddr>() {
        Ok(address) => !address.is_loopback(),
        Err(_) => host != "localhost",
    }
}

fn says_sslmode(url: &url::Url) -> bool {
    let given = url
        .query_pairs()
        .any(|(name, _)| matches!(&*name, "sslmode" | "ssl-mode"));
    let variable = std::env::var("PGSSLMODE").unwrap_or_default();
    let modes = [
        "disable",
        "allow",
        "prefer",
        "require",
        "verify-ca",
        "verify-full",
    ];
    given || modes.contains(&&*variable)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_crosses_a_network_is_checked_unless_said_otherwise() {
        let is_elsewhere = |text: &str| is_elsewhere(&url::Url::parse(text).unwrap());
        for here in ["127.0.0.1", "[::1]", "localhost", "localhost:5433"] {
            assert!(
                !is_elsewhere(&format!("postgres://shim@{here}/polydev")),
                "{here}"
            );
        }
        assert!(!is_elsewhere("postgres:///polydev?host=/run/postgresql"));
        for there in ["/polydev?host=db", "localhost/polydev?hostaddr=192.0.2.1"] {
            assert!(is_elsewhere(&format!("postgres://{there}")), "{there}");
        }
        for there in ["db", "192.0.2.1:5432", "[2001:db8::1]"] {
            assert!(
                is_elsewhere(&format!("postgres://shim@{there}/polydev")),
                "{there}"
            );
        }
    }

    #[test]
    fn addresses_are_of_a_database_and_without_a_password() {
        let parse = |text: &str| text.parse::<Address>();
        for good in [
            "postgres://shim@db/polydev?sslmode=verify-full",
            "sqlite:///var/lib/s.db",
        ] {
            assert_eq!(parse(good).unwrap().to_string(), good);
        }
        for wrong in [
            "",
            "mysql://db/x",
            "sqlite::memory:",
            "sqlite://relative.db",
            "/a/path",
        ] {
            assert_eq!(parse(wrong), Err(InvalidAddress::Form), "{wrong}");
        }
        for password in [
            "postgres://shim:x@db/polydev",
            "postgres://db/polydev?password=x",
        ] {
            assert_eq!(parse(password), Err(InvalidAddress::Password));
        }
    }
}
