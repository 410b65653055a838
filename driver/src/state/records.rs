//! What the driver must know of things that outlive it: a folder with a JSON file for each.

use std::{
    fs, io,
    marker::PhantomData,
    path::{Path, PathBuf},
    time::SystemTime,
};

use serde::{Serialize, de::DeserializeOwned};

use super::files::{self, Error};

/// The folder of records of one kind.
#[derive(Debug)]
pub struct Records<T> {
    folder: PathBuf,
    kind: PhantomData<fn() -> T>,
}

/// A record of an earlier life of the driver.
#[derive(Debug)]
pub struct Found<T> {
    pub record: T,
    /// When it was written, or last marked.
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

    /// All of them. One that cannot be read is reported and left for a person to see.
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
                    tracing::error!(path = %path.display(), error, "a record cannot be read");
                })
                .ok()
        });
        found.collect()
    }

    /// Whole or not at all.
    ///
    /// # Errors
    /// [`Error::Write`]
    ///
    /// # Panics
    /// If a record cannot be written as JSON, as a time before 1970.
    pub fn write(&self, name: &str, record: &T) -> Result<(), Error> {
        let text = serde_json::to_vec(record).expect("a record can be written as JSON");
        files::write(&self.path(name), &text, 0o600)
    }

    /// Gives a record the present time.
    ///
    /// # Errors
    /// If it cannot be.
    pub fn mark(&self, name: &str) -> io::Result<()> {
        let file = fs::File::options().append(true).open(self.path(name))?;
        file.set_modified(SystemTime::now())
    }

    /// Forgets one; one that is forgotten already is fine.
    pub fn remove(&self, name: &str) {
        let path = self.path(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %path.display(), %error, "a record is left");
            }
            _ => {}
        }
    }

    /// Where the records are.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.json"))
    }
}
