//! How fast a container may send or receive through the broker, as a token bucket for each
//! direction. The buckets of its network interface are beside these.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use parking_lot::Mutex;
use tokio::time::{Instant, Sleep, sleep_until};

/// How far ahead of its rate a container may be after a pause.
const MAX_BURST: Duration = Duration::from_millis(50);

/// What passes at once takes about this time at the rate, and has at least so many bytes.
const PIECE: Duration = Duration::from_millis(20);
const MIN_PIECE: usize = 4096;

/// One direction of one container.
#[derive(Debug)]
pub(crate) struct Bucket {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    bytes_per_second: u64,
    /// When everything that has passed would have passed at exactly the rate.
    even_at: Instant,
}

impl Bucket {
    pub(crate) fn new(bytes_per_second: u64) -> Self {
        Self {
            state: State {
                bytes_per_second: bytes_per_second.max(1),
                even_at: Instant::now(),
            }
            .into(),
        }
    }

    /// Changes the rate of what passes from now on.
    pub(crate) fn set_rate(&self, bytes_per_second: u64) {
        self.state.lock().bytes_per_second = bytes_per_second.max(1);
    }

    /// Most bytes that pass at once.
    fn longest_piece(&self) -> usize {
        let rate = self.state.lock().bytes_per_second;
        let bytes = u128::from(rate) * PIECE.as_millis() / 1000;
        usize::try_from(bytes).map_or(usize::MAX, |bytes| bytes.max(MIN_PIECE))
    }

    /// Counts bytes that pass now. Returns when the next ones may.
    pub(crate) fn pass(&self, bytes: usize) -> Instant {
        let now = Instant::now();
        let mut state = self.state.lock();
        let nanos = bytes as u128 * 1_000_000_000 / u128::from(state.bytes_per_second);
        let took = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
        let earliest = now.checked_sub(MAX_BURST).unwrap_or(now);
        state.even_at = state.even_at.max(earliest) + took;
        state.even_at
    }
}

/// A body at the speed of a bucket. A piece passes at once, and the next one waits. The last piece
/// delays nothing, so long ones are cut: those of hyper may have some 400 KB.
pub(crate) struct Paced<B> {
    body: B,
    bucket: Arc<Bucket>,
    pause: Option<Pin<Box<Sleep>>>,
    /// What has come and may not pass yet.
    rest: Bytes,
}

impl<B> Paced<B> {
    pub(crate) fn new(body: B, bucket: Arc<Bucket>) -> Self {
        Self {
            body,
            bucket,
            pause: None,
            rest: Bytes::new(),
        }
    }
}

impl<B: Body<Data = Bytes> + Unpin> Body for Paced<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        if let Some(pause) = &mut self.pause {
            std::task::ready!(pause.as_mut().poll(context));
            self.pause = None;
        }
        if self.rest.is_empty() {
            let frame = std::task::ready!(Pin::new(&mut self.body).poll_frame(context));
            match frame {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => self.rest = data,
                    Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
                },
                end => return Poll::Ready(end),
            }
        }
        let most = self.bucket.longest_piece().min(self.rest.len());
        let piece = self.rest.split_to(most);
        let next = self.bucket.pass(piece.len());
        if next > Instant::now() {
            self.pause = Some(Box::pin(sleep_until(next)));
        }
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let (of_body, rest) = (self.body.size_hint(), self.rest.len() as u64);
        let mut hint = SizeHint::new();
        hint.set_lower(of_body.lower() + rest);
        if let Some(upper) = of_body.upper() {
            hint.set_upper(upper + rest);
        }
        hint
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::{BodyExt, StreamBody};

    /// How long a megabyte takes, in pieces of `size`, at one megabyte a second.
    async fn megabyte(size: usize, bucket: Arc<Bucket>) -> Duration {
        let pieces = (0..1_000_000 / size).map(move |_| {
            let piece = Bytes::from(vec![0; size]);
            Ok::<_, std::convert::Infallible>(Frame::data(piece))
        });
        let body = Paced::new(StreamBody::new(futures_util::stream::iter(pieces)), bucket);
        let begun = Instant::now();
        let passed = body.collect().await.expect("no piece fails").to_bytes();
        assert_eq!(passed.len(), 1_000_000);
        begun.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn the_rate_holds_for_pieces_of_any_size() {
        for size in [100, 1000, 10_000, 50_000, 250_000, 1_000_000] {
            let took = megabyte(size, Bucket::new(1_000_000).into()).await;
            assert!(
                (0.95..=1.05).contains(&took.as_secs_f64()),
                "{size}: {took:?}"
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn two_bodies_share_a_bucket_and_a_new_rate_holds_at_once() {
        let bucket = Arc::new(Bucket::new(1_000_000));
        let (one, other) = tokio::join!(
            megabyte(10_000, bucket.clone()),
            megabyte(10_000, bucket.clone())
        );
        let both = one.max(other).as_secs_f64();
        assert!((1.9..=2.1).contains(&both), "{both}");
        bucket.set_rate(4_000_000);
        let took = megabyte(10_000, bucket).await.as_secs_f64();
        assert!((0.2..=0.27).contains(&took), "{took}");
    }
}
