//! Certificates that their authorities have taken back (RFC 5280, section 5).

use std::{collections::HashSet, path::Path};

use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, pem::PemObject};
use x509_parser::{parse_x509_certificate, parse_x509_crl};

use crate::tls::Error;

/// What the lists of a file contain.
#[derive(Debug, Default)]
pub struct Revoked(HashSet<(Vec<u8>, Vec<u8>)>);

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
                revoked.insert((issuer.to_vec(), serial(one.raw_serial())));
            }
        }
        Ok((Self(revoked), lists))
    }

    /// Whether the certificate is in a list.
    #[must_use]
    pub fn has(&self, certificate: &CertificateDer) -> bool {
        parse_x509_certificate(certificate).is_ok_and(|(_, certificate)| {
            let issuer = certificate.issuer().as_raw().to_vec();
            self.0.contains(&(issuer, serial(certificate.raw_serial())))
        })
    }
}

/// A number without leading zeros.
fn serial(raw: &[u8]) -> Vec<u8> {
    let first = raw.iter().position(|byte| *byte != 0);
    raw[first.unwrap_or(raw.len())..].to_vec()
}
