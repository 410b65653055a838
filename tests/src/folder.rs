//! A temporary folder, the mounts below it, and what drivers with their state in it have made.
//! Its path is short enough for unix sockets.

use std::{
    fs,
    path::{Path, PathBuf},
};

use nix::mount::{MntFlags, umount2};
use tempfile::TempDir;

/// Dropping the folder removes it and its mounts. It ends drivers and brokers that are left in
/// it, and removes what drivers with a state folder in it have left in Docker and the packet
/// filter: a driver that is killed leaves it there, and a host kills one that needs over 2 s to
/// end.
#[derive(Debug)]
pub struct Folder(TempDir);

impl Folder {
    /// # Panics
    /// If the folder cannot be made.
    #[must_use]
    pub fn new(prefix: &str) -> Self {
        let folder = tempfile::Builder::new().prefix(prefix).tempdir_in("/tmp");
        Self(folder.expect("a folder can be made"))
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Removes all mounts below the folder.
    pub fn unmount(&self) {
        let mounts = procfs::process::Process::myself().and_then(|me| me.mountinfo());
        let mut below: Vec<PathBuf> = mounts
            .map(|mounts| mounts.0)
            .unwrap_or_default()
            .into_iter()
            .map(|mount| mount.mount_point)
            .filter(|point| point.starts_with(self.path()))
            .collect();
        below.sort();
        for point in below.iter().rev() {
            let _busy = umount2(point, MntFlags::MNT_DETACH);
        }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        crate::nomad::clean::stop_drivers(self.path());
        let inside = fs::read_dir(self.path()).into_iter().flatten().flatten();
        for state in inside {
            if let Ok(instance) = fs::read_to_string(state.path().join("instance")) {
                let instance = instance.trim();
                crate::nomad::clean::remove_from_docker(instance);
                crate::host::remove_rules(instance);
            }
        }
        self.unmount();
    }
}
