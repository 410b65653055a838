//! The files of a run. Init writes them below the workspace as their bytes arrive. Only init runs
//! in the container then, so no file can be replaced between a check and its use.

use std::{
    collections::VecDeque,
    fs::{DirBuilder, File, OpenOptions, Permissions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
};

use polydev_proto::{
    init::InputFile,
    workspace::{PATH, check_files},
};

/// The folder of a run's files.
pub(crate) fn path() -> &'static Path {
    Path::new(PATH)
}

/// The files of a run, while their bytes arrive.
#[derive(Debug)]
pub(crate) struct Incoming {
    root: PathBuf,
    /// The incomplete files; the first one is being written.
    files: VecDeque<InputFile>,
    open: Option<File>,
    /// Bytes that the first file still lacks.
    missing: u64,
    /// Total bytes of all files.
    total: u64,
}

impl Incoming {
    /// # Errors
    /// A message that names what cannot be written.
    pub(crate) fn new(root: &Path, files: &[InputFile]) -> Result<Self, String> {
        let total = check_files(files).map_err(|error| error.to_string())?;
        let mut incoming = Self {
            root: root.to_owned(),
            files: files.to_vec().into(),
            open: None,
            missing: 0,
            total,
        };
        incoming.open_next()?;
        Ok(incoming)
    }

    pub(crate) fn total(&self) -> u64 {
        self.total
    }

    pub(crate) fn is_complete(&self) -> bool {
        self.files.is_empty()
    }

    /// Writes the bytes that belong to the files; returns their number.
    ///
    /// # Errors
    /// A message that names the file.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<usize, String> {
        let mut rest = bytes;
        while let (Some(file), Some(open)) = (self.files.front(), &mut self.open) {
            let most = usize::try_from(self.missing).unwrap_or(usize::MAX);
            let (now, later) = rest.split_at(most.min(rest.len()));
            let written = open.write_all(now);
            written.map_err(|error| format!("file `{}`: {error}", file.path))?;
            self.missing -= now.len() as u64;
            rest = later;
            if self.missing > 0 {
                break;
            }
            self.files.pop_front();
            self.open_next()?;
        }
        Ok(bytes.len() - rest.len())
    }

    /// Empty files are thereby complete.
    fn open_next(&mut self) -> Result<(), String> {
        self.open = None;
        while let Some(file) = self.files.front() {
            let open = create(&self.root, file);
            let open = open.map_err(|error| format!("file `{}`: {error}", file.path))?;
            self.missing = file.size;
            if file.size > 0 {
                self.open = Some(open);
                break;
            }
            self.files.pop_front();
        }
        Ok(())
    }
}

fn create(root: &Path, file: &InputFile) -> io::Result<File> {
    let path = root.join(&file.path);
    if let Some(folder) = path.parent() {
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(folder)?;
    }
    let open = OpenOptions::new().write(true).create_new(true).open(path)?;
    // Independent of the umask.
    open.set_permissions(Permissions::from_mode(file.mode))?;
    Ok(open)
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    fn input(path: &str, size: u64, mode: u32) -> InputFile {
        InputFile {
            path: path.into(),
            mode,
            size,
        }
    }

    #[test]
    fn files_come_as_one_stream_however_it_is_cut() {
        for piece in [1, 2, 3, 100] {
            let root = tempfile::tempdir().unwrap();
            let files = [
                input("empty", 0, 0o600),
                input("a/b/run.sh", 5, 0o755),
                input("c", 2, 0o644),
                input("last", 0, 0o644),
            ];
            let mut incoming = Incoming::new(root.path(), &files).unwrap();
            let stream = b"helloyou and stdin";
            let mut at = 0;
            while !incoming.is_complete() {
                let end = stream.len().min(at + piece);
                at += incoming.write(&stream[at..end]).unwrap();
            }
            assert_eq!(at, 7);
            assert_eq!(incoming.total(), 7);
            let read = |path: &str| fs::read(root.path().join(path)).unwrap();
            assert_eq!(
                (&*read("a/b/run.sh"), &*read("c")),
                (&b"hello"[..], &b"yo"[..])
            );
            assert!(read("empty").is_empty() && read("last").is_empty());
            let script = fs::metadata(root.path().join("a/b/run.sh")).unwrap();
            assert_eq!(script.permissions().mode() & 0o777, 0o755);
        }
    }

    #[test]
    fn a_file_that_cannot_be_written_is_named() {
        let root = tempfile::tempdir().unwrap();
        let refused = |path| Incoming::new(root.path(), &[input(path, 1, 0o644)]).unwrap_err();
        assert!(refused("../a").contains("files[0].path"));
        symlink("/tmp", root.path().join("there")).unwrap();
        assert!(refused("there").contains("file `there`: "));
    }
}
