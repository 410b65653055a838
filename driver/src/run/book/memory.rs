//! Where the output of runs is kept: a tmpfs of the driver's own, so in memory and on no
//! disk, which outlives this process.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use rustix::fs::statvfs;

/// How much of the node's memory it may take.
const OPTIONS: &str = "size=25%,mode=0700";
/// Left for the output of one more run, which seldom has three full windows at a time.
const MIN_ROOM: u64 = 16 << 20;

/// The mounted folder.
#[derive(Debug)]
pub(super) struct Memory {
    path: PathBuf,
}

impl Memory {
    /// Mounts it in the state folder, unless an earlier life of the driver has.
    pub(super) fn mount(state_dir: &Path) -> io::Result<Self> {
        let path = state_dir.join("output");
        fs::create_dir_all(&path)?;
        if path.metadata()?.dev() == state_dir.metadata()?.dev() {
            let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
            let kind = Some("tmpfs");
            let mount = |options: &str| mount(kind, &path, kind, flags, Some(options));
            // Linux knows `noswap` since 6.4.
            mount(&format!("{OPTIONS},noswap")).or_else(|_| mount(OPTIONS))?;
        }
        Ok(Self { path })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the output of one more run fits.
    pub(super) fn has_room(&self) -> bool {
        statvfs(&self.path).is_ok_and(|space| space.f_bavail * space.f_frsize >= MIN_ROOM)
    }

    /// Gives it back, with what is in it.
    pub(super) fn unmount(&self) {
        if let Err(error) = umount2(&self.path, MntFlags::MNT_DETACH) {
            tracing::debug!(%error, "the output's memory stays");
        }
    }
}
