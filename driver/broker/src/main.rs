//! `polydev-broker`: started by the driver, with a listening unix socket as its standard input.

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
        resource::{Resource, setrlimit},
    },
    unistd::{Gid, Uid, setgid, setgroups, setuid},
};
use polydev_broker::{broker::Broker, control, upstream::Upstreams};
use rustls::RootCertStore;
use tracing_subscriber::EnvFilter;
use zeroizing_alloc::ZeroAlloc;

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
        .with_env_filter(EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into()))
        .with_writer(io::stderr)
        .init();
    let runtime = tokio::runtime::Builder::new_multi_thread()
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
    let (broker, told) = Broker::new(Upstreams::new(roots)?);
    control::serve(listener, Arc::new(broker), told).await?;
    Ok(())
}
