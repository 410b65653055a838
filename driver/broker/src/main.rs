//! `polydev-broker`: started by the driver, with a listening unix socket as its standard input
//! and the memory for its key as its standard output.

use std::{
    io,
    os::{fd::AsFd, unix::net::UnixListener},
    sync::Arc,
};

use anyhow::{Context, ensure};
use clap::Parser;
use nix::{
    sys::{
        prctl,
        resource::{Resource, getrlimit, setrlimit},
    },
    unistd::{Gid, Uid, setgid, setgroups, setuid},
};
use polydev_broker::{broker::Broker, control, seed::Seed, upstream::Upstreams};
use rustls::RootCertStore;
use tracing_subscriber::EnvFilter;
use zeroizing_alloc::ZeroAlloc;

/// A tracing filter, from the driver.
const LOG: &str = "POLYDEV_LOG";

/// A key may be in any buffer of a request: what is freed is wiped.
#[global_allocator]
static ALLOCATOR: ZeroAlloc<std::alloc::System> = ZeroAlloc(std::alloc::System);

/// Passes the model requests of a node's containers to the providers, with the users' keys.
/// nomad-driver-polydev starts it; it does nothing useful when started by hand.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Run as this user, who owns no file and runs nothing else.
    #[arg(long)]
    uid: u32,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    give_up_rights(args.uid)?;
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::try_from_env(LOG).unwrap_or_else(|_| "info".into()))
        .with_writer(io::stderr)
        .with_ansi(false)
        .without_time() // The driver, which logs the lines, has one.
        // Without its driver, nobody reads them: that must not end anything.
        .log_internal_errors(false)
        .init();
    // A stream has two descriptors.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).context("cannot tell the limits")?;
    setrlimit(Resource::RLIMIT_NOFILE, most, most).context("cannot raise the limit of files")?;
    // One thread: a request wakes several tasks, and waking another thread costs more than the
    // rest of the request. Without TLS it moves a gigabyte a second.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start")?;
    runtime.block_on(serve())
}

/// Before there is a key in memory: no dumps, no other user's files, and no way back.
fn give_up_rights(uid: u32) -> anyhow::Result<()> {
    ensure!(uid != 0, "`--uid` is 0; must be a user other than root");
    setrlimit(Resource::RLIMIT_CORE, 0, 0).context("cannot turn core dumps off")?;
    if Uid::effective().is_root() {
        setgroups(&[]).context("cannot leave the groups")?;
        setgid(Gid::from_raw(uid)).context("cannot change the group")?;
        setuid(Uid::from_raw(uid)).context("cannot change the user")?;
    }
    ensure!(!Uid::effective().is_root(), "still root");
    prctl::set_no_new_privs().context("cannot give up new privileges")?;
    // A change of the user would turn it off again.
    prctl::set_dumpable(false).context("cannot hide the memory")
}

async fn serve() -> anyhow::Result<()> {
    let socket = io::stdin().as_fd().try_clone_to_owned();
    let socket = UnixListener::from(socket.context("there is no socket at standard input")?);
    socket.set_nonblocking(true)?;
    let listener = tokio::net::UnixListener::from_std(socket)
        .context("standard input is not a listening socket")?;
    let mut roots = RootCertStore::empty();
    let found = rustls_native_certs::load_native_certs();
    for error in &found.errors {
        tracing::warn!(%error, "cannot read a certificate of an authority");
    }
    roots.add_parsable_certificates(found.certs);
    let memory = io::stdout().as_fd().try_clone_to_owned();
    let memory = memory.context("there is no memory for the key at standard output")?;
    let seed = Seed::new(memory.into()).context("standard output is no memory for the key")?;
    let broker = Broker::new(seed.key()?, Upstreams::new(roots)?);
    control::serve(listener, Arc::new(broker), seed).await;
    Ok(())
}
