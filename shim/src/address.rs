//! Where the shim listens and is reached: a unix socket or loopback, nothing else
//! until there is TLS.

use std::{
    fmt, fs, io,
    net::SocketAddr,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    str::FromStr,
};

use tokio::net::{TcpListener, UnixListener};
use tonic::transport::Endpoint;

/// Where a shim listens unless it is told otherwise.
pub const DEFAULT: &str = "unix:///run/polydev/shim.sock";

/// `unix:///absolute/path` or `http://127.0.0.1:port`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    Unix(PathBuf),
    Loopback(SocketAddr),
}

/// Why an address is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("`{given}` is neither `unix:///PATH` nor `http://127.0.0.1:PORT`")]
    Form { given: String },
    #[error(
        "`{given}` is not a loopback address: credentials would cross the network \
         in the clear, and there is no TLS yet"
    )]
    Public { given: String },
}

impl FromStr for Address {
    type Err = Error;

    fn from_str(given: &str) -> Result<Self, Error> {
        let form = || Error::Form {
            given: given.to_owned(),
        };
        if let Some(path) = given.strip_prefix("unix://") {
            let path = PathBuf::from(path);
            return if path.is_absolute() {
                Ok(Self::Unix(path))
            } else {
                Err(form())
            };
        }
        let authority = given.strip_prefix("http://").ok_or_else(form)?;
        let authority = authority.strip_suffix('/').unwrap_or(authority);
        let authority = authority.replacen("localhost:", "127.0.0.1:", 1);
        let address: SocketAddr = authority.parse().map_err(|_| form())?;
        if address.ip().is_loopback() {
            Ok(Self::Loopback(address))
        } else {
            Err(Error::Public {
                given: given.to_owned(),
            })
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Loopback(address) => write!(f, "http://{address}"),
        }
    }
}

/// A bound socket.
#[derive(Debug)]
pub enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Address {
    /// Binds; a unix socket is for this user alone, and one that nobody serves any
    /// more is taken over.
    ///
    /// # Errors
    /// As the kernel says; `AddrInUse` if somebody serves there.
    pub async fn listen(&self) -> io::Result<Listener> {
        match self {
            Self::Loopback(address) => TcpListener::bind(address).await.map(Listener::Tcp),
            Self::Unix(path) => {
                if let Some(folder) = path.parent() {
                    fs::create_dir_all(folder)?;
                }
                if tokio::net::UnixStream::connect(path).await.is_ok() {
                    return Err(io::ErrorKind::AddrInUse.into());
                }
                remove_stale(path)?;
                let listener = UnixListener::bind(path)?;
                fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
                Ok(Listener::Unix(listener))
            }
        }
    }

    /// For a client.
    #[must_use]
    pub fn endpoint(&self) -> Endpoint {
        Endpoint::from_shared(self.to_string()).expect("what an address prints is a URI")
    }
}

fn remove_stale(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_they_are_written() {
        for given in [DEFAULT, "http://127.0.0.1:7070", "http://[::1]:7070"] {
            assert_eq!(given.parse::<Address>().unwrap().to_string(), given);
        }
        let named: Address = "http://localhost:7070/".parse().unwrap();
        assert_eq!(named.to_string(), "http://127.0.0.1:7070");
    }

    #[test]
    fn nothing_but_loopback_and_unix_sockets_is_allowed() {
        for public in [
            "http://0.0.0.0:7070",
            "http://192.0.2.1:80",
            "http://[::]:7070",
        ] {
            let refused = public.parse::<Address>().unwrap_err();
            assert_eq!(
                refused,
                Error::Public {
                    given: public.into()
                }
            );
        }
        for wrong in [
            "",
            "7070",
            "unix://relative",
            "https://127.0.0.1:1",
            "http://example.org:80",
        ] {
            assert!(
                matches!(wrong.parse::<Address>(), Err(Error::Form { .. })),
                "{wrong}"
            );
        }
    }
}
