//! A connection that knows its caller.

use std::{
    fmt, io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::OwnedSemaphorePermit,
    time::{Sleep, sleep},
};
use tonic::transport::server::Connected;

/// The caller's name: `uid:1000` for a Unix socket, `loopback`, or the name in the
/// certificate, `spiffe://...` or `cn:NAME`. A shim names a caller with a token `sub:` plus
/// its subject.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller(pub String);

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The name of a caller that has not identified itself.
pub const NOBODY: &str = "";

/// How long an unidentified caller may send nothing.
const SILENT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the other end may accept no data before the connection is closed: as long as
/// HTTP/2 waits for an answer to its pings, which HTTP/1 lacks.
const STALLED_TIMEOUT: Duration = Duration::from_secs(300);

/// A caller's connection. Its requests have [`Caller`] in their extensions.
pub struct Connection {
    stream: Box<dyn Stream>,
    /// Runs while data waits to be written.
    stalled: Option<Pin<Box<Sleep>>>,
    /// Runs until the first byte is read from an unidentified caller.
    silent: Option<Pin<Box<Sleep>>>,
    /// Limits the number of unidentified callers.
    _place: Option<OwnedSemaphorePermit>,
    /// The caller at the other end.
    pub caller: Caller,
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

impl Connection {
    /// The connection of a caller with this name.
    pub fn new(
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
        caller: String,
    ) -> Self {
        Self {
            stream: Box::new(stream),
            stalled: None,
            silent: None,
            _place: None,
            caller: Caller(caller),
        }
    }

    /// The connection of an unidentified caller, which must send something soon.
    pub fn of_nobody(
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
        place: OwnedSemaphorePermit,
    ) -> Self {
        Self {
            silent: Some(Box::pin(sleep(SILENT_TIMEOUT))),
            _place: Some(place),
            ..Self::new(stream, NOBODY.into())
        }
    }
}

impl Connection {
    fn unless_stalled<T>(
        &mut self,
        cx: &mut Context,
        written: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let stalled = self
            .stalled
            .get_or_insert_with(|| Box::pin(sleep(STALLED_TIMEOUT)));
        match stalled.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl Connected for Connection {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        self.caller.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context,
        buf: &mut ReadBuf,
    ) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        match &mut self.silent {
            Some(silent) if read.is_pending() => match silent.as_mut().poll(cx) {
                Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
                Poll::Pending => Poll::Pending,
            },
            _ => {
                self.silent = None;
                read
            }
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.unless_stalled(cx, written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        self.unless_stalled(cx, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context,
        bufs: &[io::IoSlice],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.unless_stalled(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    #[tokio::test(start_paused = true)]
    async fn who_takes_nothing_for_long_is_given_up() {
        let (stream, mut other) = duplex(4);
        let mut connection = Connection::new(stream, "tester".into());
        // Slow is not stalled.
        let slow = async {
            for _ in 0..4 {
                tokio::time::sleep(STALLED_TIMEOUT / 2).await;
                other.read_exact(&mut [0; 4]).await.expect("it is there");
            }
        };
        let (written, ()) = tokio::join!(connection.write_all(&[0; 20]), slow);
        written.expect("it is taken in time");
        let stalled = connection.write_all(&[0; 20]).await;
        assert_eq!(
            stalled.expect_err("nobody reads").kind(),
            io::ErrorKind::TimedOut
        );
    }
}
