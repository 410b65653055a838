//! `polydev-shim certs ...`

use std::{
    fs::{self, OpenOptions},
    io::Write,
    net::IpAddr,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context;
use polydev_cli::print;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, SanType,
};
use time::{Duration, OffsetDateTime};

/// Short, because the certificates are only for trials.
const VALID: Duration = Duration::days(30);
const SHIM: &str = "spiffe://polydev.test/shim";
const NODE: &str = "spiffe://polydev.test/node";

#[derive(clap::Subcommand)]
pub(super) enum Command {
    /// Make an authority, certificates of a shim, a node and a caller, and a file of roles, for
    /// trials. The certificates are valid for 30 days. The authority's private key is in the same
    /// folder.
    Dev(Dev),
}

#[derive(clap::Args)]
pub(super) struct Dev {
    /// Folder for the files; created if missing. Existing files are not replaced.
    folder: PathBuf,
    /// Another name or address of shims and nodes, besides localhost, 127.0.0.1 and ::1; may be
    /// repeated.
    #[arg(long, value_name = "HOST")]
    name: Vec<String>,
    /// The caller's SPIFFE id.
    #[arg(long, value_name = "ID", default_value = "spiffe://polydev.test/controller", value_parser = spiffe)]
    caller: String,
}

pub(super) fn execute(Command::Dev(arguments): Command) -> anyhow::Result<ExitCode> {
    let Dev {
        folder,
        name,
        caller,
    } = arguments;
    let mut authority = params("polydev trial authority");
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let issuer = CertifiedIssuer::self_signed(authority, KeyPair::generate()?)?;
    let mut files = Files::default();
    files.add("ca.pem", 0o644, issuer.pem());
    files.add("ca-key.pem", 0o600, issuer.key().serialize_pem());

    let mut hosts = Vec::new();
    for name in ["localhost", "127.0.0.1", "::1"]
        .map(str::to_owned)
        .into_iter()
        .chain(name)
    {
        hosts.push(match name.parse::<IpAddr>() {
            Ok(address) => SanType::IpAddress(address),
            Err(_) => {
                let host = url::Host::parse(&name).with_context(|| format!("--name `{name}`"))?;
                SanType::DnsName(host.to_string().as_str().try_into().context("--name")?)
            }
        });
    }
    let servers = [("shim", SHIM), ("node", NODE)].map(|(name, id)| (name, id, hosts.as_slice()));
    for (name, id, hosts) in servers
        .into_iter()
        .chain([("controller", &*caller, &[][..])])
    {
        let mut params = params(name);
        let uri = id.try_into().context("--caller")?;
        params.subject_alt_names = hosts.to_vec();
        params.subject_alt_names.push(SanType::URI(uri));
        sign(&mut files, name, params, &issuer)?;
    }
    let roles = format!(
        "[[role]]\nmembers = [{caller:?}]\nmay = [\"run\", \"scale\", \"images\", \"credentials\"]\n"
    );
    files.add("roles.toml", 0o644, roles);
    files.write(&folder)?;

    let folder = folder.display();
    print(&format!(
        "polydev-shim serve --listen https://0.0.0.0:7443 --tls-cert {folder}/shim.pem \
         --tls-key {folder}/shim-key.pem --tls-ca {folder}/ca.pem --roles {folder}/roles.toml\n\
         polydev-shim pool list --address https://localhost:7443 \
         --tls-cert {folder}/controller.pem --tls-key {folder}/controller-key.pem \
         --tls-ca {folder}/ca.pem\n"
    ))?;
    Ok(ExitCode::SUCCESS)
}

fn params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    // The clocks of other machines may be behind this clock.
    params.not_before = OffsetDateTime::now_utc() - Duration::hours(1);
    params.not_after = OffsetDateTime::now_utc() + VALID;
    params
}

fn spiffe(text: &str) -> Result<String, String> {
    match text.starts_with("spiffe://") {
        true => Ok(text.to_owned()),
        false => Err("a SPIFFE id must begin with spiffe://".into()),
    }
}

fn sign(
    files: &mut Files,
    name: &str,
    mut params: CertificateParams,
    issuer: &CertifiedIssuer<KeyPair>,
) -> anyhow::Result<()> {
    let key = KeyPair::generate()?;
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    let signed = params.signed_by(&key, issuer)?;
    files.add(&format!("{name}.pem"), 0o644, signed.pem());
    files.add(&format!("{name}-key.pem"), 0o600, key.serialize_pem());
    Ok(())
}

/// Files to write, once all their contents are made: name, mode, text.
#[derive(Default)]
struct Files(Vec<(String, u32, String)>);

impl Files {
    fn add(&mut self, name: &str, mode: u32, text: String) {
        self.0.push((name.to_owned(), mode, text));
    }

    /// Writes all files. If one of the files already exists, writes nothing.
    fn write(self, folder: &Path) -> anyhow::Result<()> {
        let shown = |path: &Path| path.display().to_string();
        fs::create_dir_all(folder).with_context(|| format!("cannot create `{}`", shown(folder)))?;
        for (name, ..) in &self.0 {
            let path = folder.join(name);
            anyhow::ensure!(!path.exists(), "`{}` already exists", shown(&path));
        }
        for (name, mode, text) in self.0 {
            let path = folder.join(name);
            let mut options = OpenOptions::new();
            let file = options.write(true).create_new(true).mode(mode).open(&path);
            file.and_then(|mut file| file.write_all(text.as_bytes()))
                .with_context(|| format!("cannot write `{}`", shown(&path)))?;
        }
        Ok(())
    }
}
