//! Accepts connections, whatever goes wrong with one of them.

use std::{io, time::Duration};

use futures_util::{Stream, stream};
use tokio::{
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    time::{Instant, sleep},
};

/// The pause after a failure, for example for want of descriptors: the kernel says so again at
/// once, as long as a connection waits.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);
/// Between two lines of the log about failures.
const LOG_INTERVAL: Duration = Duration::from_secs(1);

/// Where connections arrive.
pub trait Listens: Send + Sync {
    type Stream: Send;

    /// The next connection.
    ///
    /// # Cancel safety
    /// Loses no connection.
    fn accept(&self) -> impl Future<Output = io::Result<Self::Stream>> + Send;
}

impl Listens for UnixListener {
    type Stream = UnixStream;

    async fn accept(&self) -> io::Result<UnixStream> {
        self.accept().await.map(|(stream, _)| stream)
    }
}

impl Listens for TcpListener {
    type Stream = TcpStream;

    async fn accept(&self) -> io::Result<TcpStream> {
        self.accept().await.map(|(stream, _)| stream)
    }
}

/// The connections that arrive, forever.
pub fn accept<L: Listens>(listener: L) -> impl Stream<Item = L::Stream> + Send {
    stream::unfold((listener, None), async |(listener, mut logged)| {
        let accepted = next(&listener, &mut logged).await;
        Some((accepted, (listener, logged)))
    })
}

async fn next<L: Listens>(listener: &L, logged: &mut Option<Instant>) -> L::Stream {
    loop {
        match listener.accept().await {
            Ok(stream) => return stream,
            Err(error) => {
                if logged.is_none_or(|at| at.elapsed() >= LOG_INTERVAL) {
                    tracing::warn!(%error, "cannot accept connections");
                    *logged = Some(Instant::now());
                }
                sleep(RETRY_INTERVAL).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        pin::pin,
        sync::atomic::{AtomicU32, Ordering},
    };

    use futures_util::StreamExt;

    use super::*;

    /// Fails a hundred times before each connection.
    #[derive(Default)]
    struct Failing(AtomicU32);

    impl Listens for Failing {
        type Stream = u32;

        async fn accept(&self) -> io::Result<u32> {
            match self.0.fetch_add(1, Ordering::Relaxed) + 1 {
                tries if tries.is_multiple_of(100) => Ok(tries),
                _ => Err(io::Error::from_raw_os_error(24)),
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_is_followed_by_a_pause_and_then_by_the_next_connection() {
        let begun = Instant::now();
        let mut accepted = pin!(accept(Failing::default()));
        assert_eq!(accepted.next().await, Some(100));
        assert!(begun.elapsed() >= 99 * RETRY_INTERVAL);
        assert_eq!(accepted.next().await, Some(200));
    }
}
