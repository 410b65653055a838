//! Where the runs' output is kept: a tmpfs of the driver, which is in memory and on no
//! disk, and outlives this process.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rustix::fs::statvfs;

/// The part of the node's memory that it may use.
const OPTIONS: &str = "size=25%,mode=0700";
/// Space to leave for the output of another run, which rarely fills three windows.
const MIN_ROOM: u64 = 16 << 20;

/// The mounted folder.
#[derive(Debug)]
pub(super) struct Memory {
    path: PathBuf,
}

impl Memory {
    /// Mounts the folder in the state folder, unless an earlier life of the driver did.
    pub(super) fn mount(state_dir: &Path) -> io::Result<Self> {
        let path = state_dir.join("output");
        fs::create_dir_all(&path)?;
        if path.metadata()?.dev() == state_dir.metadata()?.dev() {
            let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
            let kind = Some("tmpfs");
            let mount = |options: &str| mount(kind, &path, kind, flags, Some(options));
            // Linux supports `noswap` since 6.4.
            mount(&format!("{OPTIONS},noswap")).or_else(|_| mount(OPTIONS))?;
        }
        Ok(Self { path })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether there is room for the output of another run.
    pub(super) fn has_room(&self) -> bool {
        statvfs(&self.path).is_ok_and(|space| space.f_bavail * space.f_frsize >= MIN_ROOM)
    }

    /// Unmounts the folder, and discards its content.
    pub(super) fn unmount(&self) {
        if let Err(error) = umount2(&self.path, MntFlags::MNT_DETACH) {
            tracing::debug!(%error, "cannot unmount the output's memory");
        }
    }
}
