//! Values that are loaded from files and follow their changes.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use parking_lot::Mutex;

/// How often files are checked, while they are in use.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// A value that follows its files with about two seconds of delay. Changed files are read
/// once they have been unchanged for a second, because somebody may still be writing them.
/// Unusable files change nothing.
#[derive(Debug)]
pub struct Reloaded<T> {
    paths: Vec<PathBuf>,
    current: Mutex<Current<T>>,
}

#[derive(Debug)]
struct Current<T> {
    value: Arc<T>,
    /// What was last read, usable or not.
    read: Vec<Option<Stamp>>,
    seen: Vec<Option<Stamp>>,
    looked: Instant,
}

/// Identifies a version of a file.
type Stamp = (SystemTime, u64, u64);

impl<T> Reloaded<T> {
    /// Starts with what `load` makes of the current files.
    ///
    /// # Errors
    /// The error of `load`.
    pub fn new<E>(paths: Vec<PathBuf>, load: impl FnOnce() -> Result<T, E>) -> Result<Self, E> {
        // Taken before the files are read, so later writes are noticed.
        let stamps = stamps(&paths);
        let current = Current {
            read: stamps.clone(),
            seen: stamps,
            value: Arc::new(load()?),
            looked: Instant::now(),
        };
        let current = Mutex::new(current);
        Ok(Self { paths, current })
    }

    /// The value. If newer files are unusable, also their error, once.
    pub fn get<E>(&self, load: impl FnOnce() -> Result<T, E>) -> (Arc<T>, Option<E>) {
        let mut current = self.current.lock();
        let mut refused = None;
        if current.looked.elapsed() >= LOOK_INTERVAL {
            current.looked = Instant::now();
            let now = stamps(&self.paths);
            if now != current.read && now == current.seen {
                match load() {
                    Ok(value) => current.value = Arc::new(value),
                    Err(error) => refused = Some(error),
                }
                current.read.clone_from(&now);
            }
            current.seen = now;
        }
        (current.value.clone(), refused)
    }
}

/// `None` for a missing file.
fn stamps(paths: &[PathBuf]) -> Vec<Option<Stamp>> {
    let stamp = |path: &PathBuf| {
        let file = fs::metadata(path).ok()?;
        Some((file.modified().ok()?, file.len(), file.ino()))
    };
    paths.iter().map(stamp).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_when_nobody_writes_it_any_more() {
        let path = std::env::temp_dir().join(format!("pdreload-{}", std::process::id()));
        let write = |text: &str| fs::write(&path, text).unwrap();
        let load = || match fs::read_to_string(&path).unwrap() {
            text if text.is_empty() => Err("empty"),
            text => Ok(text),
        };
        write("first");
        let value = Reloaded::new(vec![path.clone()], load).unwrap();
        let look = || {
            value.current.lock().looked -= LOOK_INTERVAL;
            let (value, refused) = value.get(load);
            (String::clone(&value), refused)
        };
        write("half");
        assert_eq!(look(), ("first".into(), None));
        write("half of the second");
        assert_eq!(look(), ("first".into(), None), "it is being written");
        assert_eq!(look(), ("half of the second".into(), None));
        write("");
        look();
        assert_eq!(look(), ("half of the second".into(), Some("empty")));
        assert_eq!(look(), ("half of the second".into(), None), "told once");
        fs::remove_file(&path).unwrap();
    }
}
