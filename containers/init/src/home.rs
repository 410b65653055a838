//! The user's home: an empty tmpfs that init fills from the image, plus a run's credential files.

use std::{
    ffi::OsStr,
    fs::{self, DirBuilder, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt},
    path::{Component, Path, PathBuf},
};

use polydev_proto::init::File;

/// Where an image keeps the initial content of the home, because Docker copies nothing into
/// a tmpfs.
pub(crate) const SEED: &str = "/runtime/home";

/// `$HOME`, if it is an absolute path.
pub(crate) fn path() -> Option<PathBuf> {
    std::env::var_os("HOME")
        .map(PathBuf::from)
        .filter(|home| home.is_absolute())
}

/// Copies folders, files and links of `seed` into `home`; does nothing if either is
/// missing.
pub(crate) fn seed(seed: &Path, home: Option<&Path>) -> io::Result<()> {
    match home {
        Some(home) if seed.is_dir() => copy(seed, home),
        _ => Ok(()),
    }
}

/// Makes `home` what it was at the start.
pub(crate) fn reset(seed_from: &Path, home: Option<&Path>) -> io::Result<()> {
    let Some(home) = home else { return Ok(()) };
    for entry in fs::read_dir(home)? {
        let entry = entry?;
        match entry.file_type()?.is_dir() {
            true => fs::remove_dir_all(entry.path())?,
            false => fs::remove_file(entry.path())?,
        }
    }
    seed(seed_from, Some(home))
}

fn copy(from: &Path, to: &Path) -> io::Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        let kind = entry.file_type()?;
        if kind.is_dir() {
            make_folder(&target)?;
            copy(&source, &target)?;
        } else if kind.is_symlink() {
            std::os::unix::fs::symlink(fs::read_link(&source)?, &target)?;
        } else if kind.is_file() {
            fs::copy(&source, &target)?;
        }
    }
    Ok(())
}

/// Writes a run's files below `home`, each with exactly its mode.
///
/// # Errors
/// A message that names the file.
pub(crate) fn write_files(home: Option<&Path>, files: &[File]) -> Result<(), String> {
    for file in files {
        let home =
            home.ok_or_else(|| format!("file `{}`: the image does not set HOME", file.path))?;
        let path = Path::new(&file.path);
        if path == Path::new("") || !path.components().all(|c| matches!(c, Component::Normal(_))) {
            return Err(format!(
                "file `{}`: the path is not below the home",
                file.path
            ));
        }
        write_file(home, path, file).map_err(|error| format!("file `{}`: {error}", file.path))?;
    }
    Ok(())
}

fn write_file(home: &Path, path: &Path, file: &File) -> io::Result<()> {
    let mut folder = home.to_owned();
    for part in path
        .parent()
        .into_iter()
        .flat_map(Path::iter)
        .map(OsStr::new)
    {
        folder.push(part);
        make_folder(&folder)?;
    }
    // Never readable by others, not even before its mode is set.
    let mut target = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(home.join(path))?;
    target.set_permissions(fs::Permissions::from_mode(file.mode & 0o777))?;
    target.write_all(&file.content)
}

fn make_folder(path: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str) -> File {
        File {
            path: path.into(),
            mode: 0o600,
            content: "{}".into(),
        }
    }

    #[test]
    fn credential_files_are_for_their_user_alone() {
        let home = tempfile::tempdir().unwrap();
        write_files(Some(home.path()), &[file(".codex/auth.json")]).unwrap();
        let mode = |path: &str| {
            fs::metadata(home.path().join(path))
                .unwrap()
                .permissions()
                .mode()
                & 0o777
        };
        assert_eq!(mode(".codex/auth.json"), 0o600);
        assert_eq!(mode(".codex"), 0o700);
    }

    #[test]
    fn paths_that_leave_the_home_are_refused() {
        let home = tempfile::tempdir().unwrap();
        for path in ["", "/etc/passwd", "../x", "a/../../x", "."] {
            let refused = write_files(Some(home.path()), &[file(path)]).unwrap_err();
            assert!(refused.contains(path), "{refused}");
        }
        assert!(
            write_files(None, &[file("x")])
                .unwrap_err()
                .contains("HOME")
        );
    }

    #[test]
    fn the_home_starts_as_the_image_says() {
        let (image, home) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::create_dir(image.path().join(".gemini")).unwrap();
        fs::write(image.path().join(".gemini/settings.json"), "{}").unwrap();
        std::os::unix::fs::symlink("settings.json", image.path().join(".gemini/link")).unwrap();

        seed(image.path(), Some(home.path())).unwrap();
        assert_eq!(
            fs::read_to_string(home.path().join(".gemini/link")).unwrap(),
            "{}"
        );
        seed(&image.path().join("missing"), Some(home.path())).unwrap();
    }

    #[test]
    fn nothing_is_left_of_what_was_in_the_home() {
        let (image, home) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::create_dir(image.path().join(".codex")).unwrap();
        fs::write(image.path().join(".codex/config.toml"), "of the image").unwrap();
        fs::create_dir(home.path().join(".codex")).unwrap();
        fs::write(home.path().join(".codex/config.toml"), "of an agent").unwrap();
        fs::write(home.path().join(".codex/state"), "").unwrap();
        std::os::unix::fs::symlink(image.path(), home.path().join("link")).unwrap();

        reset(image.path(), Some(home.path())).unwrap();
        let content = fs::read_to_string(home.path().join(".codex/config.toml"));
        assert_eq!(content.unwrap(), "of the image");
        assert!(!home.path().join(".codex/state").exists());
        assert!(!home.path().join("link").exists() && image.path().exists());
        reset(image.path(), None).unwrap();
    }
}
