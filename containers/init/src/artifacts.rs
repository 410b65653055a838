//! The artifacts of a run. Init reads them from the workspace when the command has ended. Only
//! init runs in the container then, so no file can be replaced between a check and its use.

use std::{
    collections::VecDeque,
    fs::{self, File, Metadata, OpenOptions},
    io::{self, ErrorKind, Read},
    os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use nix::fcntl::OFlag;
use polydev_proto::{
    init::{Artifact, ArtifactRules, Artifacts, LeftOut},
    workspace::{MAX_PATH, Patterns},
};

/// Most files and folders that the search for artifacts visits, because the caller waits
/// for it.
const MAX_ENTRIES: usize = 100_000;
/// Most bytes that the search keeps of them: it is the run's memory.
const MAX_HELD: usize = 8 << 20;
/// Time limit of that search.
const SEARCH_TIMEOUT: Duration = Duration::from_secs(10);
/// How many of the files that are left out are named.
const MAX_NAMED: usize = 100;

/// The contents of the artifacts, read as they can be sent.
#[derive(Debug)]
pub(crate) struct Outgoing {
    root: PathBuf,
    files: VecDeque<Artifact>,
    open: Option<File>,
    missing: u64,
}

impl Outgoing {
    /// Looks for the requested artifacts.
    pub(crate) fn collect(root: &Path, rules: &ArtifactRules) -> (Artifacts, Self) {
        let artifacts = match Patterns::new(rules) {
            Ok(patterns) => {
                let found = find(root, &patterns);
                let paths: Vec<&str> = found.iter().map(|(path, _)| path.as_str()).collect();
                let missing: Vec<&str> = patterns.unmatched(&paths).collect();
                let mut artifacts = choose(root, &found, rules);
                for pattern in missing {
                    leave_out(&mut artifacts, pattern.to_owned(), "there is no such file");
                }
                artifacts
            }
            // The driver has checked the rules.
            Err(invalid) => {
                let mut none = Artifacts::default();
                leave_out(&mut none, String::new(), &invalid.to_string());
                none
            }
        };
        let outgoing = Self {
            root: root.to_owned(),
            files: artifacts.files.iter().cloned().collect(),
            open: None,
            missing: 0,
        };
        (artifacts, outgoing)
    }

    /// The next bytes; 0 at the end.
    ///
    /// # Errors
    /// If the bytes cannot be read; no more follow.
    pub(crate) fn read(&mut self, chunk: &mut [u8]) -> io::Result<usize> {
        while self.missing == 0 {
            let Some(next) = self.files.pop_front() else {
                return Ok(0);
            };
            if next.size > 0 {
                self.open = Some(open(&self.root.join(&next.path))?);
                self.missing = next.size;
            }
        }
        let Some(open) = &mut self.open else {
            return Err(ErrorKind::NotFound.into());
        };
        let most = usize::try_from(self.missing).unwrap_or(usize::MAX);
        let most = most.min(chunk.len());
        match open.read(&mut chunk[..most])? {
            0 => Err(ErrorKind::UnexpectedEof.into()),
            count => {
                self.missing -= count as u64;
                Ok(count)
            }
        }
    }
}

/// A file that matches a pattern: its path, and its metadata or why it has none.
type Found = (String, Result<Metadata, String>);

/// All files that match a pattern, sorted by path.
fn find(root: &Path, patterns: &Patterns) -> Vec<Found> {
    let mut found = Vec::new();
    let mut folders = vec![root.to_owned()];
    let (mut looked_at, mut held, begun) = (0, 0, Instant::now());
    'search: while let Some(folder) = folders.pop() {
        let entries = match fs::read_dir(&folder) {
            Ok(entries) => entries,
            Err(error) => {
                found.push((relative(root, &folder), Err(error.to_string())));
                continue;
            }
        };
        for entry in entries.flatten() {
            looked_at += 1;
            if looked_at > MAX_ENTRIES || held > MAX_HELD || begun.elapsed() > SEARCH_TIMEOUT {
                let (mib, seconds) = (MAX_HELD >> 20, SEARCH_TIMEOUT.as_secs());
                let reason = format!(
                    "the search ended after {MAX_ENTRIES} files, {mib} MiB of names or {seconds} s; the remaining files were not considered"
                );
                found.push((relative(root, &folder), Err(reason)));
                break 'search;
            }
            let path = entry.path();
            // Of a link itself, not of its target.
            let metadata = entry.metadata();
            if metadata.as_ref().is_ok_and(Metadata::is_dir) {
                held += path.as_os_str().len() + size_of::<PathBuf>();
                folders.push(path.clone());
            }
            let relative = relative(root, &path);
            if patterns.want(&relative) {
                let is_text = path.to_str().is_some() && !relative.chars().any(char::is_control);
                let metadata = match metadata {
                    _ if !is_text || relative.len() > MAX_PATH => {
                        Err("its path is too long or not plain text".to_owned())
                    }
                    metadata => metadata.map_err(|error| error.to_string()),
                };
                held += relative.len() + size_of::<Found>();
                found.push((relative, metadata));
            }
        }
    }
    found.sort_by(|(a, _), (b, _)| a.cmp(b));
    found
}

fn relative(root: &Path, path: &Path) -> String {
    let relative = path.strip_prefix(root).unwrap_or(path);
    relative.to_string_lossy().into_owned()
}

fn choose(root: &Path, found: &[Found], rules: &ArtifactRules) -> Artifacts {
    let mut artifacts = Artifacts::default();
    let (mut left, most) = (rules.max_bytes, rules.max_files as usize);
    for (path, metadata) in found {
        let taken = metadata
            .as_ref()
            .map_err(String::clone)
            .and_then(|metadata| {
                let size = metadata.len();
                match kind(metadata) {
                    Some(kind) => Err(format!("it is a {kind}")),
                    None if artifacts.files.len() >= most => {
                        Err(format!("there are more than {most} artifacts"))
                    }
                    None if size > left => Err(format!(
                        "its {size} bytes exceed the limit, of which {left} bytes are left"
                    )),
                    None => readable(&root.join(path), size).map(|()| metadata),
                }
            });
        match taken {
            Ok(metadata) => {
                left -= metadata.len();
                artifacts.files.push(Artifact {
                    path: path.clone(),
                    mode: metadata.permissions().mode() & 0o777,
                    size: metadata.len(),
                });
            }
            Err(reason) => leave_out(&mut artifacts, path.clone(), &reason),
        }
    }
    artifacts
}

/// Checks that its bytes can be read.
fn readable(path: &Path, size: u64) -> Result<(), String> {
    match size {
        0 => Ok(()),
        _ => open(path).map(drop).map_err(|error| error.to_string()),
    }
}

fn open(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(OFlag::O_NOFOLLOW.bits());
    options.open(path)
}

/// The kind of a file that is not regular.
fn kind(metadata: &Metadata) -> Option<&'static str> {
    let kind = metadata.file_type();
    match kind {
        _ if kind.is_file() => None,
        _ if kind.is_dir() => Some("folder"),
        _ if kind.is_symlink() => Some("link"),
        _ if kind.is_fifo() => Some("FIFO"),
        _ if kind.is_socket() => Some("socket"),
        _ => Some("device"),
    }
}

fn leave_out(artifacts: &mut Artifacts, path: String, reason: &str) {
    artifacts.left_out_count += 1;
    if artifacts.left_out.len() < MAX_NAMED {
        let path = path[..path.floor_char_boundary(MAX_PATH)].to_owned();
        let reason = reason.to_owned();
        artifacts.left_out.push(LeftOut { path, reason });
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use nix::{sys::stat::Mode, unistd::mkfifo};

    use super::*;

    fn rules(patterns: &[&str], max_bytes: u64, max_files: u32) -> ArtifactRules {
        ArtifactRules {
            patterns: patterns.iter().map(|text| (*text).to_owned()).collect(),
            max_bytes,
            max_files,
        }
    }

    fn paths(artifacts: &Artifacts) -> Vec<&str> {
        artifacts.files.iter().map(|file| &*file.path).collect()
    }

    #[test]
    fn artifacts_are_read_in_the_order_of_their_paths() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("out/deep")).unwrap();
        for (path, content) in [
            ("out/b", "second"),
            ("out/a", "first"),
            ("out/deep/c", "third"),
            ("other", "x"),
        ] {
            fs::write(root.path().join(path), content).unwrap();
        }
        let (artifacts, mut outgoing) =
            Outgoing::collect(root.path(), &rules(&["out/**/*"], 100, 10));
        assert_eq!(paths(&artifacts), ["out/a", "out/b", "out/deep/c"]);
        assert_eq!(artifacts.left_out[0].reason, "it is a folder");
        let (mut read, mut chunk) = (Vec::new(), [0; 4]);
        loop {
            match outgoing.read(&mut chunk).unwrap() {
                0 => break,
                count => read.extend_from_slice(&chunk[..count]),
            }
        }
        assert_eq!(read, b"firstsecondthird");
    }

    #[test]
    fn links_fifos_and_what_goes_beyond_a_limit_are_left_out() {
        let root = tempfile::tempdir().unwrap();
        symlink("/etc/passwd", root.path().join("link")).unwrap();
        mkfifo(&root.path().join("fifo"), Mode::S_IRWXU).unwrap();
        symlink("/etc", root.path().join("etc")).unwrap();
        for (path, size) in [("large", 9), ("m", 5), ("n", 5), ("z", 0)] {
            fs::write(root.path().join(path), vec![0; size]).unwrap();
        }
        let (artifacts, _) = Outgoing::collect(root.path(), &rules(&["*", "etc/*"], 8, 2));
        assert_eq!(paths(&artifacts), ["m", "z"]);
        let left_out = artifacts.left_out.iter();
        let left_out: Vec<_> = left_out.map(|file| (&*file.path, &*file.reason)).collect();
        assert_eq!(
            left_out,
            [
                ("etc", "it is a link"),
                ("fifo", "it is a FIFO"),
                (
                    "large",
                    "its 9 bytes exceed the limit, of which 8 bytes are left"
                ),
                ("link", "it is a link"),
                (
                    "n",
                    "its 5 bytes exceed the limit, of which 3 bytes are left"
                ),
                ("etc/*", "there is no such file"),
            ]
        );
        let (artifacts, _) = Outgoing::collect(root.path(), &rules(&["?"], 100, 2));
        assert_eq!(
            (paths(&artifacts), artifacts.left_out_count),
            (vec!["m", "n"], 1)
        );
    }

    #[test]
    fn names_without_end_fill_no_memory() {
        let root = tempfile::tempdir().unwrap();
        let mut folder = root.path().to_owned();
        for _ in 0..3 {
            folder.push("f".repeat(250));
        }
        fs::create_dir_all(&folder).unwrap();
        for number in 0..10_000 {
            File::create(folder.join(format!("{number:0>250}"))).unwrap();
        }
        let patterns = Patterns::new(&rules(&["**/*"], 0, 0)).unwrap();
        let found = find(root.path(), &patterns);
        let held: usize = found
            .iter()
            .map(|(path, _)| path.len() + size_of::<Found>())
            .sum();
        assert!(held < MAX_HELD + (8 << 10), "{held}");
        let ended = found
            .iter()
            .find_map(|(_, metadata)| metadata.as_ref().err());
        assert!(ended.unwrap().contains("8 MiB of names"), "{ended:?}");
    }
}
