//! TLS between callers, shims and drivers on different machines. Both sides have a
//! certificate, and each accepts those that its authority has signed. A caller may also
//! have none, and identify itself in another way.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures_util::{Stream, StreamExt, stream};
use polydev_proto::error::chain;
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    crypto::{CryptoProvider, ring},
    pki_types::{
        CertificateDer, PrivateKeyDer,
        pem::{self, PemObject},
    },
    server::{NoServerSessionStorage, WebPkiClientVerifier},
};
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::timeout,
};
use tokio_rustls::TlsAcceptor;
use x509_parser::{extensions::GeneralName, parse_x509_certificate};

use crate::{
    accept::accept,
    connection::{Connection, Origin},
    places::{Peer, Place, Places},
    reload::Reloaded,
};

/// gRPC's protocol (ALPN).
pub const GRPC: &str = "h2";
/// The protocol for callers without gRPC (ALPN).
pub const HTTP: &str = "http/1.1";
/// Time for a connection to complete its handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Most connections in a handshake, or of callers that have not identified themselves.
const MAX_UNKNOWN: usize = 4096;
/// Those of one address. Whoever wants to end the handshake of a proper caller with the same
/// address has to make so many connections meanwhile.
const MAX_UNKNOWN_OF_PEER: usize = 1024;

/// The files of one side, in PEM format.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files {
    /// Its certificate, with intermediate certificates up to the authority.
    pub certificate: PathBuf,
    /// The certificate's key.
    pub key: PathBuf,
    /// Certificates of the authorities that are trusted for the other side.
    pub authority: PathBuf,
}

/// Which servers a caller trusts, and how it identifies itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trust {
    /// Both sides have a certificate.
    Mutual(Files),
    /// The caller has no certificate; it identifies itself in another way.
    Server {
        /// Certificates of the authorities that are trusted for the other side.
        authority: PathBuf,
    },
}

/// Which callers a server accepts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Callers {
    /// Callers with a certificate that the authority has signed.
    Certified,
    /// Also callers without a certificate, which are then unidentified. A wrong certificate
    /// is rejected.
    Any,
}

/// Why the files cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read `{}`", path.display())]
    Unreadable { path: PathBuf, source: pem::Error },
    #[error("`{}` contains no certificate", path.display())]
    Empty { path: PathBuf },
    #[error("cannot use the certificate in `{}` with its key", path.display())]
    Unusable {
        path: PathBuf,
        source: rustls::Error,
    },
    #[error("cannot use the authority in `{}`", path.display())]
    Authority {
        path: PathBuf,
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl Files {
    /// The configuration of a server for `protocols` (ALPN).
    ///
    /// # Errors
    /// [`Error`]
    pub fn server(&self, protocols: &[&str], callers: Callers) -> Result<ServerConfig, Error> {
        let authority = |source| Error::Authority {
            path: self.authority.clone(),
            source,
        };
        let roots = Arc::new(roots(&self.authority)?);
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider());
        let verifier = match callers {
            Callers::Certified => verifier,
            Callers::Any => verifier.allow_unauthenticated(),
        };
        let callers = verifier.build().map_err(|error| authority(error.into()))?;
        let (chain, key) = self.own()?;
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(|source| self.unusable(source))?
            .with_client_cert_verifier(callers)
            .with_single_cert(chain, key)
            .map_err(|source| self.unusable(source))?;
        config.alpn_protocols = protocols.iter().map(|name| (*name).into()).collect();
        // The certificate would not be checked in a resumed session.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(config)
    }

    fn own(&self) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), Error> {
        let key = PrivateKeyDer::from_pem_file(&self.key);
        let key = key.map_err(|source| unreadable(&self.key, source))?;
        Ok((certificates(&self.certificate)?, key))
    }

    fn unusable(&self, source: rustls::Error) -> Error {
        Error::Unusable {
            path: self.certificate.clone(),
            source,
        }
    }
}

impl Trust {
    /// The configuration of a client.
    ///
    /// # Errors
    /// [`Error`]
    pub fn client(&self) -> Result<ClientConfig, Error> {
        let (Self::Mutual(Files { authority, .. }) | Self::Server { authority }) = self;
        let config = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(|error| Error::Authority {
                path: authority.clone(),
                source: error.into(),
            })?
            .with_root_certificates(roots(authority)?);
        let mut config = match self {
            Self::Server { .. } => config.with_no_client_auth(),
            Self::Mutual(files) => {
                let (chain, key) = files.own()?;
                let config = config.with_client_auth_cert(chain, key);
                config.map_err(|source| files.unusable(source))?
            }
        };
        config.alpn_protocols = vec![GRPC.into()];
        Ok(config)
    }
}

fn roots(authority: &Path) -> Result<RootCertStore, Error> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(authority)? {
        roots.add(certificate).map_err(|error| Error::Authority {
            path: authority.into(),
            source: error.into(),
        })?;
    }
    Ok(roots)
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let found = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
    let found: Vec<_> = found.map_err(|source| unreadable(path, source))?;
    match found.is_empty() {
        true => Err(Error::Empty { path: path.into() }),
        false => Ok(found),
    }
}

fn unreadable(path: &Path, source: pem::Error) -> Error {
    Error::Unreadable {
        path: path.into(),
        source,
    }
}

/// A server's configuration that follows its files.
#[derive(Debug)]
pub struct Reloading {
    files: Files,
    protocols: &'static [&'static str],
    callers: Callers,
    config: Reloaded<ServerConfig>,
}

impl Reloading {
    /// For a server of `protocols` (ALPN).
    ///
    /// # Errors
    /// [`Error`] if the files cannot be used now.
    pub fn new(
        files: Files,
        protocols: &'static [&'static str],
        callers: Callers,
    ) -> Result<Self, Error> {
        let paths = [&files.certificate, &files.key, &files.authority];
        let paths = paths.into_iter().cloned().collect();
        let config = Reloaded::new(paths, || files.server(protocols, callers))?;
        Ok(Self {
            files,
            protocols,
            callers,
            config,
        })
    }

    /// The configuration for the next handshake, and an error if newer files are unusable.
    pub fn config(&self) -> (Arc<ServerConfig>, Option<Error>) {
        let load = || self.files.server(self.protocols, self.callers);
        self.config.get(load)
    }
}

/// Connections to `listener` with a successful handshake. Slow handshakes do not delay others,
/// however many there are.
pub fn incoming(
    listener: TcpListener,
    files: Arc<Reloading>,
) -> impl Stream<Item = Connection> + Send {
    let places = Places::new(MAX_UNKNOWN, MAX_UNKNOWN_OF_PEER);
    let state = (Box::pin(accept(listener)), files, places, JoinSet::new());
    stream::unfold(state, |state| async {
        let (mut accepted, files, places, mut handshakes) = state;
        loop {
            tokio::select! {
                Some(stream) = accepted.next() => {
                    // One that is gone has no address.
                    let Ok(address) = stream.peer_addr() else { continue };
                    let (config, refused) = files.config();
                    if let Some(error) = refused {
                        let error = chain(&error);
                        tracing::warn!(error, "cannot use the new certificates, keeping the old ones");
                    }
                    let place = places.enter(Peer::of(address.ip()));
                    let handshake = handshake(config, stream, Origin::Address(address), place);
                    handshakes.spawn(async move { (address, handshake.await) });
                }
                Some(done) = handshakes.join_next() => match done {
                    Ok((_, Ok(done))) => {
                        return Some((done, (accepted, files, places, handshakes)));
                    }
                    Ok((address, Err(error))) => {
                        tracing::info!(%address, %error, "rejected a caller");
                    }
                    Err(error) => tracing::error!(%error, "a handshake panicked"),
                },
            }
        }
    })
}

async fn handshake(
    config: Arc<ServerConfig>,
    stream: TcpStream,
    origin: Origin,
    mut place: Place,
) -> io::Result<Connection> {
    stream.set_nodelay(true)?;
    let accepted = tokio::select! {
        accepted = timeout(HANDSHAKE_TIMEOUT, TlsAcceptor::from(config).accept(stream)) => accepted,
        () = place.given_up() => return Err(io::Error::other("too many others are in a handshake")),
    };
    let stream = accepted.map_err(|_| io::Error::other("it did not finish its handshake"))??;
    let (_, session) = stream.get_ref();
    let certificate = session.peer_certificates().and_then(|chain| chain.first());
    let Some(certificate) = certificate else {
        return Ok(Connection::of_nobody(stream, origin, place));
    };
    let name = name(certificate);
    let name = name.ok_or_else(|| io::Error::other("its certificate contains no name"))?;
    let not_after = not_after(certificate)
        .ok_or_else(|| io::Error::other("its certificate has no end that can be read"))?;
    Ok(Connection::new(stream, name, origin).until(not_after))
}

/// When a certificate expires.
fn not_after(certificate: &CertificateDer) -> Option<SystemTime> {
    let (_, certificate) = parse_x509_certificate(certificate).ok()?;
    let seconds = certificate.validity().not_after.timestamp();
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds.try_into().ok()?))
}

/// The name in a certificate: its first SPIFFE id (`spiffe://...`), or `cn:` and the
/// subject's common name. `None` if it has neither.
#[must_use]
pub fn name(certificate: &CertificateDer) -> Option<String> {
    let (_, certificate) = parse_x509_certificate(certificate).ok()?;
    let names = certificate.subject_alternative_name().ok().flatten();
    let names = names.map(|names| names.value.general_names.as_slice());
    let spiffe = names
        .unwrap_or_default()
        .iter()
        .find_map(|name| match name {
            GeneralName::URI(uri) if uri.starts_with("spiffe://") => Some((*uri).to_owned()),
            _ => None,
        });
    spiffe.or_else(|| {
        let name = certificate.subject().iter_common_name().next()?;
        Some(format!("cn:{}", name.as_str().ok()?))
    })
}

/// Converts unreadable files to an I/O error.
impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        Self::other(error)
    }
}
