//! TLS between callers, shims and drivers on different machines. Both sides have a
//! certificate, and each accepts those that its authority has signed. A caller may also
//! have none, and identify itself in another way.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    crypto::{CryptoProvider, ring},
    pki_types::{
        CertificateDer, PrivateKeyDer,
        pem::{self, PemObject},
    },
    server::{NoServerSessionStorage, WebPkiClientVerifier},
};
use x509_parser::{extensions::GeneralName, parse_x509_certificate};

use crate::revoked::Revoked;

/// gRPC's protocol (ALPN).
pub const GRPC: &str = "h2";
/// The protocol for callers without gRPC (ALPN).
pub const HTTP: &str = "http/1.1";

/// The files of one side, in PEM format.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Files {
    /// Its certificate, with intermediate certificates up to the authority.
    pub certificate: PathBuf,
    /// The certificate's key.
    pub key: PathBuf,
    /// Certificates of the authorities that are trusted for the other side.
    pub authority: PathBuf,
    /// Lists of certificates that these authorities have taken back, for a server. Each authority
    /// must have one that is not out of date.
    pub revoked: Option<PathBuf>,
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
    /// As [`Trust::Server`], with the authorities that this machine trusts.
    Machine,
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
    #[error("`{}` contains no certificate revocation list", path.display())]
    NoList { path: PathBuf },
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
    #[error("this machine trusts no authority: install ca-certificates, or name a file")]
    NoAuthorities,
    #[error("cannot use TLS 1.2 or 1.3")]
    Versions(#[source] rustls::Error),
}

impl Files {
    /// The configuration of a server for `protocols` (ALPN), and the certificates that it refuses
    /// because they are revoked.
    ///
    /// # Errors
    /// [`Error`]
    pub fn server(
        &self,
        protocols: &[&str],
        callers: Callers,
    ) -> Result<(Arc<ServerConfig>, Revoked), Error> {
        let authority = |source| Error::Authority {
            path: self.authority.clone(),
            source,
        };
        let roots = Arc::new(roots(&self.authority)?);
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider());
        let (revoked, verifier) = match &self.revoked {
            None => (Revoked::default(), verifier),
            Some(path) => {
                let (revoked, lists) = Revoked::read(path)?;
                let verifier = verifier.with_crls(lists);
                (revoked, verifier.enforce_revocation_expiration())
            }
        };
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
        Ok((config.into(), revoked))
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
        let roots = match self {
            Self::Mutual(Files { authority, .. }) | Self::Server { authority } => roots(authority)?,
            Self::Machine => of_machine()?,
        };
        let config = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(Error::Versions)?
            .with_root_certificates(roots);
        let mut config = match self {
            Self::Server { .. } | Self::Machine => config.with_no_client_auth(),
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

fn of_machine() -> Result<RootCertStore, Error> {
    let mut roots = RootCertStore::empty();
    // Some of the machine's may be of no use; there must be some that are.
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    match roots.is_empty() {
        true => Err(Error::NoAuthorities),
        false => Ok(roots),
    }
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
