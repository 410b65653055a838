//! One output stream of a run: what its caller has not yet received, and some of what it
//! has. A sparse file in the driver's tmpfs holds each byte at its offset in the stream. So
//! the file alone shows what is kept, to this driver and to the next.
//!
//! ```text
//! 0 ......... base ........... delivered ............ end
//!      freed        kept behind          not yet sent
//! ```

use std::{
    fs::{self, File},
    io::{self, ErrorKind},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use bytes::Bytes;
use parking_lot::{Mutex, MutexGuard};
use rustix::{
    buffer::spare_capacity,
    fs::{FallocateFlags, SeekFrom, fallocate, seek},
    io::pread,
};

/// Most bytes that may wait for the caller before the command must wait.
pub(super) const MAX_WAITING: u64 = 3 << 20;
/// Bytes kept after they were sent, so that a caller whose connection broke finds what was
/// in flight: more than a shim and its connection hold, plus 2 MiB for the caller's
/// connection.
const MAX_BEHIND: u64 = 4 << 20;
/// Memory that is no longer needed is freed in pieces of this size.
const PIECE: u64 = 512 << 10;

/// The kept part of one stream.
#[derive(Debug)]
pub(super) struct Window {
    path: PathBuf,
    span: Mutex<Span>,
}

#[derive(Debug, Default)]
struct Span {
    /// `None` until there is output.
    file: Option<File>,
    base: u64,
    delivered: u64,
    end: u64,
}

/// What a window contains at an offset.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Piece {
    Bytes(Bytes),
    /// Nothing before `to` is kept.
    Gap {
        to: u64,
    },
    /// The command has not written more so far.
    End,
}

impl Window {
    /// An empty window; its file is created with the first byte.
    pub(super) fn new(path: PathBuf) -> Self {
        Self {
            path,
            span: Mutex::default(),
        }
    }

    /// Recovers what an earlier life of the driver left.
    pub(super) fn recover(path: PathBuf) -> io::Result<Self> {
        let file = match File::options().read(true).write(true).open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Self::new(path)),
            Err(error) => return Err(error),
        };
        let end = file.metadata()?.len();
        let base = match seek(&file, SeekFrom::Data(0)) {
            Ok(base) => base,
            // The file consists only of a hole.
            Err(rustix::io::Errno::NXIO) => end,
            Err(errno) => return Err(errno.into()),
        };
        // The kernel reports holes only by whole pages.
        let gap = fs::read_to_string(gap_file(&path)).ok();
        let base = base.max(gap.and_then(|to| to.parse().ok()).unwrap_or(0));
        let span = Span {
            file: Some(file),
            base,
            delivered: base,
            end,
        };
        Ok(Self {
            path,
            span: span.into(),
        })
    }

    /// Appends bytes that continue the stream, and skips known ones. Bytes beyond the end
    /// leave a gap, because what came before them is lost.
    ///
    /// # Errors
    /// If there is no memory for the bytes; they are not in the window then.
    pub(super) fn append(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut span = self.lock();
        let known = span.end.saturating_sub(offset);
        let Some(new) = usize::try_from(known)
            .ok()
            .and_then(|known| bytes.get(known..))
            .filter(|new| !new.is_empty())
        else {
            return Ok(());
        };
        if offset > span.end {
            fs::write(gap_file(&self.path), offset.to_string())?;
            span.base = offset;
            span.end = offset;
            span.delivered = span.delivered.max(offset);
        }
        if span.file.is_none() {
            let mut options = File::options();
            options.read(true).write(true).create(true).truncate(true);
            span.file = Some(options.open(&self.path)?);
        }
        let at = span.end;
        let file = span.file.as_ref().expect("it was opened above");
        file.write_all_at(new, at)?;
        span.end += new.len() as u64;
        Ok(())
    }

    /// How many bytes the caller has not yet received.
    pub(super) fn waiting(&self) -> u64 {
        let span = self.lock();
        span.end.saturating_sub(span.delivered)
    }

    /// Makes room by dropping the oldest bytes that the caller has not yet received.
    pub(super) fn drop_oldest(&self, needed: u64) {
        let mut span = self.lock();
        let least = (span.end + needed).saturating_sub(MAX_WAITING);
        if least > span.delivered {
            span.delivered = least;
            span.free_below(least);
            // Also within a piece: dropped bytes must not be read later.
            span.base = span.base.max(least);
        }
    }

    /// Up to `most` bytes from `offset` on.
    ///
    /// # Errors
    /// The kernel's error.
    pub(super) fn read(&self, offset: u64, most: usize) -> io::Result<Piece> {
        let span = self.lock();
        if offset < span.base {
            return Ok(Piece::Gap { to: span.base });
        }
        let (Some(file), true) = (&span.file, offset < span.end) else {
            return Ok(Piece::End);
        };
        let left = usize::try_from(span.end - offset).unwrap_or(usize::MAX);
        let mut bytes = Vec::with_capacity(most.min(left));
        pread(file, spare_capacity(&mut bytes), offset)?;
        if bytes.is_empty() {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        Ok(Piece::Bytes(bytes.into()))
    }

    /// The caller has received everything below `offset`.
    pub(super) fn deliver(&self, offset: u64) {
        let mut span = self.lock();
        span.delivered = span.delivered.max(offset.min(span.end));
        let least = span.delivered.saturating_sub(MAX_BEHIND);
        span.free_below(least);
    }

    /// Length of the stream so far.
    pub(super) fn end(&self) -> u64 {
        self.lock().end
    }

    /// Discards the stream: nobody can ask for it any longer.
    pub(super) fn release(&self) {
        let mut span = self.lock();
        span.file = None;
        span.base = span.end;
        for path in [&self.path, &gap_file(&self.path)] {
            match fs::remove_file(path) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    tracing::warn!(path = %path.display(), %error, "cannot remove output from memory");
                }
                _ => {}
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Span> {
        self.span.lock()
    }
}

impl Span {
    /// Frees the memory below `least`, in whole pieces.
    fn free_below(&mut self, least: u64) {
        let least = least - least % PIECE;
        let Some(file) = self.file.as_ref().filter(|_| least > self.base) else {
            return;
        };
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(file, hole, 0, least) {
            Ok(()) => self.base = least,
            Err(error) => tracing::debug!(%error, "cannot free memory of output"),
        }
    }
}

/// The file that records where the stream continues after lost bytes.
fn gap_file(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".gap");
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn window() -> (tempfile::TempDir, Window) {
        // On a file system with real holes, like the driver's own tmpfs.
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let window = Window::new(folder.path().join("run.stdout"));
        (folder, window)
    }

    /// The bytes from `offset` of a stream that never repeats within a window.
    fn bytes(offset: u64, len: usize) -> Vec<u8> {
        (offset..offset + len as u64)
            .map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8)
            .collect()
    }

    #[derive(Debug, Clone)]
    enum Step {
        Write(usize),
        /// Init resends what was not acknowledged on the broken connection.
        Repeat(u64, usize),
        Read(usize),
        DropOldest,
        Restart,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (1usize..200_000).prop_map(Step::Write),
            1 => (0u64..100_000, 1usize..200_000).prop_map(|(back, len)| Step::Repeat(back, len)),
            4 => (1usize..300_000).prop_map(Step::Read),
            1 => Just(Step::DropOldest),
            1 => Just(Step::Restart),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        /// Whatever is written, repeated, dropped or restarted, every written byte is read
        /// once or reported as a gap.
        #[test]
        fn every_byte_is_read_once_or_told_as_lost(steps in prop::collection::vec(step(), 0..150)) {
            let (folder, mut window) = window();
            let (mut end, mut read) = (0u64, 0u64);
            let take = |window: &Window, read: &mut u64, most| {
                let piece = window.read(*read, most).unwrap();
                match &piece {
                    Piece::Bytes(got) => {
                        assert_eq!(&got[..], &bytes(*read, got.len())[..]);
                        *read += got.len() as u64;
                        window.deliver(*read);
                    }
                    Piece::Gap { to } => *read = *to,
                    Piece::End => {}
                }
                piece
            };
            for step in steps {
                match step {
                    Step::Write(len) => {
                        let len = len.min(usize::try_from(MAX_WAITING.saturating_sub(window.waiting())).unwrap());
                        window.append(end, &bytes(end, len)).unwrap();
                        end += len as u64;
                    }
                    Step::Repeat(back, len) => {
                        let offset = end.saturating_sub(back);
                        let len = len.min(usize::try_from(end - offset + MAX_WAITING.saturating_sub(window.waiting())).unwrap());
                        window.append(offset, &bytes(offset, len)).unwrap();
                        end = end.max(offset + len as u64);
                    }
                    Step::Read(most) => { take(&window, &mut read, most); }
                    Step::DropOldest => window.drop_oldest(1 << 20),
                    Step::Restart => {
                        window = Window::recover(folder.path().join("run.stdout")).unwrap();
                        window.deliver(read);
                    }
                }
                prop_assert_eq!(window.end(), end);
                let held = { let span = window.lock(); span.end - span.base };
                prop_assert!(held <= MAX_WAITING + MAX_BEHIND + PIECE);
            }
            while take(&window, &mut read, 100_000) != Piece::End {}
            prop_assert_eq!(read, end);
        }
    }

    #[test]
    fn what_was_given_stays_for_a_caller_whose_connection_broke() {
        let (_folder, window) = window();
        let mut end = 0;
        while end < 20 << 20 {
            window.append(end, &bytes(end, 64 << 10)).unwrap();
            end += 64 << 10;
            window.deliver(end);
        }
        let Piece::Bytes(got) = window.read(end - MAX_BEHIND, 1000).unwrap() else {
            panic!("{MAX_BEHIND} bytes are kept")
        };
        assert_eq!(&got[..], &bytes(end - MAX_BEHIND, 1000)[..]);
        assert!(matches!(window.read(0, 1).unwrap(), Piece::Gap { .. }));
    }

    #[test]
    fn a_gap_is_a_gap_after_a_restart_too_and_of_its_own_stream() {
        let (folder, window) = window();
        let stderr = folder.path().join("run.stderr");
        Window::new(stderr.clone()).append(0, b"all").unwrap();
        window.append(5000, b"the rest").unwrap();
        assert_eq!(window.read(0, 10).unwrap(), Piece::Gap { to: 5000 });
        let window = Window::recover(folder.path().join("run.stdout")).unwrap();
        assert_eq!(window.read(0, 10).unwrap(), Piece::Gap { to: 5000 });
        assert_eq!(
            window.read(5000, 10).unwrap(),
            Piece::Bytes(Bytes::from_static(b"the rest"))
        );
        let stderr = Window::recover(stderr).unwrap();
        assert_eq!(
            stderr.read(0, 10).unwrap(),
            Piece::Bytes(Bytes::from_static(b"all"))
        );
    }

    #[test]
    fn the_memory_of_what_is_gone_is_given_back() {
        use std::os::unix::fs::MetadataExt;
        let (folder, window) = window();
        let path = folder.path().join("run.stdout");
        for index in 0..64 {
            window.append(index << 20, &vec![7; 1 << 20]).unwrap();
            window.deliver((index + 1) << 20);
            let held = fs::metadata(&path).unwrap().blocks() * 512;
            assert!(
                held <= MAX_BEHIND + (2 << 20),
                "{held} bytes after {index} MiB"
            );
        }
        window.release();
        assert!(!path.exists());
    }
}
