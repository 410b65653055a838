//! Certificates of a shim and its callers, and the shim's options for TLS and roles.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use polydev_client::Files;
use polydev_tests::{folder::Folder, process::succeed, program};
use rcgen::{
    CertificateParams, CertificateRevocationListParams, Issuer, KeyIdMethod, KeyPair,
    RevokedCertParams,
};
use time::{Duration, OffsetDateTime};

use crate::site::port;

/// A set of certificates in a folder: an authority, the shim and callers.
pub(crate) fn make(folder: &Path) {
    let mut command = Command::new(program("polydev-shim"));
    let printed = succeed(command.args(["certs", "dev"]).arg(folder));
    assert!(printed.contains("--roles"), "{printed}");
}

/// The certificate of `name` from the folder `own`, with the authority of the folder `trusted`.
pub(crate) fn files(own: &Path, name: &str, trusted: &Path) -> Files {
    Files {
        certificate: own.join(format!("{name}.pem")),
        key: own.join(format!("{name}-key.pem")),
        authority: trusted.join("ca.pem"),
        revoked: None,
    }
}

/// The files of a shim that listens for remote callers.
pub(crate) struct Tls {
    pub(crate) url: String,
    folder: Folder,
}

impl Tls {
    /// Makes certificates, and a file with these roles.
    pub(crate) fn with_roles(roles: &str) -> Self {
        let tls = Self {
            url: format!("https://127.0.0.1:{}", port()),
            folder: Folder::new("pdtls-"),
        };
        make(&tls.ours());
        tls.write_roles(roles);
        tls
    }

    /// The folder of the certificates that the shim uses and trusts.
    pub(crate) fn ours(&self) -> PathBuf {
        self.folder.path().join("ours")
    }

    /// A folder for other certificates. It does not exist yet.
    pub(crate) fn others(&self) -> PathBuf {
        self.folder.path().join("others")
    }

    /// The certificate of `name` that the shim trusts.
    pub(crate) fn files(&self, name: &str) -> Files {
        files(&self.ours(), name, &self.ours())
    }

    pub(crate) fn write_roles(&self, roles: &str) {
        let path = self.ours().join("roles.toml");
        fs::write(path, roles).expect("a file can be written");
    }

    /// The shim's options.
    pub(crate) fn options(&self) -> Vec<String> {
        let path = |name: &str| self.ours().join(name).display().to_string();
        let options = [
            ("--listen", self.url.clone()),
            ("--tls-cert", path("shim.pem")),
            ("--tls-key", path("shim-key.pem")),
            ("--tls-ca", path("ca.pem")),
            ("--roles", path("roles.toml")),
        ];
        let words = options.map(|(name, value)| [name.to_owned(), value]);
        words.into_iter().flatten().collect()
    }
}

/// Signs a certificate called `name` with the authority of a folder. `change` sets its contents.
pub(crate) fn sign(folder: &Path, name: &str, change: impl FnOnce(&mut CertificateParams)) {
    let issuer = authority(folder);
    let own = KeyPair::generate().expect("a new key");
    let mut params = CertificateParams::default();
    change(&mut params);
    let signed = params.signed_by(&own, &issuer).expect("a certificate");
    let write = |name: String, text: String| fs::write(folder.join(name), text);
    write(format!("{name}.pem"), signed.pem()).expect("a file can be written");
    write(format!("{name}-key.pem"), own.serialize_pem()).expect("a file can be written");
}

/// Writes the list of certificates with these numbers that the authority of a folder takes back.
pub(crate) fn revoke(folder: &Path, numbers: &[u64], until: OffsetDateTime) {
    let now = OffsetDateTime::now_utc();
    let revoked = numbers.iter().map(|number| RevokedCertParams {
        serial_number: (*number).into(),
        revocation_time: now,
        reason_code: None,
        invalidity_date: None,
    });
    let list = CertificateRevocationListParams {
        this_update: now - Duration::days(2),
        next_update: until,
        crl_number: 1.into(),
        issuing_distribution_point: None,
        revoked_certs: revoked.collect(),
        key_identifier_method: KeyIdMethod::Sha256,
    };
    let list = list.signed_by(&authority(folder)).expect("a list");
    // Nobody reads half of it.
    let new = folder.join("new.pem");
    fs::write(&new, list.pem().expect("text")).expect("a file can be written");
    fs::rename(new, folder.join("crl.pem")).expect("a file can be renamed");
}

fn authority(folder: &Path) -> Issuer<'static, KeyPair> {
    let read = |name: &str| fs::read_to_string(folder.join(name)).expect("an existing file");
    let key = KeyPair::from_pem(&read("ca-key.pem")).expect("a valid key");
    Issuer::from_ca_cert_pem(&read("ca.pem"), key).expect("an authority")
}

/// Options as the fixtures take them.
pub(crate) fn words(options: &[String]) -> Vec<&str> {
    options.iter().map(String::as_str).collect()
}
