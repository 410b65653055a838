//! How a plain task's output reaches Nomad: through FIFOs that init writes to, or, if
//! dockerd keeps the output, through copies by the driver.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileTypeExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use bytes::BytesMut;
use futures_util::StreamExt;
use nix::fcntl::OFlag;
use rustix::io::ioctl_fionread;
use tokio::{
    io::AsyncWriteExt,
    net::unix::pipe,
    time::{Instant, sleep},
};

use crate::docker::{Docker, Piece};

/// Time between attempts to continue reading after an outage of dockerd.
const RETRY_INTERVAL: Duration = Duration::from_millis(500);
/// How often to record how far the output has been read.
const MARK_INTERVAL: Duration = Duration::from_secs(1);
/// How often to check whether Nomad has read everything.
const OPEN_INTERVAL: Duration = Duration::from_millis(5);
/// Most pieces from dockerd that are written at once.
const PIECES: usize = 512;
/// How long a complete copy waits until Nomad has read the FIFOs. Nomad reads the 64 KiB of a
/// FIFO in milliseconds, if it reads at all.
const READ_TIMEOUT: Duration = Duration::from_secs(10);

/// Opens one of Nomad's FIFOs for writing. It is open for reading too, so opening never
/// waits for Nomad, and neither side sees an end when the other goes away for a while. A
/// task without logs has `/dev/null`, which is opened the same way.
///
/// # Errors
/// If the file is missing or of another kind: a task with access to the folder must not
/// make the driver write to a file of the host.
pub(super) fn open(path: &Path) -> io::Result<File> {
    let flags = OFlag::O_NONBLOCK | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags.bits())
        .open(path)?;
    if file.metadata()?.file_type().is_fifo() || is_nowhere(path) {
        Ok(file)
    } else {
        Err(io::Error::other("it is not a FIFO"))
    }
}

/// Whether no output is collected.
pub(super) fn is_nowhere(path: &Path) -> bool {
    path == Path::new(NOWHERE)
}

/// Nomad's path for a task without logs.
const NOWHERE: &str = "/dev/null";

/// Copies a container's output from dockerd until the container has ended and Nomad has
/// read everything, for which it has [`READ_TIMEOUT`]. After an outage of dockerd or the
/// driver, copying resumes at the second in which it stopped, so lines of that second may
/// appear twice. `since` is that second, or `None` for a new container. `mark` is called
/// after output was written, at most once a second.
pub(super) async fn pump(
    docker: Docker,
    container: String,
    since: Option<SystemTime>,
    paths: [PathBuf; 2],
    mark: impl Fn(),
    progress: Arc<AtomicU64>,
) {
    let sinks = paths.map(|path| Sink::open(&path));
    let [stdout, stderr] = match sinks {
        [Ok(stdout), Ok(stderr)] => [stdout, stderr],
        [Err(error), _] | [_, Err(error)] => {
            tracing::warn!(container, %error, "cannot collect a task's output");
            return;
        }
    };
    let mut sinks = Sinks {
        stdout,
        stderr,
        progress,
    };
    let mut is_whole = since.is_none();
    let mut since = since.unwrap_or(SystemTime::UNIX_EPOCH);
    let mut marked = Instant::now();
    loop {
        let output = match docker.output(&container, seconds(since), true) {
            Ok(output) => output,
            Err(error) => {
                tracing::debug!(
                    container,
                    error = crate::chain(&error),
                    "reading output again"
                );
                sleep(RETRY_INTERVAL).await;
                continue;
            }
        };
        let mut output = std::pin::pin!(output.ready_chunks(PIECES));
        let broken = loop {
            match output
                .next()
                .await
                .map(|pieces| pieces.into_iter().collect::<Result<Vec<_>, _>>())
            {
                Some(Ok(pieces)) => sinks.write(pieces).await,
                Some(Err(error)) => break Some(error),
                None => break None,
            }
            since = SystemTime::now();
            if marked.elapsed() > MARK_INTERVAL {
                marked = Instant::now();
                mark();
            }
        };
        match broken {
            // dockerd became unavailable.
            Some(error) if !error.is_answer() => {
                tracing::debug!(
                    container,
                    error = crate::chain(&error),
                    "reading output again"
                );
                is_whole = false;
                sleep(RETRY_INTERVAL).await;
            }
            Some(error) => {
                tracing::info!(
                    container,
                    error = crate::chain(&error),
                    "cannot read output back"
                );
                break;
            }
            None => break,
        }
    }
    if is_whole {
        catch_up(&docker, &container, &mut sinks).await;
    }
    let begin = Instant::now();
    while begin.elapsed() < READ_TIMEOUT && (sinks.stdout.has_unread() || sinks.stderr.has_unread())
    {
        sleep(OPEN_INTERVAL).await;
    }
}

/// Writes what dockerd left out: its stream may end with the container, before the last lines.
async fn catch_up(docker: &Docker, container: &str, sinks: &mut Sinks) {
    let mut skip = [sinks.stdout.written, sinks.stderr.written];
    let Ok(output) = docker.output(container, 0, false) else {
        return;
    };
    let mut output = std::pin::pin!(output.ready_chunks(PIECES));
    while let Some(pieces) = output.next().await {
        let mut rest = Vec::new();
        for piece in pieces.into_iter().flatten() {
            let (Piece::Stdout(data) | Piece::Stderr(data)) = &piece;
            let skip = &mut skip[usize::from(matches!(piece, Piece::Stderr(_)))];
            let known = usize::try_from(*skip).unwrap_or(usize::MAX).min(data.len());
            *skip -= known as u64;
            let new = data.slice(known..);
            rest.push(match piece {
                Piece::Stdout(_) => Piece::Stdout(new),
                Piece::Stderr(_) => Piece::Stderr(new),
            });
        }
        sinks.write(rest).await;
    }
}

struct Sinks {
    stdout: Sink,
    stderr: Sink,
    /// Bytes written, to see whether Nomad reads.
    progress: Arc<AtomicU64>,
}

/// One of Nomad's FIFOs.
struct Sink {
    /// `None` if nothing needs to be written.
    fifo: Option<pipe::Sender>,
    written: u64,
}

impl Sinks {
    /// dockerd sends each line separately; they are written together.
    async fn write(&mut self, pieces: Vec<Piece>) {
        let (mut stdout, mut stderr) = (BytesMut::new(), BytesMut::new());
        for piece in pieces {
            match piece {
                Piece::Stdout(data) => stdout.extend_from_slice(&data),
                Piece::Stderr(data) => stderr.extend_from_slice(&data),
            }
        }
        for (sink, data) in [(&mut self.stdout, stdout), (&mut self.stderr, stderr)] {
            sink.write(&data).await;
            self.progress
                .fetch_add(data.len() as u64, Ordering::Relaxed);
        }
    }
}

impl Sink {
    fn open(path: &Path) -> io::Result<Self> {
        let fifo = if is_nowhere(path) {
            None
        } else {
            Some(pipe::Sender::from_file_unchecked(open(path)?)?)
        };
        Ok(Self { fifo, written: 0 })
    }

    /// A full FIFO stops dockerd's stream and, in the end, the task.
    async fn write(&mut self, data: &[u8]) {
        self.written += data.len() as u64;
        if let Some(fifo) = &mut self.fifo
            && let Err(error) = fifo.write_all(data).await
        {
            tracing::warn!(%error, "cannot write a task's output; it is lost");
        }
    }

    fn has_unread(&self) -> bool {
        let unread = self.fifo.as_ref().map(ioctl_fionread);
        matches!(unread, Some(Ok(1..)))
    }
}

fn seconds(time: SystemTime) -> i32 {
    let since = time
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    i32::try_from(since.as_secs()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A task with access to the logs' folder must not redirect the driver's writes.
    #[test]
    fn only_a_fifo_is_written_to() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        nix::unistd::mkfifo(&path("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        std::fs::write(path("file"), "").unwrap();
        std::os::unix::fs::symlink(path("fifo"), path("link")).unwrap();
        assert!(open(&path("fifo")).is_ok() && open(Path::new(NOWHERE)).is_ok());
        for wrong in ["file", "link", "missing"] {
            assert!(open(&path(wrong)).is_err(), "{wrong}");
        }
    }
}
