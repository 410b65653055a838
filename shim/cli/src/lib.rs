//! The commands of `polydev-shim` for callers. Each calls a shim and prints the answer. The
//! package polydev-shim has the commands that serve, and those that need parts of the shim.

pub mod approvals;
mod conversation;
pub mod credentials;
pub mod egress;
pub mod images;
pub mod pool;
pub mod run;
pub mod runs;
pub mod script;
pub mod status;

mod agent;
mod files;
mod stream;
mod terminal;

use std::{
    io::Write,
    path::PathBuf,
    time::{Duration, SystemTime},
};

use anyhow::Context;
use clap::ValueEnum;
use polydev_client::{Calls, Identity, Token};
use polydev_transport::{
    address::{Address, DEFAULT},
    tls::{Files, Trust},
};
use prost_types::Timestamp;
use tonic::Status;

/// Exit status of this program's own failures, as with `docker run`. 126 and 127 come from the
/// command.
pub const FAILED: u8 = 125;

/// How results are printed.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people.
    #[value(alias = "table")]
    Text,
    /// One JSON object per line.
    Json,
}

/// The shim that a command calls.
#[derive(clap::Args)]
struct Client {
    /// Address of the shim: unix:///PATH, http://127.0.0.1:PORT or https://HOST:PORT.
    #[arg(long, env = "POLYDEV_ADDRESS", default_value = DEFAULT)]
    address: Address,
    #[command(flatten)]
    tls: Tls,
}

/// How a caller identifies itself.
#[derive(clap::Args)]
struct Tls {
    /// The caller's certificate (PEM), for an https address.
    #[arg(long, env = "POLYDEV_TLS_CERT", value_name = "FILE", requires_all = ["tls_key", "tls_ca"])]
    tls_cert: Option<PathBuf>,
    /// The private key of the caller's certificate (PEM).
    #[arg(
        long,
        env = "POLYDEV_TLS_KEY",
        value_name = "FILE",
        requires = "tls_cert"
    )]
    tls_key: Option<PathBuf>,
    /// Certificates of the authorities that sign the shim's certificate (PEM).
    #[arg(long, env = "POLYDEV_TLS_CA", value_name = "FILE")]
    tls_ca: Option<PathBuf>,
    /// File with a token that identifies the caller, from an issuer that the shim trusts.
    #[arg(long, env = "POLYDEV_TOKEN_FILE", value_name = "FILE")]
    token_file: Option<PathBuf>,
}

impl Tls {
    fn identity(&self) -> Identity {
        let mutual = tls_files(&self.tls_cert, &self.tls_key, &self.tls_ca).map(Trust::Mutual);
        let server = || {
            let authority = self.tls_ca.clone()?;
            Some(Trust::Server { authority })
        };
        Identity {
            tls: mutual.or_else(server),
            token: self.token_file.clone().map(Token::File),
        }
    }
}

/// The TLS files of one side; `None` unless all three are given.
#[must_use]
pub fn tls_files(
    certificate: &Option<PathBuf>,
    key: &Option<PathBuf>,
    authority: &Option<PathBuf>,
) -> Option<Files> {
    Some(Files {
        certificate: certificate.clone()?,
        key: key.clone()?,
        authority: authority.clone()?,
        revoked: None,
    })
}

impl Client {
    async fn connect(&self) -> anyhow::Result<polydev_client::Client> {
        let identity = self.tls.identity();
        let connected = polydev_client::Client::connect(&self.address, identity).await;
        connected.map_err(|error| {
            let advice = "start one with `polydev-shim serve` or `polydev-shim dev`";
            anyhow::anyhow!("{error}\n{advice}")
        })
    }
}

/// Options of every command that calls a shim and prints the answer.
#[derive(clap::Args)]
pub struct Options {
    #[command(flatten)]
    client: Client,
    /// How to print results.
    #[arg(long, value_enum, default_value = "text")]
    output: Output,
}

impl Options {
    async fn connect(&self) -> anyhow::Result<Calls> {
        Ok(self.client.connect().await?.calls())
    }
}

/// How long a call that is not a stream may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// The answer of a call that is not a stream.
async fn answer<T>(
    call: impl Future<Output = Result<tonic::Response<T>, Status>>,
) -> anyhow::Result<T> {
    let answered = tokio::time::timeout(ANSWER_TIMEOUT, call).await;
    let answered = answered.with_context(|| {
        let seconds = ANSWER_TIMEOUT.as_secs();
        format!("the shim did not answer within {seconds} s")
    })?;
    Ok(answered.map_err(told)?.into_inner())
}

/// The shim's message as an error.
fn told(status: Status) -> anyhow::Error {
    anyhow::anyhow!("{}", status.message())
}

/// Writes to stdout and flushes it.
///
/// # Errors
/// If stdout cannot be written.
pub fn print(text: &str) -> std::io::Result<()> {
    let mut stdout = std::io::stdout();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

/// The time since `since`, for people; `-` if it is missing, or in the future because two clocks
/// differ.
fn age(since: Option<Timestamp>) -> String {
    let since = since.and_then(|since| SystemTime::try_from(since).ok());
    let age = since.and_then(|since| SystemTime::now().duration_since(since).ok());
    match age.map(|age| age.as_secs()) {
        None => "-".into(),
        Some(seconds) if seconds < 120 => format!("{seconds}s"),
        Some(seconds) if seconds < 7200 => format!("{}m", seconds / 60),
        Some(seconds) => format!("{}h", seconds / 3600),
    }
}
