//! How the shim reaches Nomad, with the variables of Nomad's own command line.

use std::{fs, net::SocketAddr, path::PathBuf, time::Duration};

use polydev_transport::address::is_safe_url;
use reqwest::{
    Certificate, Client, Identity, Url,
    dns::{Addrs, Name, Resolve, Resolving},
    header::HeaderValue,
};
use zeroize::Zeroizing;

use super::Error;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longer than a query waits for a change.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(75);

/// Options of a command that works with a Nomad cluster.
#[derive(Debug, Clone, clap::Args)]
#[group(id = "nomad")]
pub struct Settings {
    /// Address of a Nomad agent.
    #[arg(
        id = "nomad_addr",
        long = "nomad-addr",
        env = "NOMAD_ADDR",
        default_value = "http://127.0.0.1:4646"
    )]
    pub address: String,
    /// File with a Nomad token, which is read again for each request. [default: the variable
    /// NOMAD_TOKEN]
    #[arg(
        id = "nomad_token_file",
        long = "nomad-token-file",
        value_name = "FILE"
    )]
    pub token_file: Option<PathBuf>,
    /// Certificates of the authorities that sign the agent's certificate, in PEM. [default: the
    /// system's]
    #[arg(
        id = "nomad_ca_cert",
        long = "nomad-ca-cert",
        env = "NOMAD_CACERT",
        value_name = "FILE"
    )]
    pub ca_cert: Option<PathBuf>,
    /// The certificate that the shim presents to the agent, in PEM.
    #[arg(
        id = "nomad_client_cert",
        long = "nomad-client-cert",
        env = "NOMAD_CLIENT_CERT",
        value_name = "FILE",
        requires = "nomad_client_key"
    )]
    pub client_cert: Option<PathBuf>,
    /// The private key of --nomad-client-cert, in PEM.
    #[arg(
        id = "nomad_client_key",
        long = "nomad-client-key",
        env = "NOMAD_CLIENT_KEY",
        value_name = "FILE",
        requires = "nomad_client_cert"
    )]
    pub client_key: Option<PathBuf>,
    /// The name in the agent's certificate, if it is not the host of --nomad-addr.
    #[arg(
        id = "nomad_tls_server_name",
        long = "nomad-tls-server-name",
        env = "NOMAD_TLS_SERVER_NAME",
        value_name = "NAME"
    )]
    pub tls_server_name: Option<String>,
    /// The namespace of the pools' jobs. [default: `default`]
    #[arg(
        id = "nomad_namespace",
        long = "nomad-namespace",
        env = "NOMAD_NAMESPACE",
        value_name = "NAMESPACE"
    )]
    pub namespace: Option<String>,
    /// The region of the cluster. [default: the agent's]
    #[arg(
        id = "nomad_region",
        long = "nomad-region",
        env = "NOMAD_REGION",
        value_name = "REGION"
    )]
    pub region: Option<String>,
}

impl Settings {
    /// Checks what would only fail later.
    ///
    /// # Errors
    /// [`Error::Settings`], [`Error::Token`]
    pub(super) fn check(&self) -> Result<(), Error> {
        let address = &self.address;
        let is_http =
            Url::parse(address).is_ok_and(|url| ["http", "https"].contains(&url.scheme()));
        if !is_http {
            let words = format!("`{address}` is not an http(s) URL");
            return Err(Error::Settings(words));
        }
        let skips = std::env::var("NOMAD_SKIP_VERIFY").unwrap_or_default();
        if !["", "0", "false"].contains(&&*skips) {
            let words = "NOMAD_SKIP_VERIFY is set, but the shim always verifies: name the \
                         authority in NOMAD_CACERT";
            return Err(Error::Settings(words.into()));
        }
        // A file may get a token later.
        let has_token = self.token()?.is_some() || self.token_file.is_some();
        if is_safe_url(address) {
            return Ok(());
        }
        if has_token {
            let words = format!(
                "--nomad-addr `{address}` is another machine, so the Nomad token would cross the \
                 network in the clear: use https://"
            );
            return Err(Error::Settings(words));
        }
        tracing::warn!(address, "Nomad is asked over the network without TLS");
        Ok(())
    }

    /// The files that [`Settings::client`] reads.
    pub(super) fn files(&self) -> Vec<PathBuf> {
        let files = [&self.ca_cert, &self.client_cert, &self.client_key];
        files.into_iter().flatten().cloned().collect()
    }

    /// # Errors
    /// [`Error::Settings`]
    pub(super) fn client(&self) -> Result<Client, Error> {
        // Only the first call in a process has an effect; tests call this more than once.
        let _installed = rustls::crypto::ring::default_provider().install_default();
        let wrong = |what: &str, error: &dyn std::error::Error| {
            Error::Settings(format!("{what}: {}", crate::chain(error)))
        };
        let read = |path: &PathBuf| {
            let shown = path.display().to_string();
            fs::read(path)
                .map(Zeroizing::new)
                .map_err(|error| wrong(&shown, &error))
        };
        // The token must go only to Nomad.
        let mut client = Client::builder()
            .no_proxy()
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(ANSWER_TIMEOUT);
        if let Some(path) = &self.ca_cert {
            let trusted = Certificate::from_pem_bundle(&read(path)?);
            let trusted = trusted.map_err(|error| wrong("--nomad-ca-cert", &error))?;
            if trusted.is_empty() {
                let words = format!("`{}` contains no certificate", path.display());
                return Err(Error::Settings(words));
            }
            client = client.tls_certs_only(trusted);
        } else if Url::parse(&self.address).is_ok_and(|url| url.scheme() == "http") {
            // Otherwise there is no client on a machine without authorities (reqwest 0.13.5).
            client = client.tls_certs_only([]);
        }
        if let (Some(certificate), Some(key)) = (&self.client_cert, &self.client_key) {
            let mut both = read(certificate)?;
            both.push(b'\n');
            both.extend_from_slice(&read(key)?);
            let identity = Identity::from_pem(&both);
            client =
                client.identity(identity.map_err(|error| wrong("--nomad-client-cert", &error))?);
        }
        if let Some(name) = &self.tls_server_name {
            let url = Url::parse(&self.address).map_err(|error| wrong("--nomad-addr", &error))?;
            client = client.dns_resolver(At {
                name: name.clone(),
                host: url
                    .host_str()
                    .unwrap_or_default()
                    .trim_matches(['[', ']'])
                    .to_owned(),
            });
        }
        client.build().map_err(|error| wrong("TLS", &error))
    }

    /// Where requests go: `https://NAME:PORT`, with the name in the agent's certificate.
    pub(super) fn base(&self) -> String {
        let url = Url::parse(&self.address).ok().and_then(|mut url| {
            url.set_host(Some(self.tls_server_name.as_deref()?)).ok()?;
            Some(url.to_string())
        });
        let base = url.unwrap_or_else(|| self.address.clone());
        base.trim_end_matches('/').to_owned()
    }

    /// The token, as it is now.
    ///
    /// # Errors
    /// [`Error::Token`], [`Error::Settings`]
    pub(super) fn token(&self) -> Result<Option<HeaderValue>, Error> {
        let token = match &self.token_file {
            Some(path) => {
                let token = fs::read_to_string(path).map_err(|source| Error::Token {
                    path: path.clone(),
                    source,
                })?;
                Some(token)
            }
            None => std::env::var("NOMAD_TOKEN").ok(),
        };
        let token = token.map(Zeroizing::new);
        let Some(token) = token.as_deref().map(|token| token.trim()) else {
            return Ok(None);
        };
        if token.is_empty() {
            return Ok(None);
        }
        let value = HeaderValue::from_str(token);
        let mut value =
            value.map_err(|_| Error::Settings("the token must be one line of text".into()))?;
        value.set_sensitive(true);
        Ok(Some(value))
    }
}

/// Looks up the agent's host in place of the name in its certificate.
struct At {
    name: String,
    host: String,
}

impl Resolve for At {
    fn resolve(&self, asked: Name) -> Resolving {
        let host = match asked.as_str() == self.name {
            true => self.host.clone(),
            false => asked.as_str().to_owned(),
        };
        Box::pin(async move {
            // The port of the URL overrides this one.
            let found: Vec<SocketAddr> = tokio::net::lookup_host((host, 0)).await?.collect();
            Ok(Box::new(found.into_iter()) as Addrs)
        })
    }
}
