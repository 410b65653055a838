//! Writes records to the files of a folder. A record is with the kernel when [`Log::write`]
//! returns: the end of the shim loses none. A failing machine loses those of the last
//! [`SYNC_INTERVAL`].
//!
//! A file is `audit-NUMBER.jsonl`, with the number of its first line. `head` has the number and the
//! code of the last line that the disk has, so that it cannot be cut off.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io::{self, Write},
    mem,
    os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Weak},
    thread,
    time::{Duration, SystemTime},
};

use parking_lot::Mutex;
use polydev_proto::error::chain;
use prost_types::Timestamp;

use super::{
    Error,
    chain::{BEGIN, Code, Entry, Key, Line},
    reader,
    record::Record,
};

/// Writing does not wait for the disk; the disk has everything after this time.
pub const SYNC_INTERVAL: Duration = Duration::from_millis(200);
/// A longer file is followed by another one.
pub(super) const MAX_FILE: u64 = 64 << 20;

/// An open log, which no other process writes to.
#[derive(Debug, Clone)]
pub struct Log(Arc<Mutex<Writer>>);

#[derive(Debug)]
struct Writer {
    folder: PathBuf,
    key: Key,
    /// The number and code of the last line.
    number: u64,
    code: Code,
    path: PathBuf,
    file: Arc<File>,
    length: u64,
    is_synced: bool,
    /// Files before this one that the disk may not have.
    earlier: Vec<Arc<File>>,
    /// What the disk did not take may be gone: nothing is recorded any more.
    failed: bool,
    _lock: File,
}

impl Log {
    /// Opens the log in a folder, and begins one if the folder is empty or missing. A last record
    /// that is incomplete was never acknowledged, and is removed.
    ///
    /// # Errors
    /// [`Error`]; also if one of the last two files was changed.
    pub fn open(folder: &Path, key: Key) -> Result<Self, Error> {
        let writer = Arc::new(Mutex::new(Writer::open(folder, key)?));
        let weak = Arc::downgrade(&writer);
        let syncs = thread::Builder::new().name("audit".into());
        let started = syncs.spawn(move || keep_synced(&weak));
        started.map_err(|source| wrong(folder, source))?;
        Ok(Self(writer))
    }

    /// Records, or says that nothing is recorded: then nothing may be done.
    ///
    /// # Errors
    /// [`Error::Write`]
    pub fn write(&self, record: &Record) -> Result<(), Error> {
        self.0.lock().write(Entry::Record(record.clone()))
    }
}

impl Writer {
    fn open(folder: &Path, key: Key) -> Result<Self, Error> {
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o700);
        let made = builder.create(folder);
        made.map_err(|source| wrong(folder, source))?;
        let lock = open(&folder.join("lock"))?;
        lock.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => Error::InUse {
                path: folder.into(),
            },
            TryLockError::Error(source) => wrong(folder, source),
        })?;
        // The last one may have nothing yet.
        let (number, code, path, length) = match reader::read(folder, &key, 2, drop)? {
            None => (0, BEGIN, reader::path(folder, 1), 0),
            Some(end) => (end.last, end.code, end.path, end.length),
        };
        let file = open(&path)?;
        let cut = file.set_len(length);
        cut.map_err(|source| wrong(&path, source))?;
        let mut writer = Self {
            folder: folder.into(),
            key,
            number,
            code,
            path,
            file: file.into(),
            length,
            is_synced: false,
            earlier: Vec::new(),
            failed: false,
            _lock: lock,
        };
        if length == 0 {
            writer.begin()?;
        }
        writer.unsynced().bring()?;
        Ok(writer)
    }

    fn write(&mut self, entry: Entry) -> Result<(), Error> {
        if self.failed {
            let source = io::Error::other("earlier records did not reach the disk");
            return Err(wrong(&self.path, source));
        }
        if self.length > MAX_FILE {
            let path = reader::path(&self.folder, self.number + 1);
            let file = open(&path)?;
            // Of a shim that came no further.
            let cut = file.set_len(0);
            cut.map_err(|source| wrong(&path, source))?;
            let earlier = mem::replace(&mut self.file, file.into());
            self.earlier.push(earlier);
            (self.path, self.length) = (path, 0);
        }
        if self.length == 0 {
            self.begin()?;
        }
        self.append(entry)
    }

    fn begin(&mut self) -> Result<(), Error> {
        let previous = hex::encode(self.code);
        self.append(Entry::Begin { previous })
    }

    fn append(&mut self, entry: Entry) -> Result<(), Error> {
        let line = Line {
            number: self.number + 1,
            time: Timestamp::from(SystemTime::now()).to_string(),
            entry,
        };
        let (mut text, code) = line.write(&self.key, &self.code);
        text.push('\n');
        if let Err(source) = self.file.write_all_at(text.as_bytes(), self.length) {
            // A part of it must not stand before the next record.
            self.failed = self.file.set_len(self.length).is_err();
            return Err(wrong(&self.path, source));
        }
        self.length += text.len() as u64;
        (self.number, self.code, self.is_synced) = (line.number, code, false);
        Ok(())
    }

    /// What is to be brought to the disk.
    fn unsynced(&mut self) -> Unsynced {
        self.is_synced = true;
        let mut files = mem::take(&mut self.earlier);
        files.push(self.file.clone());
        Unsynced {
            folder: self.folder.clone(),
            head: reader::head(&self.key, self.number, &self.code),
            files,
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if !self.is_synced && !self.failed && self.unsynced().bring().is_err() {
            tracing::error!("the last records of the audit log may not be on the disk");
        }
    }
}

/// Lines that the disk may not have, and what `head` is once it has them.
struct Unsynced {
    folder: PathBuf,
    head: String,
    files: Vec<Arc<File>>,
}

impl Unsynced {
    /// First: after a power failure there is a line for whatever `head` says.
    fn bring_lines(&self) -> Result<(), Error> {
        let mut files = self.files.iter();
        let synced = files.try_for_each(|file| file.sync_data());
        synced.map_err(|source| wrong(&self.folder, source))
    }

    fn bring_head(&self) -> Result<(), Error> {
        let bring = || {
            let new = self.folder.join("head.new");
            let mut file = File::create(&new)?;
            file.write_all(self.head.as_bytes())?;
            file.sync_data()?;
            fs::rename(new, self.folder.join("head"))?;
            // Also for new files of lines.
            File::open(&self.folder)?.sync_data()
        };
        bring().map_err(|source| wrong(&self.folder, source))
    }

    fn bring(&self) -> Result<(), Error> {
        self.bring_lines()?;
        self.bring_head()
    }
}

/// Writers do not wait for the disk.
fn keep_synced(writer: &Weak<Mutex<Writer>>) {
    let mut is_behind = false;
    loop {
        thread::sleep(SYNC_INTERVAL);
        let Some(writer) = writer.upgrade() else {
            return;
        };
        let unsynced = {
            let mut writer = writer.lock();
            (!writer.is_synced && !writer.failed).then(|| writer.unsynced())
        };
        let Some(unsynced) = unsynced else { continue };
        if let Err(error) = unsynced.bring_lines() {
            let error = chain(&error);
            tracing::error!(
                error,
                "the audit log does not reach the disk: calls are refused"
            );
            writer.lock().failed = true;
            continue;
        }
        let was_behind = is_behind;
        is_behind = false;
        // A disk that is full today has room tomorrow.
        if let Err(error) = unsynced.bring_head() {
            writer.lock().is_synced = false;
            is_behind = true;
            if !was_behind {
                tracing::warn!(
                    error = chain(&error),
                    "cannot write where the audit log ends"
                );
            }
        }
    }
}

fn open(path: &Path) -> Result<File, Error> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    let opened = options.mode(0o600).open(path);
    opened.map_err(|source| wrong(path, source))
}

fn wrong(path: &Path, source: io::Error) -> Error {
    Error::Write {
        path: path.into(),
        source,
    }
}
