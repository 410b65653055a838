//! Certificates for one test, for a dockerd that accepts only clients with a certificate.

use std::{fs, net::SocketAddr, path::PathBuf};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tempfile::TempDir;

/// Two authorities, and the certificates that they have signed.
#[derive(Debug)]
pub struct Certificates {
    folder: TempDir,
}

impl Certificates {
    /// # Panics
    /// If the files cannot be written.
    #[must_use]
    pub fn make() -> Self {
        let folder = tempfile::tempdir().expect("a folder can be made");
        let write = |name: &str, text: String| {
            fs::write(folder.path().join(name), text).expect("a file can be written");
        };
        let key = || KeyPair::generate().expect("a key can be generated");
        for authority in ["ours", "anothers"] {
            let mut params = CertificateParams::default();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params
                .distinguished_name
                .push(rcgen::DnType::CommonName, authority);
            let issuer = CertifiedIssuer::self_signed(params, key()).expect("a certificate");
            write(&format!("{authority}-ca.pem"), issuer.pem());
            for name in ["server", "client"] {
                let key = key();
                let names = vec!["127.0.0.1".to_owned()];
                let params = CertificateParams::new(names).expect("an address is a name");
                let signed = params.signed_by(&key, &issuer).expect("a certificate");
                write(&format!("{authority}-{name}.pem"), signed.pem());
                write(&format!("{authority}-{name}-key.pem"), key.serialize_pem());
            }
        }
        Self { folder }
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    /// The first authority's certificate.
    #[must_use]
    pub fn authority(&self) -> PathBuf {
        self.path("ours-ca.pem").into()
    }

    /// Certificate and key of the first authority's server at 127.0.0.1.
    ///
    /// # Panics
    /// If the files have been removed.
    #[must_use]
    pub fn server(&self) -> [String; 2] {
        ["ours-server.pem", "ours-server-key.pem"]
            .map(|name| fs::read_to_string(self.path(name)).expect("the file was written"))
    }

    /// Settings of a collector that has the first authority's server certificate.
    #[must_use]
    pub fn collector_settings(&self) -> Vec<String> {
        let (certificate, key) = (
            self.path("ours-server.pem"),
            self.path("ours-server-key.pem"),
        );
        let setting = |protocol: &str, name: &str, file: &str| {
            format!("receivers::otlp::protocols::{protocol}::tls::{name}: {file}")
        };
        let of = |protocol: &'static str| {
            [
                setting(protocol, "cert_file", &certificate),
                setting(protocol, "key_file", &key),
            ]
        };
        ["grpc", "http"].into_iter().flat_map(of).collect()
    }

    /// Options of a dockerd that accepts clients of the first authority at this port.
    #[must_use]
    pub fn dockerd_options(&self, port: u16) -> Vec<String> {
        vec![
            "--tlsverify".to_owned(),
            format!("--tlscacert={}", self.path("ours-ca.pem")),
            format!("--tlscert={}", self.path("ours-server.pem")),
            format!("--tlskey={}", self.path("ours-server-key.pem")),
            format!("--host=tcp://127.0.0.1:{port}"),
        ]
    }

    /// Options of a plugin that trusts the first authority and has a certificate of `authority`.
    #[must_use]
    pub fn plugin_options(&self, docker: SocketAddr, authority: &str) -> String {
        format!(
            "endpoint = \"tcp://{docker}\"\ntls {{\n cert = {:?}\n key = {:?}\n ca = {:?}\n}}",
            self.path(&format!("{authority}-client.pem")),
            self.path(&format!("{authority}-client-key.pem")),
            self.path("ours-ca.pem"),
        )
    }
}
