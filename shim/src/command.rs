//! The command line: one binary, one file per command. Callers' commands are in the crate
//! polydev-cli.

mod audit;
mod certs;
mod config;
mod credentials;
mod dev;
mod ledger;
mod manual;
mod policy;
mod pool;
mod serve;
mod telemetry;

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context;
use clap::{Parser, Subcommand};
use nix::sys::{
    prctl,
    resource::{Resource, getrlimit, setrlimit},
};
use polydev_cli::{
    FAILED, Options, approvals, egress, images, run, runs, script, status, tls_files,
};
use polydev_shim::{access::Access, audit::Audit, credentials::store, token};
use polydev_transport::{
    address::{Address, DEFAULT, Listener},
    tls::{Callers, Files},
};
use sd_notify::NotifyState;
use telemetry::Telemetry;
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

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
    /// Serve callers with the Docker of this machine, without Nomad; for trials.
    Dev(dev::Arguments),
    /// Run one command or prompt and stream its output; exits with the command's status.
    Run(run::Arguments),
    /// Run a script in Python to its end, and fetch what it leaves; exits with its status.
    Script(script::Arguments),
    /// List and watch runs, attach to their streams, cancel them.
    #[command(subcommand)]
    Runs(runs::Command),
    /// Show what runs have connected to, and what they were not allowed to.
    #[command(subcommand)]
    Egress(egress::Command),
    /// See what waits for somebody's approval, and approve or deny it.
    #[command(subcommand)]
    Approvals(approvals::Command),
    /// Show the warm pools, and set their sizes.
    #[command(subcommand)]
    Pool(pool::Command),
    /// List the images on the disks of nodes, and remove those that nothing uses.
    #[command(subcommand)]
    Images(images::Command),
    /// Manage users' credentials, which the shim's store keeps sealed.
    #[command(subcommand)]
    Credentials(credentials::Command),
    /// Show the nodes: their drivers, their resources and how much of the resources is used.
    Status(Options),
    /// Check and export the audit log of `serve`.
    #[command(subcommand)]
    Audit(audit::Command),
    /// Export what a policy has decided as signed statements, and check them.
    #[command(subcommand)]
    Ledger(ledger::Command),
    /// Check and try out the rules of `serve --policy`.
    #[command(subcommand)]
    Policy(policy::Command),
    /// Check the configuration of `serve`.
    #[command(subcommand)]
    Config(config::Command),
    /// Make certificates for trials.
    #[command(subcommand)]
    Certs(certs::Command),
    /// Print a completion script, which the shell must source.
    Completions { shell: clap_complete::Shell },
    /// Write the manual pages, one per command.
    Man {
        /// Folder for the pages; created if missing.
        folder: PathBuf,
    },
}

/// Where a shim listens, and who may call it.
#[derive(clap::Args)]
struct Listen {
    /// Where to listen: unix:///PATH, http://127.0.0.1:PORT, or https://ADDRESS:PORT for
    /// callers with a certificate or a token; may be repeated.
    #[arg(long, env = "POLYDEV_LISTEN", default_value = DEFAULT, value_delimiter = ',')]
    listen: Vec<Address>,
    /// The shim's certificate, in PEM; for https.
    #[arg(long, env = "POLYDEV_LISTEN_TLS_CERT", value_name = "FILE", requires_all = ["tls_key", "tls_ca"])]
    tls_cert: Option<PathBuf>,
    /// The private key of --tls-cert, in PEM.
    #[arg(
        long,
        env = "POLYDEV_LISTEN_TLS_KEY",
        value_name = "FILE",
        requires = "tls_cert"
    )]
    tls_key: Option<PathBuf>,
    /// Certificates of the authorities that sign callers' certificates, in PEM.
    #[arg(
        long,
        env = "POLYDEV_LISTEN_TLS_CA",
        value_name = "FILE",
        requires = "tls_cert"
    )]
    tls_ca: Option<PathBuf>,
    /// Lists of certificates that the authorities of --tls-ca have taken back, in PEM: each
    /// authority must have one that is not out of date. [default: none is taken back]
    #[arg(
        long,
        env = "POLYDEV_LISTEN_TLS_CRL",
        value_name = "FILE",
        requires = "tls_cert"
    )]
    tls_crl: Option<PathBuf>,
    /// File of roles, which say who may do what. With roles, every user of the machine may
    /// connect to the unix socket and is known by the user's uid. Without roles, every caller who
    /// can connect may do everything, and https addresses are refused.
    #[arg(long, env = "POLYDEV_ROLES", value_name = "FILE")]
    roles: Option<PathBuf>,
    #[command(flatten)]
    tokens: token::Settings,
    /// Folder for an audit log: who did what with whose run, and who was denied what. What cannot
    /// be recorded is not done. [default: records are only in the ordinary log]
    #[arg(
        long,
        env = "POLYDEV_AUDIT_LOG",
        value_name = "FOLDER",
        requires = "audit_key_file"
    )]
    audit_log: Option<PathBuf>,
    /// File with 64 hexadecimal digits, the key of the audit log. Whoever has the key can check
    /// that nothing was changed.
    #[arg(
        long,
        env = "POLYDEV_AUDIT_KEY_FILE",
        value_name = "FILE",
        requires = "audit_log"
    )]
    audit_key_file: Option<PathBuf>,
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
                    "--listen `{address}` accepts remote callers: --roles must say what they may do"
                ),
                None => Ok(Access::everything()),
            },
        }
    }

    fn audit(&self) -> anyhow::Result<Audit> {
        match (&self.audit_log, &self.audit_key_file) {
            (Some(folder), Some(key)) => Ok(Audit::open(folder, key)?),
            // clap has seen that there are both or none.
            _ => Ok(Audit::default()),
        }
    }

    fn files(&self) -> Option<Files> {
        let files = tls_files(&self.tls_cert, &self.tls_key, &self.tls_ca)?;
        Some(Files {
            revoked: self.tls_crl.clone(),
            ..files
        })
    }

    /// Checks that the files are given that the addresses require.
    fn check(&self) -> anyhow::Result<()> {
        let public = self.listen.iter().find(|address| address.is_public());
        match public.filter(|_| self.files().is_none()) {
            Some(address) => {
                anyhow::bail!("--listen `{address}` requires --tls-cert, --tls-key and --tls-ca")
            }
            None => Ok(()),
        }
    }

    async fn bind(&self, tokens: Option<&token::Tokens>) -> anyhow::Result<Vec<Listener>> {
        let files = self.files();
        // With roles, every local user may connect: the roles say what each user may do.
        let mode = if self.roles.is_some() { 0o666 } else { 0o600 };
        let callers = match tokens {
            Some(_) => Callers::Any,
            None => Callers::Certified,
        };
        let mut listeners = Vec::new();
        for address in &self.listen {
            let listener = address.listen(files.as_ref(), callers, mode).await;
            listeners.push(listener.with_context(|| format!("cannot listen at `{address}`"))?);
        }
        Ok(listeners)
    }

    /// All addresses, for the log.
    fn shown(&self) -> String {
        let addresses: Vec<_> = self.listen.iter().map(ToString::to_string).collect();
        addresses.join(", ")
    }
}

/// How a shim gets credentials that calls do not contain in the clear.
#[derive(clap::Args)]
struct Vault {
    /// File with master keys, 64 hexadecimal digits per line: the first key seals records, every
    /// key opens them. [default: systemd's credential polydev-master-keys, or
    /// ENCRYPTION_MASTER_KEY]
    #[arg(long, env = "POLYDEV_MASTER_KEY_FILE", value_name = "FILE")]
    master_key_file: Option<PathBuf>,
    /// Where the shim stores sealed credentials: postgres://USER@HOST/DATABASE (with the password
    /// in PGPASSWORD or PGPASSFILE) or sqlite:///PATH. [default: none are stored]
    #[arg(
        long,
        env = "POLYDEV_CREDENTIAL_STORE",
        value_name = "URL",
        hide_env_values = true
    )]
    credential_store: Option<String>,
}

impl Vault {
    fn open(&self) -> anyhow::Result<polydev_shim::credentials::Vault> {
        // clap must not parse this: its errors quote the value, which may contain a password.
        let store = self.credential_store.as_deref().map(str::parse);
        let store: Option<store::Address> = store.transpose().context("--credential-store")?;
        let keys = self.master_key_file.as_deref();
        let vault = polydev_shim::credentials::Vault::open(keys, store.as_ref())?;
        if let Some(store) = store {
            tracing::info!(%store, "credential store configured");
        }
        Ok(vault)
    }
}

/// Parses the arguments and executes the command.
pub(super) fn main() -> ExitCode {
    let Arguments { command } = config::parse();
    let done = tokio::runtime::Runtime::new()
        .context("cannot start")
        .and_then(|runtime| within(runtime, command));
    match done {
        Ok(code) => code,
        Err(error) => {
            eprintln!("polydev-shim: {error:#}");
            ExitCode::from(FAILED)
        }
    }
}

fn within(runtime: Runtime, command: Command) -> anyhow::Result<ExitCode> {
    // Credentials pass through this process: no core dumps, and no other process may read its
    // memory.
    prctl::set_dumpable(false)?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    // Each node and each caller needs a connection. The default limit of 1,024 only exists for
    // old programs.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most)?;
    let entered = runtime.enter();
    let telemetry = match &command {
        Command::Serve(arguments) => Some(arguments.telemetry()?),
        Command::Dev(arguments) => Some(arguments.telemetry()?),
        _ => None,
    };
    telemetry::log(telemetry.as_ref());
    drop(entered);
    let executed = runtime.block_on(execute(command, telemetry.as_ref()));
    if let Some(telemetry) = telemetry {
        telemetry.finish();
    }
    // A pending read of stdin cannot be cancelled, and must not keep the process alive.
    runtime.shutdown_background();
    executed
}

async fn execute(command: Command, telemetry: Option<&Telemetry>) -> anyhow::Result<ExitCode> {
    match command {
        Command::Serve(arguments) => serve::execute(arguments, opened(telemetry)).await,
        Command::Dev(arguments) => dev::execute(arguments, opened(telemetry)).await,
        Command::Run(arguments) => run::execute(arguments).await,
        Command::Script(arguments) => script::execute(arguments).await,
        Command::Runs(command) => runs::execute(command).await,
        Command::Egress(command) => egress::execute(command).await,
        Command::Approvals(command) => approvals::execute(command).await,
        Command::Pool(command) => pool::execute(command).await,
        Command::Images(command) => images::execute(command).await,
        Command::Credentials(command) => credentials::execute(command).await,
        Command::Status(options) => status::execute(options).await,
        Command::Audit(command) => audit::execute(&command),
        Command::Ledger(command) => ledger::execute(&command),
        Command::Policy(command) => policy::execute(&command),
        Command::Config(command) => config::execute(command),
        Command::Certs(command) => certs::execute(command),
        Command::Completions { shell } => manual::completions(shell),
        Command::Man { folder } => manual::pages(&folder),
    }
}

/// The telemetry of a command that serves.
fn opened(telemetry: Option<&Telemetry>) -> &Telemetry {
    telemetry.expect("it is opened for the commands that serve")
}

/// Notifies systemd, if systemd started this process.
fn tell_systemd(state: NotifyState) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::warn!(%error, "cannot notify systemd");
    }
}

/// A token that SIGTERM or SIGINT cancels.
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
