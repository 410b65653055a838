//! Records of things that outlive the driver: a folder with a JSON file for each.

use std::{
    fs, io,
    marker::PhantomData,
    path::{Path, PathBuf},
    time::SystemTime,
};

use serde::{Serialize, de::DeserializeOwned};

use super::files::{self, Error};

/// A folder with records of one kind.
#[derive(Debug)]
pub struct Records<T> {
    folder: PathBuf,
    kind: PhantomData<fn() -> T>,
}

/// A record from an earlier life of the driver.
#[derive(Debug)]
pub struct Found<T> {
    pub record: T,
    /// When it was last written or marked.
    pub marked: Option<SystemTime>,
}

impl<T: Serialize + DeserializeOwned> Records<T> {
    /// # Errors
    /// [`Error::Write`] if the folder cannot be made.
    pub fn open(folder: PathBuf) -> Result<Self, Error> {
        match fs::create_dir(&folder) {
            Err(source) if source.kind() != io::ErrorKind::AlreadyExists => Err(Error::Write {
                path: folder,
                source,
            }),
            _ => Ok(Self {
                folder,
                kind: PhantomData,
            }),
        }
    }

    /// Reads all records. An unreadable record is reported and stays for an operator to
    /// inspect.
    #[must_use]
    pub fn read(&self) -> Vec<Found<T>> {
        let files = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let found = files.filter_map(|file| {
            let path = file.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                return None;
            }
            let marked = file
                .metadata()
                .and_then(|metadata| metadata.modified())
                .ok();
            fs::read(&path)
                .map_err(|error| error.to_string())
                .and_then(|text| serde_json::from_slice(&text).map_err(|error| error.to_string()))
                .map(|record| Found { record, marked })
                .inspect_err(|error| {
                    tracing::error!(path = %path.display(), error, "cannot read a record");
                })
                .ok()
        });
        found.collect()
    }

    /// Writes all or nothing.
    ///
    /// # Errors
    /// [`Error::Write`]
    ///
    /// # Panics
    /// If the record cannot be written as JSON, for example because of a time before 1970.
    pub fn write(&self, name: &str, record: &T) -> Result<(), Error> {
        let text = serde_json::to_vec(record).expect("a record can be written as JSON");
        files::write(&self.path(name), &text, 0o600)
    }

    /// Sets a record's time to now.
    ///
    /// # Errors
    /// If the file cannot be changed.
    pub fn mark(&self, name: &str) -> io::Result<()> {
        let file = fs::File::options().append(true).open(self.path(name))?;
        file.set_modified(SystemTime::now())
    }

    /// Removes a record; a missing record is not an error.
    pub fn remove(&self, name: &str) {
        let path = self.path(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %path.display(), %error, "cannot remove a record");
            }
            _ => {}
        }
    }

    /// The path of the folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.json"))
    }
}
