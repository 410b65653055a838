//! Certificates that their authorities have taken back (RFC 5280, section 5).

use std::{collections::HashSet, path::Path};

use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, pem::PemObject};
use x509_parser::{parse_x509_certificate, parse_x509_crl};

use crate::tls::Error;

/// A certificate: its issuer's name and its number.
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct Id(Vec<u8>, Vec<u8>);

impl Id {
    /// `None` for what is no certificate.
    #[must_use]
    pub fn of(certificate: &CertificateDer) -> Option<Self> {
        let (_, certificate) = parse_x509_certificate(certificate).ok()?;
        let issuer = certificate.issuer().as_raw().to_vec();
        Some(Self(issuer, number(certificate.raw_serial())))
    }
}

/// What the lists of a file contain.
#[derive(Debug, Default)]
pub struct Revoked(HashSet<Id>);

impl Revoked {
    /// Reads the lists of a file in PEM, also for a verifier.
    ///
    /// # Errors
    /// [`Error`]
    pub fn read(path: &Path) -> Result<(Self, Vec<CertificateRevocationListDer<'static>>), Error> {
        let lists = CertificateRevocationListDer::pem_file_iter(path).and_then(Iterator::collect);
        let lists: Vec<CertificateRevocationListDer> =
            lists.map_err(|source| Error::Unreadable {
                path: path.into(),
                source,
            })?;
        let wrong = || Error::NoList { path: path.into() };
        if lists.is_empty() {
            return Err(wrong());
        }
        let mut revoked = HashSet::new();
        for list in &lists {
            let (_, list) = parse_x509_crl(list).map_err(|_| wrong())?;
            let issuer = list.issuer().as_raw();
            for one in list.iter_revoked_certificates() {
                revoked.insert(Id(issuer.to_vec(), number(one.raw_serial())));
            }
        }
        Ok((Self(revoked), lists))
    }

    /// Whether the certificate is in a list.
    #[must_use]
    pub fn has(&self, id: &Id) -> bool {
        self.0.contains(id)
    }
}

/// A number without leading zeros.
fn number(raw: &[u8]) -> Vec<u8> {
    let first = raw.iter().position(|byte| *byte != 0);
    raw[first.unwrap_or(raw.len())..].to_vec()
}
