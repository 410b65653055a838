//! A shorter log in place of one that has become too long, while runs go on.

use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::PathBuf,
};

use super::{Error, Journal, Record, encode};

/// How often a rewrite waits for what came while it was synced.
const MAX_ROUNDS: u32 = 10;

/// A shorter log, which takes the place of the journal's. Three steps: [`Journal::begin`] and
/// [`Journal::finish`] are quick, [`Rewrite::write`] syncs, which takes as long as the disk likes,
/// and needs no journal.
#[derive(Debug)]
pub struct Rewrite {
    path: PathBuf,
    bytes: Vec<u8>,
}

/// A [`Rewrite`] on the disk, beside the journal.
#[derive(Debug)]
pub struct Rewritten {
    partial: PathBuf,
    file: File,
    length: u64,
    /// How often more was written while this was synced.
    rounds: u32,
}

impl Rewritten {
    /// Writes what came meanwhile to the disk.
    ///
    /// # Errors
    /// [`Error::File`]; the journal is unchanged.
    pub fn sync(self) -> Result<Self, Error> {
        self.file.sync_data().map_err(|source| Error::File {
            path: self.partial.clone(),
            source,
        })?;
        Ok(self)
    }
}

impl Rewrite {
    /// Writes the log to the disk.
    ///
    /// # Errors
    /// [`Error::File`]; the journal is unchanged.
    pub fn write(self) -> Result<Rewritten, Error> {
        let partial = self.path.with_extension("partial");
        let write = || {
            let mut options = File::options();
            options.read(true).write(true).create(true).truncate(true);
            let file = options.mode(0o600).open(&partial)?;
            file.write_all_at(&self.bytes, 0)?;
            file.sync_all()?;
            Ok(file)
        };
        let file = write().map_err(|source| Error::File {
            path: partial.clone(),
            source,
        })?;
        let length = self.bytes.len() as u64;
        Ok(Rewritten {
            partial,
            file,
            length,
            rounds: 0,
        })
    }
}

impl Journal {
    /// Begins a log of only `records`, and of what is written from now on.
    pub fn begin<'a>(&mut self, records: impl IntoIterator<Item = &'a Record>) -> Rewrite {
        self.since = Some(Vec::new());
        let mut bytes = encode(&self.format());
        records
            .into_iter()
            .for_each(|record| bytes.extend(encode(record)));
        Rewrite {
            path: self.path.clone(),
            bytes,
        }
    }

    /// Takes the new log in place of the old one. If more was written meanwhile, returns it with
    /// that: [sync](Rewritten::sync) it, and finish it again. No record that was on the disk is
    /// without the disk at any time, unless records never stop.
    ///
    /// # Errors
    /// [`Error::File`], or that of [`Rewrite::write`]; the log is unchanged.
    pub fn finish(
        &mut self,
        rewritten: Result<Rewritten, Error>,
    ) -> Result<Option<Rewritten>, Error> {
        let since = self.since.take().unwrap_or_default();
        let mut rewritten = rewritten?;
        let failed = |source| Error::File {
            path: self.path.clone(),
            source,
        };
        let Rewritten { file, length, .. } = &rewritten;
        file.write_all_at(&since, *length).map_err(failed)?;
        rewritten.length += since.len() as u64;
        if !since.is_empty() && rewritten.rounds < MAX_ROUNDS {
            rewritten.rounds += 1;
            self.since = Some(Vec::new());
            return Ok(Some(rewritten));
        }
        fs::rename(&rewritten.partial, &self.path).map_err(failed)?;
        self.file = rewritten.file.into();
        self.length = rewritten.length;
        self.dirty.notify_one();
        Ok(None)
    }
}
