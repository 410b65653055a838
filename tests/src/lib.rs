//! The harness: what it takes to show the whole system to itself, with the real
//! parts. Every fixture takes away what it made when it is dropped.

pub mod client;
pub mod cluster;
pub mod collector;
pub mod docker;
pub mod docker_proxy;
pub mod engine;
pub mod folder;
pub mod host;
pub mod job;
pub mod namespace;
pub mod nomad;
pub mod postgres;
pub mod process;
pub mod shim;
pub mod tls;

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

/// The one way to wait: polls `check` until it answers, and otherwise fails with the
/// last thing it said.
///
/// # Panics
/// After `limit`.
#[track_caller]
pub fn wait_until<T>(
    what: &str,
    limit: Duration,
    mut check: impl FnMut() -> Result<T, String>,
) -> T {
    let start = Instant::now();
    loop {
        match check() {
            Ok(value) => return value,
            Err(last) if start.elapsed() > limit => panic!("{what}: not within {limit:?}: {last}"),
            Err(_) => std::thread::park_timeout(Duration::from_millis(50)),
        }
    }
}

/// The repository.
#[must_use]
pub fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("..")
        .canonicalize()
        .expect("the crate is in it")
}

/// A program of this build, such as `polydev-shim`: beside the running one, or in the
/// folder that `POLYDEV_BIN` names.
#[must_use]
pub fn program(name: &str) -> PathBuf {
    if let Some(folder) = std::env::var_os("POLYDEV_BIN") {
        return PathBuf::from(folder).join(name);
    }
    let me = std::env::current_exe().expect("a process has a program");
    let folder = me.parent().expect("a program is in a folder");
    let folder = if folder.ends_with("deps") {
        folder.join("..")
    } else {
        folder.to_owned()
    };
    folder.join(name)
}

/// A key such as a user has, made now: none is written anywhere.
#[must_use]
pub fn fresh_key() -> String {
    format!("test-{:032x}", rand::random::<u128>())
}

/// Ports of the loopback address that are free now, and are to be taken at once.
///
/// # Panics
/// If there are none.
#[must_use]
pub fn free_ports<const N: usize>() -> [u16; N] {
    let bind = || std::net::TcpListener::bind("127.0.0.1:0").expect("a port is free");
    let listeners = [(); N].map(|()| bind());
    listeners.map(|listener| listener.local_addr().expect("it is bound").port())
}
