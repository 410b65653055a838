//! The folders of an allocation on the host. Its tasks may put links into them at any time,
//! so what is used of them is held by a descriptor and checked then, and not looked up again.

use std::{
    fs::{self, File, Permissions},
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::PermissionsExt,
    },
    path::{Component, Path, PathBuf},
};

use polydev_proto::driver::TaskConfig;
use rustix::{
    fs::{Mode, OFlags, mkdirat, open, openat},
    io::Errno,
};

/// As Docker creates missing sources.
const NEW_FOLDER: u32 = 0o755;

/// A folder or a file. Whatever happens to its name, the descriptor is of this one.
#[derive(Debug)]
pub(super) struct Held {
    descriptor: OwnedFd,
    /// Where it was when it was opened, without links.
    pub(super) path: PathBuf,
}

impl Held {
    fn open(path: &Path) -> io::Result<Self> {
        Self::of(open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?)
    }

    fn of(descriptor: OwnedFd) -> io::Result<Self> {
        let path = fs::read_link(name(&descriptor))?;
        Ok(Self { descriptor, path })
    }

    /// A folder in this one, which is created if it is missing. Links are refused.
    fn make(&self, folder: &Path) -> io::Result<Self> {
        let is_new = match mkdirat(&self.descriptor, folder, Mode::from_raw_mode(NEW_FOLDER)) {
            Err(Errno::EXIST) => false,
            made => made.map(|()| true)?,
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let made = Self::of(openat(&self.descriptor, folder, flags, Mode::empty())?)?;
        if is_new {
            // Whatever the umask of the driver.
            fs::set_permissions(made.name(), Permissions::from_mode(NEW_FOLDER))?;
        }
        Ok(made)
    }

    /// A name that leads to this one in this process, while it is held.
    pub(super) fn name(&self) -> PathBuf {
        name(&self.descriptor)
    }

    pub(super) fn is_folder(&self) -> io::Result<bool> {
        Ok(fs::metadata(self.name())?.is_dir())
    }

    /// Opens a regular file for reading. Opening another kind of file might block.
    pub(super) fn read(&self) -> io::Result<File> {
        if !fs::metadata(self.name())?.is_file() {
            return Err(io::Error::other("it is not a regular file"));
        }
        File::open(self.name())
    }
}

fn name(descriptor: &OwnedFd) -> PathBuf {
    format!("/proc/self/fd/{}", descriptor.as_raw_fd()).into()
}

/// Where the folders of an allocation are.
#[derive(Debug)]
pub(super) struct Folders {
    alloc: PathBuf,
    pub(super) shared: PathBuf,
    pub(super) task: PathBuf,
    pub(super) local: PathBuf,
    pub(super) secrets: PathBuf,
}

impl Folders {
    pub(super) fn of(task: &TaskConfig) -> Self {
        let alloc = PathBuf::from(&task.alloc_dir);
        let own = alloc.join(&task.name);
        Self {
            shared: alloc.join("alloc"),
            local: own.join("local"),
            secrets: own.join("secrets"),
            task: own,
            alloc,
        }
    }

    /// Keeps an absolute path, resolves others below the task's folder, and removes `..`.
    pub(super) fn resolve(&self, source: &str) -> PathBuf {
        let mut path = PathBuf::new();
        for component in self.task.join(source).components() {
            match component {
                Component::ParentDir => drop(path.pop()),
                Component::CurDir => {}
                other => path.push(other),
            }
        }
        path
    }

    /// Whether a path is one of the allocation's.
    pub(super) fn has(&self, path: &Path) -> bool {
        path.starts_with(&self.alloc)
    }

    /// Whether the allocation has a task of this name.
    pub(super) fn has_task(&self, name: &str) -> bool {
        let is_one = !name.is_empty() && !name.contains('/') && name != "alloc";
        is_one && self.alloc.join(name).join("secrets").is_dir()
    }

    /// Holds what is at a path, or its nearest parent folder that exists, and says which
    /// folders are missing then.
    ///
    /// # Errors
    /// `PermissionDenied` if it is not in the allocation's folder, even through links.
    pub(super) fn reach<'p>(&self, path: &'p Path) -> io::Result<(Held, &'p Path)> {
        // A dangling link exists, and its target must not be created.
        let mut ancestors = path.ancestors();
        let existing = ancestors.find(|ancestor| ancestor.symlink_metadata().is_ok());
        let existing = existing.ok_or(io::ErrorKind::NotFound)?;
        let held = Held::open(existing)?;
        let alloc = self.alloc.canonicalize()?;
        if !path.starts_with(&self.alloc) || !held.path.starts_with(alloc) {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let missing = path.strip_prefix(existing).unwrap_or(Path::new(""));
        Ok((held, missing))
    }

    /// Holds what is at a path. See [`Folders::reach`] for errors.
    pub(super) fn hold(&self, path: &Path) -> io::Result<Held> {
        match self.reach(path)? {
            (held, missing) if missing.as_os_str().is_empty() => Ok(held),
            _ => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Like [`Folders::hold`], and creates the folders that are missing.
    pub(super) fn make(&self, path: &Path) -> io::Result<Held> {
        let (mut held, missing) = self.reach(path)?;
        for folder in missing {
            held = held.make(Path::new(folder))?;
        }
        Ok(held)
    }

    /// A file in the task's `private` folder, by its path below the task's folder.
    pub(super) fn private(&self, given: &str) -> io::Result<File> {
        let private = self.task.join("private").canonicalize()?;
        let held = self.hold(&self.task.join(given))?;
        if !held.path.starts_with(private) {
            return Err(io::ErrorKind::NotFound.into());
        }
        held.read()
    }

    /// Whether a mount of the path would show the task's `private` folder.
    pub(super) fn shows_private(&self, path: &Path) -> bool {
        let private = self.task.join("private");
        let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let (path, private) = (real(path), real(&private));
        private.starts_with(&path) || path.starts_with(&private)
    }

    /// An image archive in the task's `local` folder.
    pub(super) fn archive(&self, given: &str) -> io::Result<File> {
        let is_plain = |part| matches!(part, Component::Normal(_));
        if !Path::new(given).components().all(is_plain) {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        self.hold(&self.local.join(given))?.read()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    pub(crate) struct Alloc {
        pub(crate) folder: tempfile::TempDir,
        pub(crate) task: TaskConfig,
    }

    pub(crate) fn alloc() -> Alloc {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("alloc/logs")).unwrap();
        for own in ["web/local", "web/secrets"] {
            fs::create_dir_all(folder.path().join(own)).unwrap();
        }
        let task = TaskConfig {
            name: "web".into(),
            alloc_dir: folder.path().to_string_lossy().into_owned(),
            ..Default::default()
        };
        Alloc { folder, task }
    }

    /// C005: an image archive must be in the task's `local` folder.
    #[test]
    fn an_image_archive_is_a_file_of_the_tasks_own() {
        let alloc = alloc();
        let folders = Folders::of(&alloc.task);
        fs::write(folders.local.join("image.tar"), "").unwrap();
        symlink("/etc/passwd", folders.local.join("link")).unwrap();
        assert!(folders.archive("image.tar").is_ok());
        for wrong in ["none.tar", "/etc/passwd", "../local/image.tar", "link", "."] {
            assert!(folders.archive(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn missing_folders_are_created_but_not_through_links() {
        let alloc = alloc();
        let folders = Folders::of(&alloc.task);
        let outside = tempfile::tempdir().unwrap();
        let made = folders.make(&folders.local.join("a/b")).unwrap();
        assert!(made.is_folder().unwrap() && made.path.ends_with("web/local/a/b"));
        assert!(folders.hold(&folders.local.join("c")).is_err());
        symlink(outside.path(), folders.local.join("out")).unwrap();
        symlink(outside.path().join("new"), folders.local.join("dangling")).unwrap();
        for wrong in ["out/new", "dangling", "dangling/new"] {
            assert!(folders.make(&folders.local.join(wrong)).is_err(), "{wrong}");
        }
        // A link that came between the look and the creation.
        let local = Held::open(&folders.local).unwrap();
        assert!(local.make(Path::new("out")).is_err());
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_is_held_stays_whatever_its_name_leads_to() {
        let alloc = alloc();
        let folders = Folders::of(&alloc.task);
        let (data, aside) = (folders.local.join("data"), folders.local.join("aside"));
        fs::create_dir(&data).unwrap();
        fs::write(data.join("mine"), "").unwrap();
        let held = folders.hold(&data).unwrap();
        fs::rename(&data, &aside).unwrap();
        symlink("/etc", &data).unwrap();
        assert!(held.name().join("mine").exists());
        assert!(folders.hold(&data).is_err());
    }
}
