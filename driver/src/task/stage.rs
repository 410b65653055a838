//! Where the sources of a task's mounts wait for Docker. Docker takes a path and looks it up
//! when the container starts. A task of the allocation could exchange a folder for a link
//! until then, so the driver mounts what it holds at a path that no task can reach, and
//! gives Docker this path. The container has mounts of its own afterwards.
//!
//! Docker creates what it does not find. A path that is no longer, or that a dockerd without
//! the mounts of this process does not see, must be an error and not an empty folder: what is
//! here can be written to only while a task is staged.

use std::{
    collections::VecDeque,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use parking_lot::Mutex;

use super::folders::Held;
use crate::state::files;

/// A folder in the tmpfs, and a file below it, which a dockerd finds that does not see the
/// mounts of this process.
const MOUNTED: &str = "mounted";
/// Where a mount is made, before it is moved to its task's.
const MAKING: &str = "making";
/// How many tasks may start at the same time.
const MAX_STARTS: usize = 256;
const OPTIONS: &str = "size=1m,mode=0700";

/// A tmpfs of the driver, with one in it for each task that starts.
#[derive(Debug)]
pub struct Stage {
    path: PathBuf,
    free: Free,
}

/// The places that no task has, the next one first: a place is empty for as long as possible
/// before it is used again.
type Free = Arc<Mutex<VecDeque<usize>>>;

impl Stage {
    /// Mounts the folder in the state folder, after unmounting what an earlier life of the
    /// driver left there.
    ///
    /// # Errors
    /// [`files::Error::Write`]
    pub fn open(state_dir: &Path) -> Result<Self, files::Error> {
        let path = state_dir.join("stage");
        let mounted = || {
            fs::create_dir_all(&path)?;
            // It fails if nothing is left.
            while detach(&path).is_ok() {}
            File::create(path.join(MOUNTED))?;
            mount_memory(&path)?;
            (0..MAX_STARTS).try_for_each(|place| fs::create_dir_all(place_at(&path, place)))?;
            let making = path.join(MAKING);
            fs::create_dir(&making)?;
            mount_memory(&making)?;
            // A mount cannot be moved out of a shared one.
            change(&making, MsFlags::MS_PRIVATE)?;
            close(&path)
        };
        if let Err(source) = mounted() {
            return Err(files::Error::Write { path, source });
        }
        let free = Mutex::new((0..MAX_STARTS).collect()).into();
        Ok(Self { path, free })
    }

    /// Begins to stage the mounts of one task.
    ///
    /// # Errors
    /// If too many tasks are starting, or the kernel does not mount.
    pub(super) fn begin(&self) -> io::Result<Staged> {
        let place = self.free.lock().pop_front();
        let too_many = || io::Error::other(format!("{MAX_STARTS} tasks are starting"));
        let place = place.ok_or_else(too_many)?;
        let staged = Staged {
            folder: place_at(&self.path, place),
            making: self.path.join(MAKING),
            place,
            free: self.free.clone(),
        };
        mount_memory(&staged.folder)?;
        Ok(staged)
    }

    /// Unmounts the folder, when the driver leaves for good, unless a task is starting.
    pub(crate) fn leave(&self) {
        if self.free.lock().len() == MAX_STARTS {
            told(&self.path, detach(&self.path));
        }
    }
}

/// The staged mounts of one task, until its container has started.
#[derive(Debug)]
pub(super) struct Staged {
    folder: PathBuf,
    making: PathBuf,
    place: usize,
    free: Free,
}

impl Staged {
    /// Mounts what is held, and says where.
    pub(super) fn mount(&self, held: &Held) -> io::Result<PathBuf> {
        // Nobody has used this path, so a late start of another container does not find it.
        let name = format!("{:016x}", rand::random::<u64>());
        let [made, path] = [&self.making, &self.folder].map(|folder| folder.join(&name));
        let is_folder = held.is_folder()?;
        for point in [&made, &path] {
            match is_folder {
                true => fs::create_dir(point)?,
                false => drop(File::create(point)?),
            }
        }
        let none = None::<&str>;
        let bind = MsFlags::MS_BIND | MsFlags::MS_REC;
        mount(Some(&held.name()), &made, none, bind, none)?;
        // Otherwise to unmount it would also unmount what Nomad has mounted in the folder, such as
        // the task's secrets, wherever mounts are shared, as systemd makes them.
        change(&made, MsFlags::MS_SLAVE)?;
        if let Err(error) = mount(Some(&made), &path, none, MsFlags::MS_MOVE, none) {
            told(&made, umount2(&made, MntFlags::MNT_DETACH));
            return Err(error.into());
        }
        match is_folder {
            true => fs::remove_dir(made)?,
            false => fs::remove_file(made)?,
        }
        Ok(path)
    }

    /// Everything is there: from now on nothing can be created here.
    pub(super) fn close(&self) -> io::Result<()> {
        close(&self.folder)
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        told(&self.folder, umount2(&self.folder, MntFlags::MNT_DETACH));
        self.free.lock().push_back(self.place);
    }
}

fn place_at(path: &Path, place: usize) -> PathBuf {
    path.join(MOUNTED).join(place.to_string())
}

fn flags() -> MsFlags {
    MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC
}

fn mount_memory(path: &Path) -> io::Result<()> {
    let kind = Some("tmpfs");
    Ok(mount(kind, path, kind, flags(), Some(OPTIONS))?)
}

/// How this mount and those in it share what is mounted later.
fn change(path: &Path, propagation: MsFlags) -> io::Result<()> {
    let none = None::<&str>;
    Ok(mount(
        none,
        path,
        none,
        propagation | MsFlags::MS_REC,
        none,
    )?)
}

/// The file system is read-only afterwards, wherever it is mounted. This does not concern what is
/// mounted in it, and mounts can be made on its folders.
fn close(path: &Path) -> io::Result<()> {
    let flags = flags() | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    Ok(mount(
        None::<&str>,
        path,
        None::<&str>,
        flags,
        Some(OPTIONS),
    )?)
}

/// Unmounts the whole stage.
fn detach(path: &Path) -> nix::Result<()> {
    // What a driver that was killed has left here may not have been made a slave yet. All else has,
    // and is to be unmounted in other namespaces too.
    let _nothing_is_left = change(&path.join(MAKING), MsFlags::MS_SLAVE);
    umount2(path, MntFlags::MNT_DETACH)
}

fn told(path: &Path, unmounted: nix::Result<()>) {
    if let Err(error) = unmounted {
        tracing::warn!(path = %path.display(), %error, "cannot unmount");
    }
}
