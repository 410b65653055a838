//! TLS, as callers, shims and drivers speak it beyond one machine: both sides have a certificate,
//! and each lets in whom its authority has signed; or the caller has none, and says otherwise who
//! it is.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use futures_util::{Stream, stream};
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
    sync::Semaphore,
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;
use x509_parser::{extensions::GeneralName, parse_x509_certificate};

use crate::{connection::Connection, reload::Reloaded};

/// gRPC's.
pub const GRPC: &str = "h2";
/// What else a server may speak, that also serves callers without gRPC.
pub const HTTP: &str = "http/1.1";
/// From a connection to the end of its handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Connections of callers without a certificate, of whom nothing is known yet; more are turned
/// away.
const NOBODIES_MOST: usize = 4096;
/// Handshakes at a time; who comes then waits in the kernel's queue.
const HANDSHAKES_MOST: usize = 256;
const NO_DESCRIPTOR: Duration = Duration::from_millis(50);

/// The files of one side, in PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files {
    /// Its certificate, and whatever leads from it to the authority.
    pub certificate: PathBuf,
    /// The key of it.
    pub key: PathBuf,
    /// Certificates of those whose word is taken for the other side.
    pub authority: PathBuf,
}

/// Whom a caller believes, and what it shows of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trust {
    /// Both sides have a certificate.
    Mutual(Files),
    /// The caller shows none: it says otherwise who it is.
    Server {
        /// Certificates of those whose word is taken for the other side.
        authority: PathBuf,
    },
}

/// Whom a server lets in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Callers {
    /// Those with a certificate that the authority has signed.
    Certified,
    /// Those as well who show none, of whom nothing is known then. One that is wrong is refused.
    Any,
}

/// Why the files are of no use.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read `{}`", path.display())]
    Unreadable { path: PathBuf, source: pem::Error },
    #[error("`{}` has no certificate", path.display())]
    Empty { path: PathBuf },
    #[error("the certificate in `{}` and its key cannot be used", path.display())]
    Unusable {
        path: PathBuf,
        source: rustls::Error,
    },
    #[error("the authority in `{}` cannot be used", path.display())]
    Authority {
        path: PathBuf,
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl Files {
    /// For whoever is called, in one of `protocols` (ALPN).
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
        // A session that is taken up again would not be asked for its certificate.
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
    /// For whoever calls.
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
    /// [`Error`] if the files are of no use now.
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

    /// What the next handshake is to use, and an error if there are newer files of no use.
    pub fn config(&self) -> (Arc<ServerConfig>, Option<Error>) {
        let load = || self.files.server(self.protocols, self.callers);
        self.config.get(load)
    }
}

/// Connections to `listener` whose handshake has succeeded.
/// One that is slow delays no other.
pub fn incoming(
    listener: TcpListener,
    files: Arc<Reloading>,
) -> impl Stream<Item = Connection> + Send {
    let handshakes = JoinSet::new();
    let places = Arc::new(Semaphore::new(NOBODIES_MOST));
    stream::unfold((listener, files, places, handshakes), |state| async {
        let (listener, files, places, mut handshakes) = state;
        loop {
            tokio::select! {
                accepted = listener.accept(), if handshakes.len() < HANDSHAKES_MOST => {
                    let Ok((stream, address)) = accepted else {
                        // A descriptor that is missing now may be there in a moment.
                        sleep(NO_DESCRIPTOR).await;
                        continue;
                    };
                    let (config, refused) = files.config();
                    if let Some(error) = refused {
                        let error = chain(&error);
                        tracing::warn!(error, "new certificates are of no use, the old ones stay");
                    }
                    let handshake = handshake(config, stream, places.clone());
                    handshakes.spawn(async move {
                        (address, timeout(HANDSHAKE, handshake).await)
                    });
                }
                Some(done) = handshakes.join_next() => match done {
                    Ok((_, Ok(Ok(done)))) => {
                        return Some((done, (listener, files, places, handshakes)));
                    },
                    Ok((address, Ok(Err(error)))) => {
                        tracing::info!(%address, %error, "a caller was turned away");
                    }
                    Ok((address, Err(_))) => {
                        tracing::info!(%address, "a caller did not finish its handshake");
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
    places: Arc<Semaphore>,
) -> io::Result<Connection> {
    stream.set_nodelay(true)?;
    let stream = TlsAcceptor::from(config).accept(stream).await?;
    let (_, session) = stream.get_ref();
    let certificate = session.peer_certificates().and_then(|chain| chain.first());
    let Some(certificate) = certificate else {
        let place = places.try_acquire_owned();
        let place = place.map_err(|_| io::Error::other("too many show no certificate"))?;
        return Ok(Connection::of_nobody(stream, place));
    };
    let name = name(certificate);
    let name = name.ok_or_else(|| io::Error::other("its certificate names nobody"))?;
    Ok(Connection::new(stream, name))
}

/// The name of whom a certificate is for: its first SPIFFE id (`spiffe://...`), or `cn:` and
/// the subject's common name. `None` if it has neither.
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

/// That files cannot be read, as an error of input and output.
impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        Self::other(error)
    }
}
