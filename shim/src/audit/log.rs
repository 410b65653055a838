//! Writes records to the files of a folder. A record is with the kernel when [`Log::write`]
//! returns: the end of the shim loses none. A failing machine loses those of the last
//! [`SYNC_INTERVAL`].
//!
//! A file is `audit-NUMBER.jsonl`, with the number of its first line. `head` has the number and the
//! code of the last line, so that it cannot be cut off.

use std::{
    fs::{DirBuilder, File, OpenOptions, TryLockError},
    os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Weak},
    thread,
    time::{Duration, SystemTime},
};

use parking_lot::Mutex;
use prost_types::Timestamp;

use super::{
    Error,
    chain::{BEGIN, Code, Entry, Key, Line},
    reader::{self, End},
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
    file: File,
    length: u64,
    head: File,
    is_synced: bool,
    /// What the disk did not take may be gone: nothing is recorded any more.
    failed: bool,
    _lock: File,
}

impl Log {
    /// Opens the log in a folder, and begins one if the folder is empty or missing. A last record
    /// that is incomplete was never acknowledged, and is removed.
    ///
    /// # Errors
    /// [`Error`]; also if the last file was changed.
    pub fn open(folder: &Path, key: Key) -> Result<Self, Error> {
        let writer = Arc::new(Mutex::new(Writer::open(folder, key)?));
        let weak = Arc::downgrade(&writer);
        let syncs = thread::Builder::new().name("audit".into());
        let started = syncs.spawn(move || sync(&weak));
        started.map_err(|source| Error::Write {
            path: folder.into(),
            source,
        })?;
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
        let to = |path: &Path| {
            let path = path.to_owned();
            move |source| Error::Write { path, source }
        };
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder.create(folder).map_err(to(folder))?;
        let lock = open(&folder.join("lock")).map_err(to(&folder.join("lock")))?;
        lock.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => Error::InUse {
                path: folder.into(),
            },
            TryLockError::Error(source) => to(folder)(source),
        })?;
        let files = reader::files(folder)?;
        let end = match files.last() {
            None => None,
            Some(last) => Some(reader::read(folder, &key, &[*last], |_| {})?),
        };
        let head = folder.join("head");
        let head = open(&head).map_err(to(&head))?;
        let (number, code, path, length) = match end {
            None => (0, BEGIN, reader::path(folder, 1), 0),
            Some(End {
                last,
                code,
                path,
                length,
                ..
            }) => (last, code, path, length),
        };
        let file = open(&path).map_err(to(&path))?;
        file.set_len(length).map_err(to(&path))?;
        let mut writer = Self {
            folder: folder.into(),
            key,
            number,
            code,
            path,
            file,
            length,
            head,
            is_synced: false,
            failed: false,
            _lock: lock,
        };
        if length == 0 {
            writer.begin()?;
        }
        Ok(writer)
    }

    fn begin(&mut self) -> Result<(), Error> {
        let previous = hex::encode(self.code);
        self.append(Entry::Begin { previous })
    }

    fn write(&mut self, entry: Entry) -> Result<(), Error> {
        if self.length > MAX_FILE {
            self.sync()?;
            let path = reader::path(&self.folder, self.number + 1);
            self.file = open(&path).map_err(|source| self.wrong(source))?;
            (self.path, self.length) = (path, 0);
            self.begin()?;
        }
        self.append(entry)
    }

    fn append(&mut self, entry: Entry) -> Result<(), Error> {
        if self.failed {
            let source = std::io::Error::other("an earlier record did not reach the disk");
            return Err(self.wrong(source));
        }
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
            return Err(self.wrong(source));
        }
        self.length += text.len() as u64;
        (self.number, self.code, self.is_synced) = (line.number, code, false);
        let head = reader::head(&self.key, self.number, &self.code);
        let written = self.head.write_all_at(head.as_bytes(), 0);
        written.map_err(|source| self.wrong(source))
    }

    fn sync(&mut self) -> Result<(), Error> {
        let synced = self.file.sync_data().and_then(|()| self.head.sync_data());
        self.failed |= synced.is_err();
        self.is_synced = synced.is_ok();
        synced.map_err(|source| self.wrong(source))
    }

    fn wrong(&self, source: std::io::Error) -> Error {
        Error::Write {
            path: self.path.clone(),
            source,
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if let Err(error) = self.sync() {
            tracing::error!(error = polydev_proto::error::chain(&error), "the audit log");
        }
    }
}

fn open(path: &Path) -> std::io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    options.mode(0o600).open(path)
}

/// Brings to the disk what is written, as long as the log is open. Writers do not wait.
fn sync(writer: &Weak<Mutex<Writer>>) {
    loop {
        thread::sleep(SYNC_INTERVAL);
        let Some(writer) = writer.upgrade() else {
            return;
        };
        let files = {
            let mut writer = writer.lock();
            if std::mem::replace(&mut writer.is_synced, true) {
                continue;
            }
            [writer.file.try_clone(), writer.head.try_clone()]
        };
        let synced = files
            .into_iter()
            .try_for_each(|file| file.and_then(|file| file.sync_data()));
        if let Err(error) = synced {
            tracing::error!(%error, "the audit log does not reach the disk; calls are refused");
            writer.lock().failed = true;
        }
    }
}
