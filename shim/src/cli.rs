//! The command line: one binary, a file a command.

mod certs;
mod config;
mod credentials;
mod dev;
mod files;
mod manual;
mod pool;
mod run;
mod runs;
mod serve;
mod status;
mod stream;
mod terminal;

use std::{
    io::{IsTerminal, Write},
    path::PathBuf,
    process::ExitCode,
    time::{Duration, SystemTime},
};

use anyhow::Context;
use clap::{Parser, Subcommand, ValueEnum};
use nix::sys::{
    prctl,
    resource::{Resource, getrlimit, setrlimit},
};
use polydev_client::{Calls, Identity, Token};
use polydev_proto::{
    address::{Address, DEFAULT, Listener},
    tls::{Callers, Files, Trust},
};
use prost_types::Timestamp;
use sd_notify::NotifyState;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tracing_subscriber::EnvFilter;
use zeroize::Zeroizing;

use crate::{access::Access, credentials::store, token};

/// Runs users' commands in warm, isolated containers.
#[derive(Parser)]
#[command(name = "polydev-shim", version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve callers over gRPC, with the slots of a Nomad cluster.
    Serve(serve::Arguments),
    /// Serve callers with this machine's Docker alone, without Nomad: for trying out.
    Dev(dev::Arguments),
    /// Run one command or prompt and stream it; exits with the command's status.
    Run(run::Arguments),
    /// Look at runs, go on with their streams, end them.
    #[command(subcommand)]
    Runs(runs::Command),
    /// Look at the warm pools, and size them.
    #[command(subcommand)]
    Pool(pool::Command),
    /// Keep users' credentials, sealed, in the shim's store.
    #[command(subcommand)]
    Credentials(credentials::Command),
    /// Look at the nodes: their drivers, what they have and how much of it is used.
    Status(Options),
    /// Check the configuration of `serve`.
    #[command(subcommand)]
    Config(config::Command),
    /// Make certificates for trying out.
    #[command(subcommand)]
    Certs(certs::Command),
    /// Print the completions of a shell, to be sourced by it.
    Completions { shell: clap_complete::Shell },
    /// Write the manual pages, one for each command.
    Man {
        /// Folder for the pages; made if it is not there.
        folder: PathBuf,
    },
}

/// How results are printed.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people.
    #[value(alias = "table")]
    Text,
    /// One JSON object a line.
    Json,
}

/// The shim that a client command talks to.
#[derive(clap::Args)]
struct Client {
    /// Where the shim listens: unix:///PATH, http://127.0.0.1:PORT or https://HOST:PORT.
    #[arg(long, env = "POLYDEV_ADDRESS", default_value = DEFAULT)]
    address: Address,
    #[command(flatten)]
    tls: Tls,
}

/// How a caller shows who he is.
#[derive(clap::Args)]
struct Tls {
    /// The caller's certificate, in PEM, where the address begins with https.
    #[arg(long, env = "POLYDEV_TLS_CERT", value_name = "FILE", requires_all = ["tls_key", "tls_ca"])]
    tls_cert: Option<PathBuf>,
    /// The key of it.
    #[arg(
        long,
        env = "POLYDEV_TLS_KEY",
        value_name = "FILE",
        requires = "tls_cert"
    )]
    tls_key: Option<PathBuf>,
    /// Certificates of the authorities that speak for the shim.
    #[arg(long, env = "POLYDEV_TLS_CA", value_name = "FILE")]
    tls_ca: Option<PathBuf>,
    /// File with a token that says who the caller is, of the issuer that the shim trusts.
    #[arg(long, env = "POLYDEV_TOKEN_FILE", value_name = "FILE")]
    token_file: Option<PathBuf>,
}

impl Tls {
    fn identity(&self) -> Identity {
        let mutual = files(&self.tls_cert, &self.tls_key, &self.tls_ca).map(Trust::Mutual);
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

fn files(
    certificate: &Option<PathBuf>,
    key: &Option<PathBuf>,
    authority: &Option<PathBuf>,
) -> Option<Files> {
    Some(Files {
        certificate: certificate.clone()?,
        key: key.clone()?,
        authority: authority.clone()?,
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

/// Where a shim listens, and for whom.
#[derive(clap::Args)]
struct Listen {
    /// Where to listen: unix:///PATH, http://127.0.0.1:PORT, or https://ADDRESS:PORT for
    /// callers with a certificate or a token; may be repeated.
    #[arg(long, env = "POLYDEV_LISTEN", default_value = DEFAULT, value_delimiter = ',')]
    listen: Vec<Address>,
    /// The shim's certificate, in PEM; for https.
    #[arg(long, env = "POLYDEV_LISTEN_TLS_CERT", value_name = "FILE", requires_all = ["tls_key", "tls_ca"])]
    tls_cert: Option<PathBuf>,
    /// The key of it.
    #[arg(
        long,
        env = "POLYDEV_LISTEN_TLS_KEY",
        value_name = "FILE",
        requires = "tls_cert"
    )]
    tls_key: Option<PathBuf>,
    /// Certificates of the authorities that speak for callers.
    #[arg(
        long,
        env = "POLYDEV_LISTEN_TLS_CA",
        value_name = "FILE",
        requires = "tls_cert"
    )]
    tls_ca: Option<PathBuf>,
    /// File of roles: who may do what; with it every user of the machine may connect to the
    /// unix socket, and is known by his uid. Without it whoever can connect may do everything,
    /// and nobody can from elsewhere.
    #[arg(long, env = "POLYDEV_ROLES", value_name = "FILE")]
    roles: Option<PathBuf>,
    #[command(flatten)]
    tokens: token::Settings,
}

impl Listen {
    fn tokens(&self) -> anyhow::Result<Option<token::Tokens>> {
        Ok(token::Tokens::new(&self.tokens)?)
    }

    fn access(&self) -> anyhow::Result<Access> {
        match &self.roles {
            Some(path) => Ok(Access::load(path)?),
            None => match self.listen.iter().find(|address| address.is_public()) {
                Some(address) => anyhow::bail!(
                    "{address} lets in callers from elsewhere: --roles must say what they may do"
                ),
                None => Ok(Access::everything()),
            },
        }
    }

    fn files(&self) -> Option<Files> {
        files(&self.tls_cert, &self.tls_key, &self.tls_ca)
    }

    /// Whether there is what its addresses need.
    fn check(&self) -> anyhow::Result<()> {
        let public = self.listen.iter().find(|address| address.is_public());
        match public.filter(|_| self.files().is_none()) {
            Some(address) => anyhow::bail!("{address} needs --tls-cert, --tls-key and --tls-ca"),
            None => Ok(()),
        }
    }

    async fn bind(&self, tokens: Option<&token::Tokens>) -> anyhow::Result<Vec<Listener>> {
        let files = self.files();
        // Roles say what each may do.
        let mode = if self.roles.is_some() { 0o666 } else { 0o600 };
        let callers = match tokens {
            Some(_) => Callers::Any,
            None => Callers::Certified,
        };
        let mut listeners = Vec::new();
        for address in &self.listen {
            let listener = address.listen(files.as_ref(), callers, mode).await;
            listeners.push(listener.with_context(|| format!("cannot listen at {address}"))?);
        }
        Ok(listeners)
    }

    /// All addresses, for people.
    fn shown(&self) -> String {
        let addresses: Vec<_> = self.listen.iter().map(ToString::to_string).collect();
        addresses.join(", ")
    }
}

/// What every command has that asks a shim and prints the answer.
#[derive(clap::Args)]
struct Options {
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

/// For an answer that is not a stream.
const ANSWER: Duration = Duration::from_secs(10);

/// An answer that is no stream, or why there is none.
async fn answer<T>(
    call: impl Future<Output = Result<tonic::Response<T>, Status>>,
) -> anyhow::Result<T> {
    let answered = tokio::time::timeout(ANSWER, call).await;
    let answered = answered.with_context(|| {
        let seconds = ANSWER.as_secs();
        format!("the shim did not answer within {seconds} s")
    })?;
    Ok(answered.map_err(told)?.into_inner())
}

/// The shim's words.
fn told(status: Status) -> anyhow::Error {
    anyhow::anyhow!("{}", status.message())
}

fn print(text: &str) -> std::io::Result<()> {
    let mut stdout = std::io::stdout();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

/// How long ago it was, to the second; two clocks may differ.
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

/// The Nomad cluster that a command works with.
#[derive(clap::Args)]
struct Nomad {
    /// A Nomad agent.
    #[arg(
        id = "nomad_addr",
        long = "nomad-addr",
        env = "NOMAD_ADDR",
        default_value = "http://127.0.0.1:4646"
    )]
    address: String,
    /// File with Nomad's token; the variable NOMAD_TOKEN is read without it.
    #[arg(
        id = "nomad_token_file",
        long = "nomad-token-file",
        value_name = "FILE"
    )]
    token_file: Option<PathBuf>,
}

impl Nomad {
    /// Connects to nobody yet.
    fn connect(&self) -> anyhow::Result<crate::nomad::Nomad> {
        let token =
            match &self.token_file {
                Some(path) => Some(std::fs::read_to_string(path).with_context(|| {
                    format!("cannot read --nomad-token-file `{}`", path.display())
                })?),
                None => std::env::var("NOMAD_TOKEN")
                    .ok()
                    .filter(|token| !token.is_empty()),
            };
        let token = token.map(|token| Zeroizing::new(token.trim().to_owned()));
        Ok(crate::nomad::Nomad::new(&self.address, token)?)
    }
}

/// How a shim comes by credentials that are not given in the clear.
#[derive(clap::Args)]
struct Vault {
    /// File with master keys, 64 hexadecimal digits a line: the first seals records, all open
    /// them. [default: systemd's credential polydev-master-keys, or ENCRYPTION_MASTER_KEY]
    #[arg(long, env = "POLYDEV_MASTER_KEY_FILE", value_name = "FILE")]
    master_key_file: Option<PathBuf>,
    /// Where sealed credentials are kept: postgres://USER@HOST/DATABASE (its password in
    /// PGPASSWORD or PGPASSFILE) or sqlite:///PATH. [default: nowhere]
    #[arg(
        long,
        env = "POLYDEV_CREDENTIAL_STORE",
        value_name = "URL",
        hide_env_values = true
    )]
    credential_store: Option<String>,
}

impl Vault {
    fn open(&self) -> anyhow::Result<crate::credentials::Vault> {
        // Not for clap to parse: it quotes what it refuses.
        let store = self.credential_store.as_deref().map(str::parse);
        let store: Option<store::Address> = store.transpose().context("--credential-store")?;
        let keys = self.master_key_file.as_deref();
        let vault = crate::credentials::Vault::open(keys, store.as_ref())?;
        if let Some(store) = store {
            tracing::info!(%store, "credentials are kept");
        }
        Ok(vault)
    }
}

/// Our own failures, as `docker run` has them; 126 and 127 are the command's.
const FAILED: u8 = 125;

/// Reads the arguments and does what they say.
#[must_use]
pub fn main() -> ExitCode {
    let Arguments { command } = config::parse();
    let serves = matches!(command, Command::Serve(_) | Command::Dev(_));
    let filter = EnvFilter::try_from_env("POLYDEV_LOG")
        .unwrap_or_else(|_| EnvFilter::new(if serves { "info" } else { "warn" }));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();

    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("polydev-shim: cannot start: {error}");
            return ExitCode::from(FAILED);
        }
    };
    let executed = runtime.block_on(execute(command));
    // A read of stdin cannot be cancelled, and must not keep the process.
    runtime.shutdown_background();
    match executed {
        Ok(code) => code,
        Err(error) => {
            eprintln!("polydev-shim: {error:#}");
            ExitCode::from(FAILED)
        }
    }
}

async fn execute(command: Command) -> anyhow::Result<ExitCode> {
    // Credentials pass through: no core dump, and no other process may look inside.
    prctl::set_dumpable(false)?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    // A connection for each node and each caller: the default of 1,024 is for old programs.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    match command {
        Command::Serve(arguments) => serve::execute(arguments).await,
        Command::Dev(arguments) => dev::execute(arguments).await,
        Command::Run(arguments) => run::execute(arguments).await,
        Command::Runs(command) => runs::execute(command).await,
        Command::Pool(command) => pool::execute(command).await,
        Command::Credentials(command) => credentials::execute(command).await,
        Command::Status(options) => status::execute(options).await,
        Command::Config(command) => config::execute(command),
        Command::Certs(command) => certs::execute(command),
        Command::Completions { shell } => manual::completions(shell),
        Command::Man { folder } => manual::pages(&folder),
    }
}

/// Tells systemd, if it started this.
fn tell_systemd(state: NotifyState) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::warn!(%error, "cannot tell systemd");
    }
}

/// Cancelled by SIGTERM or SIGINT.
fn stop_signal() -> anyhow::Result<CancellationToken> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut interrupt, mut terminate) = (
        signal(SignalKind::interrupt())?,
        signal(SignalKind::terminate())?,
    );
    let stop = CancellationToken::new();
    let cancel = stop.clone();
    // Ends with the process.
    tokio::spawn(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        tell_systemd(NotifyState::Stopping);
        cancel.cancel();
    });
    Ok(stop)
}
