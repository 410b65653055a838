//! Finds brokers.

use std::path::Path;

use nix::unistd::Pid;
use procfs::process::{FDTarget, Process, all_processes};

/// The processes of the brokers whose sockets are below a folder, such as the state folder of a
/// driver.
///
/// # Panics
/// If processes cannot be listed.
#[must_use]
pub fn brokers(folder: &Path) -> Vec<Pid> {
    let all = all_processes().expect("processes can be listed").flatten();
    let ours = all.filter(|process| is_broker(process) && is_below(process, folder) == Some(true));
    ours.map(|process| Pid::from_raw(process.pid)).collect()
}

fn is_broker(process: &Process) -> bool {
    let program = process.exe().unwrap_or_default();
    program
        .file_name()
        .is_some_and(|name| name.to_string_lossy().starts_with("polydev-broker"))
}

/// A broker's standard input is its socket. `None` for a process that has ended.
fn is_below(process: &Process, folder: &Path) -> Option<bool> {
    let FDTarget::Socket(inode) = process.fd_from_fd(0).ok()?.target else {
        return Some(false);
    };
    let sockets = process.unix().ok()?;
    let socket = sockets.into_iter().find(|socket| socket.inode == inode)?;
    Some(socket.path?.starts_with(folder))
}
