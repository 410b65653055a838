//! The test harness: fixtures that start the real parts of the whole system. A dropped fixture
//! removes everything that it made.

pub mod broker;
pub mod client;
pub mod cluster;
pub mod collector;
pub mod docker;
pub mod docker_proxy;
pub mod engine;
pub mod fake_node;
pub mod fake_nomad;
pub mod folder;
pub mod host;
pub mod job;
pub mod namespace;
pub mod nomad;
pub mod postgres;
pub mod process;
pub mod prometheus;
pub mod shim;
pub mod tls;

use std::{
    fs::File,
    path::PathBuf,
    sync::Mutex,
    time::{Duration, Instant},
};

/// The one way to wait: polls `check` until `check` returns a value. After `limit` the test fails
/// with the last error of `check`.
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
        .expect("the crate is in the repository")
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

/// A new random key, like a user's API key. The sources contain no key.
#[must_use]
pub fn fresh_key() -> String {
    format!("test-{:032x}", rand::random::<u128>())
}

/// Ports of the loopback address for the servers of this test, reserved until its process ends.
/// Outgoing connections have other ports (Linux takes 32768 and above), and so have tasks of
/// Nomad (20000 to 32000). A locked file for each port keeps other tests away.
///
/// # Panics
/// If no port is free.
#[must_use]
pub fn free_ports<const N: usize>() -> [u16; N] {
    static HELD: Mutex<Vec<File>> = Mutex::new(Vec::new());
    const FIRST: u16 = 32_001;
    const COUNT: u16 = 32_768 - FIRST;
    let folder = std::env::temp_dir().join("pdports");
    std::fs::create_dir_all(&folder).expect("a folder can be made");
    let start = rand::random_range(0..COUNT);
    let mut ports = (0..COUNT).map(|next| FIRST + (start + next) % COUNT);
    let mut held = HELD.lock().expect("nobody panics while holding the lock");
    [(); N].map(|()| {
        let port = ports.find(|port| {
            let lock = File::create(folder.join(port.to_string())).expect("a file can be made");
            let is_ours = lock.try_lock().is_ok();
            held.extend(is_ours.then_some(lock));
            is_ours && std::net::TcpListener::bind(("127.0.0.1", *port)).is_ok()
        });
        port.expect("a port is free")
    })
}
