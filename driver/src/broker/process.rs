//! The broker's process. It outlives this one, because its streams must: the next life of the
//! driver connects to it at a path.

use std::{
    env, fs,
    io::{self, BufRead, BufReader, ErrorKind},
    os::{fd::OwnedFd, unix::process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use rustix::fs::{MemfdFlags, memfd_create};
use tokio::{
    net::{UnixListener, UnixStream},
    time::{error::Elapsed, timeout},
};

/// The filter of this program's log, which is the broker's too.
const LOG: &str = "POLYDEV_LOG";
/// A broker answers a new connection within moments.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Why there is no connection to a broker.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("cannot listen at `{path}` for the broker")]
    Listen { path: PathBuf, source: io::Error },
    #[error("cannot make memory for the key of the broker")]
    Memory(#[source] io::Error),
    #[error("cannot start `{program}`")]
    Start { program: PathBuf, source: io::Error },
    #[error("cannot connect to the broker")]
    Connect(#[source] io::Error),
    #[error("the broker accepts no connection")]
    Silent(#[from] Elapsed),
}

/// Connects to the broker of the state folder, and starts one if there is none. `seed` is the
/// memory with the seed of the last one's key.
pub(super) async fn connect(
    program: &Path,
    state_dir: &Path,
    uid: u32,
    seed: Option<OwnedFd>,
) -> Result<UnixStream, Error> {
    let path = state_dir.join("broker.sock");
    match timeout(CONNECT_TIMEOUT, UnixStream::connect(&path)).await? {
        Ok(stream) => return Ok(stream),
        // Nobody listens there.
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::NotFound | ErrorKind::ConnectionRefused
            ) => {}
        Err(error) => return Err(Error::Connect(error)),
    }
    let seed = match seed {
        Some(seed) => seed,
        None => memfd_create("polydev-broker-seed", MemfdFlags::CLOEXEC)
            .map_err(|error| Error::Memory(error.into()))?,
    };
    start(program, &path, uid, seed)?;
    let connected = timeout(CONNECT_TIMEOUT, UnixStream::connect(&path)).await?;
    connected.map_err(Error::Connect)
}

fn start(program: &Path, path: &Path, uid: u32, seed: OwnedFd) -> Result<(), Error> {
    let listen = |source| Error::Listen {
        path: path.to_owned(),
        source,
    };
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(listen(error)),
        _ => {}
    }
    // Root's folder: nobody else can connect.
    let socket = UnixListener::bind(path)
        .and_then(UnixListener::into_std)
        .map_err(listen)?;
    let started = Command::new(program)
        .arg(format!("--uid={uid}"))
        .stdin(Stdio::from(OwnedFd::from(socket)))
        .stdout(Stdio::from(seed))
        // Not this process's own: while a child holds it, go-plugin takes a dead plugin for alive
        // (findings/go-plugin-exited.sh).
        .stderr(Stdio::piped())
        .env_clear()
        .envs(env::var_os(LOG).map(|filter| (LOG, filter)))
        .current_dir("/")
        .process_group(0)
        .spawn();
    let child = started.map_err(|source| Error::Start {
        program: program.to_owned(),
        source,
    })?;
    std::thread::spawn(move || follow(child));
    Ok(())
}

/// Passes on what the broker logs, until it ends.
fn follow(mut child: Child) {
    let lines = child.stderr.take().map(BufReader::new);
    for line in lines
        .into_iter()
        .flat_map(BufRead::lines)
        .map_while(Result::ok)
    {
        match line.trim_start().split_once(' ') {
            Some(("ERROR", words)) => tracing::error!("broker: {words}"),
            Some(("WARN", words)) => tracing::warn!("broker: {words}"),
            Some(("INFO", words)) => tracing::info!("broker: {words}"),
            Some(("DEBUG" | "TRACE", words)) => tracing::debug!("broker: {words}"),
            // A panic, and where it happened.
            _ => tracing::error!("broker: {line}"),
        }
    }
    match child.wait() {
        Ok(status) => tracing::warn!(%status, "the broker ended"),
        Err(error) => tracing::warn!(%error, "cannot wait for the broker"),
    }
}
