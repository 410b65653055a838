//! A connection that knows its caller.

use std::{
    fmt, io,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::oneshot,
    time::{Sleep, sleep},
};
use tonic::transport::server::Connected;

use crate::places::Place;

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

/// How long a caller without a certificate may take to identify itself.
const UNKNOWN_TIMEOUT: Duration = Duration::from_secs(10);
/// Longer than a connection lives, and not too long for a timer.
const MAX_SLEEP: Duration = Duration::from_secs(365 * 24 * 60 * 60);
/// How long the other end may accept no data before the connection is closed: as long as
/// HTTP/2 waits for an answer to its pings, which HTTP/1 lacks.
const STALLED_TIMEOUT: Duration = Duration::from_secs(300);

/// Where a connection comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// A process of this machine, through a Unix socket.
    Process {
        uid: u32,
        pid: Option<i32>,
    },
    Address(SocketAddr),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process { uid, pid: None } => write!(f, "uid {uid}"),
            Self::Process {
                uid,
                pid: Some(pid),
            } => write!(f, "uid {uid}, pid {pid}"),
            Self::Address(address) => address.fmt(f),
        }
    }
}

/// What a connection says of its caller. Its requests have it in their extensions.
#[derive(Debug, Clone)]
pub struct Known {
    pub caller: Caller,
    pub origin: Origin,
    is_known: Arc<AtomicBool>,
}

impl Known {
    /// The caller has identified itself: its connection may stay.
    pub fn stays(&self) {
        self.is_known.store(true, Ordering::Relaxed);
    }
}

/// A caller's connection. Its requests have [`Known`] in their extensions.
pub struct Connection {
    stream: Box<dyn Stream>,
    /// Runs while data waits to be written.
    stalled: Option<Pin<Box<Sleep>>>,
    /// Until the caller has identified itself.
    unknown: Option<Unknown>,
    /// Runs until the caller's certificate expires.
    expires: Option<Pin<Box<Sleep>>>,
    /// Says that the caller's certificate is taken back.
    revoked: Option<oneshot::Receiver<()>>,
    /// The certificate is no longer valid, or the caller has stayed unknown for too long.
    is_over: bool,
    pub known: Known,
}

struct Unknown {
    ends: Pin<Box<Sleep>>,
    place: Place,
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

impl Connection {
    /// The connection of a caller with this name.
    pub fn new(
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
        caller: String,
        origin: Origin,
    ) -> Self {
        Self {
            stream: Box::new(stream),
            stalled: None,
            unknown: None,
            expires: None,
            revoked: None,
            is_over: false,
            known: Known {
                caller: Caller(caller),
                origin,
                is_known: Arc::default(),
            },
        }
    }

    /// The connection of a caller that has to [identify itself](Known::stays) within ten seconds,
    /// and while there are not too many others.
    pub fn of_nobody(
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
        origin: Origin,
        place: Place,
    ) -> Self {
        let unknown = Unknown {
            ends: Box::pin(sleep(UNKNOWN_TIMEOUT)),
            place,
        };
        Self {
            unknown: Some(unknown),
            ..Self::new(stream, NOBODY.into(), origin)
        }
    }

    /// The same, which ends when the caller's certificate does.
    #[must_use]
    pub fn until(self, not_after: SystemTime) -> Self {
        let left = not_after.duration_since(SystemTime::now());
        let left = left.unwrap_or_default().min(MAX_SLEEP);
        Self {
            expires: Some(Box::pin(sleep(left))),
            ..self
        }
    }

    /// The same, which ends when the other half of `revoked` says so. Without that half it continues.
    #[must_use]
    pub fn unless(self, revoked: oneshot::Receiver<()>) -> Self {
        Self {
            revoked: Some(revoked),
            ..self
        }
    }

    /// Fails when the caller's certificate is no longer valid.
    fn check(&mut self, context: &mut Context) -> io::Result<()> {
        let expires = self.expires.as_mut();
        if expires.is_some_and(|expires| expires.as_mut().poll(context).is_ready()) {
            self.expires = None;
            self.is_over = true;
            let caller = &self.known.caller;
            tracing::info!(%caller, "ended a connection: its certificate has expired");
        }
        let revoked = self.revoked.as_mut();
        if let Some(Poll::Ready(said)) = revoked.map(|revoked| Pin::new(revoked).poll(context)) {
            self.revoked = None;
            self.is_over |= said.is_ok();
        }
        match self.is_over {
            true => Err(io::ErrorKind::TimedOut.into()),
            false => Ok(()),
        }
    }

    /// Whether the caller had its chance to identify itself, and did not.
    fn poll_unknown(&mut self, context: &mut Context) -> Poll<()> {
        let is_known = &self.known.is_known;
        let unknown = self.unknown.take_if(|_| is_known.load(Ordering::Relaxed));
        drop(unknown);
        let Some(Unknown { ends, place }) = &mut self.unknown else {
            return Poll::Pending;
        };
        match (ends.as_mut().poll(context), place.poll_given_up(context)) {
            (Poll::Pending, Poll::Pending) => Poll::Pending,
            _ => Poll::Ready(()),
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
    type ConnectInfo = Known;

    fn connect_info(&self) -> Known {
        self.known.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context,
        buf: &mut ReadBuf,
    ) -> Poll<io::Result<()>> {
        // Also if there is something to read: who only sends pings is not known either.
        self.check(cx)?;
        if self.poll_unknown(cx).is_ready() {
            self.is_over = true;
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        // A server that has something to send need not read.
        self.check(cx)?;
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
        self.check(cx)?;
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.unless_stalled(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;
    use crate::places::{Peer, Places};

    const HERE: Origin = Origin::Process { uid: 0, pid: None };

    #[tokio::test(start_paused = true)]
    async fn who_sends_something_and_stays_unknown_is_given_up() {
        for stays in [false, true] {
            let (stream, mut other) = duplex(4);
            let place = Places::new(1, 1).enter(Peer::V6([0; 4]));
            let mut connection = Connection::of_nobody(stream, HERE, place);
            let known = connection.known.clone();
            let pings = async {
                for second in 0..20 {
                    if stays && second == 5 {
                        known.stays();
                    }
                    if other.write_all(&[0]).await.is_err() {
                        return;
                    }
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
                drop(other);
            };
            let mut read = Vec::new();
            let reads = async {
                let all = connection.read_to_end(&mut read).await;
                drop(connection);
                all.is_ok()
            };
            let (all, ()) = tokio::join!(reads, pings);
            assert_eq!(all, stays);
            assert_eq!(read.len(), if stays { 20 } else { 10 });
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_ends_with_its_certificate() {
        let (stream, mut other) = duplex(4);
        let not_after = SystemTime::now() + Duration::from_secs(5);
        let mut connection = Connection::new(stream, "cn:a".into(), HERE).until(not_after);
        let talks = async {
            while other.write_all(&[0]).await.is_ok() {
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        };
        let mut read = Vec::new();
        let reads = async {
            let all = connection.read_to_end(&mut read).await;
            drop(connection);
            all
        };
        let (all, ()) = tokio::join!(reads, talks);
        assert_eq!(all.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert!((5..=6).contains(&read.len()), "{}", read.len());
    }

    #[tokio::test]
    async fn who_is_unknown_makes_room_for_others() {
        let places = Places::new(1, 1);
        let (stream, _other) = duplex(4);
        let first = places.enter(Peer::V6([0; 4]));
        let mut connection = Connection::of_nobody(stream, HERE, first);
        let _second = places.enter(Peer::V6([0; 4]));
        assert!(connection.read_u8().await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn who_takes_nothing_for_long_is_given_up() {
        let (stream, mut other) = duplex(4);
        let mut connection = Connection::new(stream, "tester".into(), HERE);
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
