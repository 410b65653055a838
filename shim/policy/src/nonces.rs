//! Which tokens were used. With a file, verifiers that share it let a token be used once between
//! them: a use is read, written and with the disk before the file's lock is given back.
//!
//! A line is JSON with `consumed_at`, `expires_at` and `nonce`, as existing programs have it (MVAR
//! 1.5.3). Lines of expired tokens are removed when there are many.

use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::token::timestamp;

/// A longer file is written again without the lines of expired tokens, in bytes.
const MAX_FILE: u64 = 4 << 20;
/// Most tokens that are remembered. A store that is full refuses.
pub const MAX_NONCES: usize = 1_000_000;
/// Longest nonce, in bytes.
const MAX_NONCE: usize = 128;

/// A store of used tokens.
#[derive(Debug, Default)]
pub struct Nonces {
    used: Used,
    file: Option<Shared>,
}

/// When a token was used, and when it expires, by its nonce.
type Used = HashMap<String, (OffsetDateTime, OffsetDateTime)>;

/// The file, and how far it was read.
#[derive(Debug)]
struct Shared {
    path: PathBuf,
    lock: File,
    file: File,
    /// In bytes and lines.
    read: u64,
    lines: usize,
    /// Its length when it was last written again.
    least: u64,
}

/// Why a token was not used up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the token was used before")]
    Used,
    #[error("the nonce has {0} bytes, at most {MAX_NONCE} are allowed")]
    Long(usize),
    #[error("{MAX_NONCES} tokens are remembered already")]
    Full,
    #[error("cannot use `{}`", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("line {line} of `{}` is not one of a used token", path.display())]
    Line { path: PathBuf, line: usize },
}

#[derive(Debug, Serialize, Deserialize)]
struct Line {
    consumed_at: String,
    expires_at: String,
    nonce: String,
}

impl Nonces {
    /// A store that nobody else sees.
    #[must_use]
    pub fn in_memory() -> Self {
        Self::default()
    }

    /// A store in a file, which other processes may have open too.
    ///
    /// # Errors
    /// If the file cannot be opened.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let wrong = |source| Error::File {
            path: path.into(),
            source,
        };
        let mut name = path.as_os_str().to_owned();
        name.push(".lock");
        let lock = open(Path::new(&name)).map_err(wrong)?;
        let file = open(path).map_err(wrong)?;
        Ok(Self {
            used: HashMap::new(),
            file: Some(Shared {
                path: path.into(),
                lock,
                file,
                read: 0,
                lines: 0,
                least: 0,
            }),
        })
    }

    /// Uses a token up.
    ///
    /// # Errors
    /// [`Error`]. The token must not be used then.
    pub fn consume(
        &mut self,
        nonce: &str,
        expires: OffsetDateTime,
        now: OffsetDateTime,
    ) -> Result<(), Error> {
        if nonce.len() > MAX_NONCE {
            return Err(Error::Long(nonce.len()));
        }
        let Self { used, file } = self;
        match file {
            None => enter(used, nonce, expires, now),
            Some(shared) => {
                let wrong = |source| Error::File {
                    path: shared.path.clone(),
                    source,
                };
                shared.lock.lock().map_err(wrong)?;
                let consumed = shared.consume(used, nonce, expires, now);
                shared.lock.unlock().map_err(|source| Error::File {
                    path: shared.path.clone(),
                    source,
                })?;
                consumed
            }
        }
    }
}

impl Shared {
    fn consume(
        &mut self,
        used: &mut Used,
        nonce: &str,
        expires: OffsetDateTime,
        now: OffsetDateTime,
    ) -> Result<(), Error> {
        self.follow(used)?;
        enter(used, nonce, expires, now)?;
        let line = line(nonce, expires, now);
        let appended = self.append(&line).map_err(|source| Error::File {
            path: self.path.clone(),
            source,
        });
        appended.inspect_err(|_| {
            used.remove(nonce);
        })?;
        if self.read > MAX_FILE.max(2 * self.least) {
            used.retain(|_, (_, expires)| *expires > now);
            self.write_again(used).map_err(|source| Error::File {
                path: self.path.clone(),
                source,
            })?;
        }
        Ok(())
    }

    /// Reads what others have written. A last line without its end was never acknowledged.
    fn follow(&mut self, used: &mut Used) -> Result<(), Error> {
        let path = self.path.clone();
        let wrong = |source| Error::File {
            path: path.clone(),
            source,
        };
        // Somebody has written it again.
        let current = fs::metadata(&self.path).map_err(wrong)?;
        let own = self.file.metadata().map_err(wrong)?;
        if (current.dev(), current.ino()) != (own.dev(), own.ino()) {
            self.file = open(&self.path).map_err(wrong)?;
            (self.read, self.lines) = (0, 0);
            used.clear();
        }
        let mut text = String::new();
        self.file.seek(SeekFrom::Start(self.read)).map_err(wrong)?;
        self.file.read_to_string(&mut text).map_err(wrong)?;
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        for (index, text) in text[..whole].lines().enumerate() {
            let broken = || Error::Line {
                path: path.clone(),
                line: self.lines + index + 1,
            };
            let line: Line = serde_json::from_str(text).map_err(|_| broken())?;
            let time = |text| OffsetDateTime::parse(text, &Rfc3339).map_err(|_| broken());
            let times = (time(&line.consumed_at)?, time(&line.expires_at)?);
            used.insert(line.nonce, times);
        }
        self.lines += text[..whole].lines().count();
        self.read += whole as u64;
        Ok(())
    }

    fn append(&mut self, line: &str) -> io::Result<()> {
        self.file.set_len(self.read)?;
        self.file.seek(SeekFrom::Start(self.read))?;
        self.file.write_all(line.as_bytes())?;
        self.file.sync_data()?;
        self.read += line.len() as u64;
        self.lines += 1;
        Ok(())
    }

    fn write_again(&mut self, used: &Used) -> io::Result<()> {
        let mut name = self.path.as_os_str().to_owned();
        name.push(".new");
        let mut new = open(Path::new(&name))?;
        new.set_len(0)?;
        let lines: String = used
            .iter()
            .map(|(nonce, (consumed, expires))| line(nonce, *expires, *consumed))
            .collect();
        new.write_all(lines.as_bytes())?;
        new.sync_data()?;
        fs::rename(&name, &self.path)?;
        if let Some(folder) = self
            .path
            .parent()
            .filter(|folder| !folder.as_os_str().is_empty())
        {
            File::open(folder)?.sync_data()?;
        }
        (self.file, self.read) = (new, lines.len() as u64);
        (self.lines, self.least) = (used.len(), self.read);
        Ok(())
    }
}

fn enter(
    used: &mut Used,
    nonce: &str,
    expires: OffsetDateTime,
    now: OffsetDateTime,
) -> Result<(), Error> {
    if used.contains_key(nonce) {
        return Err(Error::Used);
    }
    if used.len() >= MAX_NONCES {
        used.retain(|_, (_, expires)| *expires > now);
        if used.len() >= MAX_NONCES {
            return Err(Error::Full);
        }
    }
    used.insert(nonce.into(), (now, expires));
    Ok(())
}

fn line(nonce: &str, expires: OffsetDateTime, now: OffsetDateTime) -> String {
    let line = Line {
        consumed_at: timestamp(now),
        expires_at: timestamp(expires),
        nonce: nonce.into(),
    };
    let line = serde_json::to_string(&line).expect("a line has texts alone");
    format!("{line}\n")
}

fn open(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    options.mode(0o600).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> OffsetDateTime {
        OffsetDateTime::from_unix_timestamp(1_900_000_000 + seconds).unwrap()
    }

    #[test]
    fn a_token_is_used_once_also_by_another_process_and_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("nonces");
        let (mut one, mut two) = (Nonces::open(&path).unwrap(), Nonces::open(&path).unwrap());
        one.consume("a", at(60), at(0)).unwrap();
        assert!(matches!(two.consume("a", at(60), at(0)), Err(Error::Used)));
        two.consume("b", at(60), at(0)).unwrap();
        assert!(matches!(one.consume("b", at(60), at(0)), Err(Error::Used)));
        let mut later = Nonces::open(&path).unwrap();
        assert!(matches!(
            later.consume("a", at(60), at(1)),
            Err(Error::Used)
        ));
    }

    #[test]
    fn of_many_at_once_one_may_use_a_token() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("nonces");
        let uses: usize = std::thread::scope(|scope| {
            let verifiers: Vec<_> = (0..8)
                .map(|_| {
                    scope.spawn(|| {
                        let mut store = Nonces::open(&path).unwrap();
                        usize::from(store.consume("same", at(60), at(0)).is_ok())
                    })
                })
                .collect();
            verifiers
                .into_iter()
                .map(|verifier| verifier.join().unwrap())
                .sum()
        });
        assert_eq!(uses, 1);
    }

    #[test]
    fn a_torn_last_line_is_removed_and_another_broken_one_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("nonces");
        Nonces::open(&path)
            .unwrap()
            .consume("a", at(60), at(0))
            .unwrap();
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(b"{\"consumed_at\":\"20").unwrap();
        Nonces::open(&path)
            .unwrap()
            .consume("b", at(60), at(0))
            .unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 2);
        file.write_all(b"nonsense\n").unwrap();
        let refused = Nonces::open(&path).unwrap().consume("c", at(60), at(0));
        assert!(
            matches!(refused, Err(Error::Line { line: 3, .. })),
            "{refused:?}"
        );
    }

    #[test]
    fn a_long_file_is_written_again_without_expired_tokens_under_all_who_have_it_open() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("nonces");
        let old: String = (0..40_000)
            .map(|index| line(&format!("old{index:064}"), at(10), at(0)))
            .collect();
        fs::write(&path, old).unwrap();
        let (mut one, mut two) = (Nonces::open(&path).unwrap(), Nonces::open(&path).unwrap());
        two.consume("before", at(90), at(5)).unwrap();
        one.consume("now", at(90), at(20)).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 2);
        for nonce in ["before", "now"] {
            assert!(matches!(
                two.consume(nonce, at(90), at(21)),
                Err(Error::Used)
            ));
        }
    }
}
