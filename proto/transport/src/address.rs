//! Where the shim listens and is reached: a Unix socket, loopback, or any address with TLS.

use std::{
    fmt, fs, io,
    net::SocketAddr,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
};

use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::transport::{Channel, Endpoint, Uri};
use tower::Service;
use url::{Host, Url};

use crate::{
    incoming::Reloading,
    tls::{Callers, Files, GRPC, HTTP, Trust},
};

/// The shim's default address.
pub const DEFAULT: &str = "unix:///run/polydev/shim.sock";

/// `unix:///absolute/path`, `http://127.0.0.1:port` or `https://host:port`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    Unix(PathBuf),
    Loopback(SocketAddr),
    /// Any address, with TLS.
    Tls {
        /// A name or an IP address, without brackets.
        host: String,
        port: u16,
    },
}

/// Why an address is rejected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error(
        "`{given}` is not a valid address; must be `unix:///PATH`, `http://127.0.0.1:PORT` or `https://HOST:PORT`"
    )]
    Form { given: String },
    #[error(
        "`{given}` is not a loopback address, so credentials would cross the network in the \
         clear; use `https://`"
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
        if given.starts_with("https://") {
            return tls(given).ok_or_else(form);
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

/// Parses host and port, and nothing else.
fn tls(given: &str) -> Option<Address> {
    let url = Url::parse(given).ok()?;
    let host = match url.host()? {
        Host::Domain(name) => name.to_owned(),
        Host::Ipv4(address) => address.to_string(),
        Host::Ipv6(address) => address.to_string(),
    };
    let is_bare = url.path() == "/" && url.query().is_none() && url.username().is_empty();
    let port = url.port_or_known_default()?;
    is_bare.then_some(Address::Tls { host, port })
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Loopback(address) => write!(f, "http://{address}"),
            Self::Tls { host, port } if host.contains(':') => write!(f, "https://[{host}]:{port}"),
            Self::Tls { host, port } => write!(f, "https://{host}:{port}"),
        }
    }
}

/// A bound socket.
#[derive(Debug)]
pub enum Listener {
    Unix(UnixListener),
    Loopback(TcpListener),
    Tls(TcpListener, Arc<Reloading>),
}

impl Address {
    /// Whether callers may be on other machines.
    #[must_use]
    pub fn is_public(&self) -> bool {
        matches!(self, Self::Tls { .. })
    }

    /// Binds the address. A Unix socket gets `mode`; a socket that nobody serves any longer
    /// is replaced.
    ///
    /// # Errors
    /// The kernel's error; `AddrInUse` if another process serves there; any problem with
    /// the files, which TLS requires.
    pub async fn listen(
        &self,
        files: Option<&Files>,
        callers: Callers,
        mode: u32,
    ) -> io::Result<Listener> {
        match self {
            Self::Loopback(address) => TcpListener::bind(address).await.map(Listener::Loopback),
            Self::Tls { host, port } => {
                let files = files.ok_or_else(|| missing("--tls-cert, --tls-key and --tls-ca"))?;
                let files = files.clone();
                let files = Arc::new(Reloading::new(files, &[GRPC, HTTP], callers)?);
                let socket = TcpListener::bind((host.as_str(), *port)).await?;
                Ok(Listener::Tls(socket, files))
            }
            Self::Unix(path) => {
                if let Some(folder) = path.parent() {
                    fs::create_dir_all(folder)?;
                }
                if tokio::net::UnixStream::connect(path).await.is_ok() {
                    return Err(io::ErrorKind::AddrInUse.into());
                }
                remove_stale(path)?;
                let listener = UnixListener::bind(path)?;
                fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
                Ok(Listener::Unix(listener))
            }
        }
    }

    /// Connects as a client, with the settings of `endpoint`.
    ///
    /// # Errors
    /// Why it cannot connect; any problem with the files, which TLS requires.
    pub async fn connect(
        &self,
        trust: Option<&Trust>,
        settings: impl FnOnce(Endpoint) -> Endpoint,
    ) -> Result<Channel, Box<dyn std::error::Error + Send + Sync>> {
        let endpoint = settings(self.endpoint()?);
        match self.connector(trust)? {
            None => Ok(endpoint.connect().await?),
            Some(connector) => Ok(endpoint.connect_with_connector(connector).await?),
        }
    }

    /// As [`Address::connect`], with the first call, and again whenever that is needed. Needs a
    /// runtime.
    ///
    /// # Errors
    /// If the files that TLS requires are missing.
    pub fn connect_lazy(
        &self,
        trust: Option<&Trust>,
        settings: impl FnOnce(Endpoint) -> Endpoint,
    ) -> Result<Channel, Box<dyn std::error::Error + Send + Sync>> {
        let endpoint = settings(self.endpoint()?);
        Ok(match self.connector(trust)? {
            None => endpoint.connect_lazy(),
            Some(connector) => endpoint.connect_with_connector_lazy(connector),
        })
    }

    fn endpoint(&self) -> Result<Endpoint, tonic::transport::Error> {
        Endpoint::from_shared(match self {
            // The connector adds TLS, which this scheme hides.
            Self::Tls { .. } => self.to_string().replacen("https", "http", 1),
            Self::Unix(_) | Self::Loopback(_) => self.to_string(),
        })
    }

    /// What connects with TLS; `None` for an address without.
    fn connector(
        &self,
        trust: Option<&Trust>,
    ) -> Result<Option<impl Connect>, Box<dyn std::error::Error + Send + Sync>> {
        let Self::Tls { host, port } = self else {
            return Ok(None);
        };
        let name = ServerName::try_from(host.clone())?;
        let needed = "--tls-ca, and either --tls-cert with --tls-key or a token";
        let trust = trust.ok_or_else(|| missing(needed))?.clone();
        let to = (host.clone(), *port);
        Ok(Some(tower::service_fn(move |_: Uri| {
            let (name, trust, to) = (name.clone(), trust.clone(), to.clone());
            async move {
                // Read again for every connection: the files may have been replaced.
                let connector = TlsConnector::from(Arc::new(trust.client()?));
                let stream = TcpStream::connect(to).await?;
                stream.set_nodelay(true)?;
                let stream = connector.connect(name, stream).await?;
                io::Result::Ok(TokioIo::new(stream))
            }
        })))
    }
}

/// What makes connections with TLS.
trait Connect:
    Service<Uri, Response = TokioIo<TlsStream<TcpStream>>, Error = io::Error, Future: Send>
    + Send
    + 'static
{
}

impl<T> Connect for T where
    T: Service<Uri, Response = TokioIo<TlsStream<TcpStream>>, Error = io::Error, Future: Send>
        + Send
        + 'static
{
}

fn missing(files: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidInput,
        format!("https requires {files}"),
    )
}

fn remove_stale(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// `SCHEME://HOST:PORT` and nothing more; an IPv6 address must be in brackets.
#[must_use]
pub fn is_url(scheme: &str, given: &str) -> bool {
    let uri = given.parse::<Uri>().unwrap_or_default();
    uri.authority().is_some_and(|authority| {
        let is_whole = format!("{scheme}://{authority}") == given;
        let is_bare = !authority.as_str().contains('@') && !authority.host().is_empty();
        is_whole && is_bare && authority.port_u16().is_some()
    })
}

/// Whether nobody on the way reads what goes to this URL: https, or http of the loopback address.
#[must_use]
pub fn is_safe_url(given: &str) -> bool {
    let Ok(url) = Url::parse(given) else {
        return false;
    };
    let is_loopback = match url.host() {
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        Some(Host::Domain(name)) => name == "localhost",
        None => false,
    };
    match url.scheme() {
        "https" => url.host().is_some(),
        "http" => is_loopback,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_they_are_written() {
        for given in [
            DEFAULT,
            "http://127.0.0.1:7070",
            "http://[::1]:7070",
            "https://0.0.0.0:7443",
            "https://[2001:db8::1]:7443",
            "https://shim.example.org:7443",
        ] {
            assert_eq!(given.parse::<Address>().unwrap().to_string(), given);
        }
        let named: Address = "http://localhost:7070/".parse().unwrap();
        assert_eq!(named.to_string(), "http://127.0.0.1:7070");
        let named: Address = "https://shim.example.org/".parse().unwrap();
        assert_eq!(named.to_string(), "https://shim.example.org:443");
    }

    #[test]
    fn nothing_but_loopback_and_unix_sockets_is_allowed_without_tls() {
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
            "http://example.org:80",
            "https://",
            "https://host:1/path",
            "https://user@host:1",
            "https://host:1/?a=b",
        ] {
            assert!(
                matches!(wrong.parse::<Address>(), Err(Error::Form { .. })),
                "{wrong}"
            );
        }
    }
}
