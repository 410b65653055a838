//! What was read from files, as they are now.

use std::{
    fs,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};

/// How often files are looked at, while they are in use.
const LOOK: Duration = Duration::from_secs(1);

/// A value that follows its files: what is had is at most a second old. Files that are of no
/// use, as while they are being replaced, change nothing.
#[derive(Debug)]
pub struct Reloaded<T> {
    paths: Vec<PathBuf>,
    current: Mutex<Current<T>>,
}

#[derive(Debug)]
struct Current<T> {
    value: Arc<T>,
    written: Vec<Option<SystemTime>>,
    looked: Instant,
}

impl<T> Reloaded<T> {
    /// With what `load` makes of the files now.
    ///
    /// # Errors
    /// As `load`'s.
    pub fn new<E>(paths: Vec<PathBuf>, load: impl FnOnce() -> Result<T, E>) -> Result<Self, E> {
        let current = Current {
            // Before they are read: what is written meanwhile is read again.
            written: written(&paths),
            value: Arc::new(load()?),
            looked: Instant::now(),
        };
        let current = Mutex::new(current);
        Ok(Self { paths, current })
    }

    /// The value, and an error if there are newer files of no use.
    pub fn get<E>(&self, load: impl FnOnce() -> Result<T, E>) -> (Arc<T>, Option<E>) {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let mut refused = None;
        if current.looked.elapsed() >= LOOK {
            current.looked = Instant::now();
            let written = written(&self.paths);
            if written != current.written {
                match load() {
                    Ok(value) => {
                        current.value = Arc::new(value);
                        current.written = written;
                    }
                    Err(error) => refused = Some(error),
                }
            }
        }
        (current.value.clone(), refused)
    }
}

/// When each was written; `None` for one that is not there.
fn written(paths: &[PathBuf]) -> Vec<Option<SystemTime>> {
    let written = |path: &PathBuf| fs::metadata(path).and_then(|file| file.modified());
    paths.iter().map(|path| written(path).ok()).collect()
}
