//! Reads the files of a log, and says where one was changed, cut or left out.

use std::{
    fmt,
    fs::{self, File},
    io::{self, BufRead, BufReader, Read},
    path::{Path, PathBuf},
};

use super::{
    Error,
    chain::{BEGIN, Code, Entry, Key, Line},
};

/// Longest line, in bytes: several texts of a kilobyte, each byte as an escape.
const MAX_LINE: usize = 64 << 10;

/// What is wrong with a log, and where.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("`{}`, line {line}: {why}", path.display())]
pub struct Broken {
    pub path: PathBuf,
    /// Counts from 1. 0 is the file as a whole.
    pub line: u64,
    pub why: Why,
}

/// What is wrong with a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    NoLine,
    Changed { number: u64 },
    Place { expected: u64, found: u64 },
    NoBegin,
    Incomplete,
    Cut { last: u64, head: u64 },
    NoHead,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoLine => f.write_str("this is no line of an audit log"),
            Self::Changed { number } => write!(f, "line {number} of the log was changed"),
            Self::Place { expected, found } => write!(
                f,
                "line {found} of the log is here in place of line {expected}: lines are missing, \
                 or are in another order"
            ),
            Self::NoBegin => f.write_str("the file does not begin as a file of this log"),
            Self::Incomplete => f.write_str("the line has no end, and the next file follows"),
            Self::Cut { last, head } => write!(
                f,
                "the log ends with line {last}, but had line {head}: its end is missing"
            ),
            Self::NoHead => f.write_str(
                "`head` is missing or was changed, so nobody can say if the log's end is missing",
            ),
        }
    }
}

/// Where a log ends.
#[derive(Debug, PartialEq, Eq)]
pub struct End {
    /// The number of the first line that was read.
    pub first: u64,
    pub last: u64,
    pub code: Code,
    /// The last file, and its length without an incomplete line.
    pub path: PathBuf,
    pub length: u64,
}

/// The file whose first line has this number.
pub(super) fn path(folder: &Path, first: u64) -> PathBuf {
    folder.join(format!("audit-{first:020}.jsonl"))
}

/// What `head` contains while this line is the last one.
pub(super) fn head(key: &Key, number: u64, code: &Code) -> String {
    let text = format!("{number:020} {}", hex::encode(code));
    format!("{text} {}\n", hex::encode(key.code(&BEGIN, &text)))
}

/// The numbers of the first lines of a folder's files, in order.
///
/// # Errors
/// [`Error::Read`]
pub(super) fn files(folder: &Path) -> Result<Vec<u64>, Error> {
    let wrong = |source| Error::Read {
        path: folder.into(),
        source,
    };
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(wrong)? {
        let name = entry.map_err(wrong)?.file_name();
        let number = name
            .to_str()
            .and_then(|name| name.strip_prefix("audit-")?.strip_suffix(".jsonl"));
        files.extend(number.and_then(|number| number.parse::<u64>().ok()));
    }
    files.sort_unstable();
    Ok(files)
}

/// Reads a log, or its last files, and gives each line to `each`. A shim may be writing meanwhile.
/// `None` if there is no line.
///
/// # Errors
/// [`Error::Broken`] for the first line that is wrong, or [`Error::Read`].
pub fn read(
    folder: &Path,
    key: &Key,
    most: usize,
    mut each: impl FnMut(Line),
) -> Result<Option<End>, Error> {
    // First, because the log becomes longer.
    let known = known(folder, key)?;
    let files = files(folder)?;
    let mut left = &files[files.len().saturating_sub(most)..];
    let mut end: Option<End> = None;
    while let [first, later @ ..] = left {
        let path = path(folder, *first);
        let wrong = |source| Error::Read {
            path: path.clone(),
            source,
        };
        let reader = BufReader::new(File::open(&path).map_err(wrong)?);
        let mut lines = Lines {
            key,
            path: &path,
            line: 0,
            length: 0,
            end: end.take(),
        };
        let is_complete = lines.read(reader, *first, &mut each)?;
        if !is_complete && !later.is_empty() {
            return Err(lines.broken(Why::Incomplete).into());
        }
        end = lines.end;
        left = later;
    }
    let (last, code) = end.as_ref().map_or((0, BEGIN), |end| (end.last, end.code));
    let why = match known {
        // Lines that are not in `head` yet are no error.
        Some((head, of_head)) if head > last || (head == last && of_head != code) => {
            Why::Cut { last, head }
        }
        Some(_) => return Ok(end),
        // The begin of the first file is written before `head`.
        None if last <= 1 => return Ok(end),
        None => Why::NoHead,
    };
    Err(Broken {
        path: end.map_or_else(|| folder.into(), |end| end.path),
        line: 0,
        why,
    }
    .into())
}

/// The number and the code in `head`, which is written as a whole. `None` if there is none.
fn known(folder: &Path, key: &Key) -> Result<Option<(u64, Code)>, Error> {
    let path = folder.join("head");
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(Error::Read { path, source }),
    };
    match parsed(&text) {
        Some((number, code)) if text == head(key, number, &code) => Ok(Some((number, code))),
        _ => Err(Broken {
            path,
            line: 1,
            why: Why::NoHead,
        }
        .into()),
    }
}

fn parsed(head: &str) -> Option<(u64, Code)> {
    let mut words = head.split(' ');
    let number = words.next()?.parse().ok()?;
    let mut code = Code::default();
    hex::decode_to_slice(words.next()?, &mut code).ok()?;
    Some((number, code))
}

/// Reads one file.
struct Lines<'a> {
    key: &'a Key,
    path: &'a Path,
    line: u64,
    length: u64,
    /// Where the log ends so far.
    end: Option<End>,
}

impl Lines<'_> {
    /// Returns whether the last line is complete. A file without a complete line is as if it were
    /// not there.
    fn read(
        &mut self,
        mut reader: impl BufRead,
        first: u64,
        each: &mut impl FnMut(Line),
    ) -> Result<bool, Error> {
        let mut bytes = Vec::new();
        loop {
            bytes.clear();
            self.line += 1;
            let most = MAX_LINE as u64;
            let read = reader.by_ref().take(most).read_until(b'\n', &mut bytes);
            read.map_err(|source| Error::Read {
                path: self.path.into(),
                source,
            })?;
            if bytes.pop_if(|last| *last == b'\n').is_none() {
                match bytes.len() {
                    0 => return Ok(self.line > 1),
                    MAX_LINE => return Err(self.broken(Why::NoLine).into()),
                    _ => return Ok(false),
                }
            }
            let line = self.take(&bytes, first)?;
            self.length += bytes.len() as u64 + 1;
            if let Some(end) = &mut self.end {
                end.length = self.length;
            }
            each(line);
        }
    }

    fn take(&mut self, bytes: &[u8], first: u64) -> Result<Line, Error> {
        let text = str::from_utf8(bytes).map_err(|_| self.broken(Why::NoLine))?;
        let previous = match &self.end {
            Some(end) => end.code,
            // Earlier files are elsewhere: what they ended with is in the first line.
            None => previous(text).ok_or_else(|| self.broken(Why::NoBegin))?,
        };
        let read = Line::read(self.key, &previous, text);
        let (line, code) = read.ok_or_else(|| self.broken(Why::NoLine))?;
        let expected = self.end.as_ref().map_or(first, |end| end.last + 1);
        if line.number != expected {
            let found = line.number;
            return Err(self.broken(Why::Place { expected, found }).into());
        }
        let number = line.number;
        let code = code.ok_or_else(|| self.broken(Why::Changed { number }))?;
        let is_begin = match &line.entry {
            Entry::Begin { previous: said } => *said == hex::encode(previous),
            Entry::Record(_) => false,
        };
        if is_begin != (self.line == 1) {
            return Err(self.broken(Why::NoBegin).into());
        }
        self.end = Some(End {
            first: self.end.as_ref().map_or(first, |end| end.first),
            last: number,
            code,
            path: self.path.into(),
            length: self.length,
        });
        Ok(line)
    }

    fn broken(&self, why: Why) -> Broken {
        Broken {
            path: self.path.into(),
            line: self.line,
            why,
        }
    }
}

/// What the first line of a file says of the file before.
fn previous(text: &str) -> Option<Code> {
    match serde_json::from_str(text).ok()? {
        Line {
            entry: Entry::Begin { previous },
            ..
        } => {
            let mut code = Code::default();
            hex::decode_to_slice(previous, &mut code).ok()?;
            Some(code)
        }
        Line { .. } => None,
    }
}
