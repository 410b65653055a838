//! Files with secrets, which not everybody may read.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use zeroize::Zeroizing;

/// Why such a file is not used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read `{}`", path.display())]
    Unreadable { path: PathBuf, source: io::Error },
    #[error("`{}` has mode {mode:o}; allowed is at most 640", path.display())]
    Open { path: PathBuf, mode: u32 },
}

/// Reads a file that only its owner and one group may read.
///
/// # Errors
/// [`Error`]
pub fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>, Error> {
    let unreadable = |source| Error::Unreadable {
        path: path.into(),
        source,
    };
    let mode = fs::metadata(path).map_err(unreadable)?.mode() & 0o777;
    // systemd's credentials may be for a group.
    if mode & 0o037 != 0 {
        return Err(Error::Open {
            path: path.into(),
            mode,
        });
    }
    fs::read(path).map(Zeroizing::new).map_err(unreadable)
}
