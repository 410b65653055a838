//! Counts the tokens of one answer, or of a WebSocket with many, for its run, and tells of an
//! overload that it reports.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Instant,
};

use bytes::Bytes;
use http::StatusCode;
use http_body::{Body, Frame, SizeHint};
use polydev_proto::provider::Vendor;

use crate::{
    container::Container,
    frames::{Frames, NoFrames, Part},
    grant::Grant,
    scanner::Scanner,
    usage::Tokens,
};

/// Stands for a model that an answer does not name.
const UNKNOWN: &str = "unknown";

/// The tokens of one answer.
pub(crate) struct Meter {
    provider: Vendor,
    scanner: Scanner,
    counted: Option<Tokens>,
    /// Whether the answer has reported an overload.
    is_overload: bool,
    /// The beginning of the overload that this answer has ended, unless it reports one itself.
    ended: Option<Instant>,
    container: Arc<Container>,
    grant: Arc<Grant>,
}

impl Meter {
    pub(crate) fn new(provider: Vendor, container: &Arc<Container>, grant: &Arc<Grant>) -> Self {
        Self {
            provider,
            scanner: Scanner::new(provider),
            counted: None,
            is_overload: false,
            ended: None,
            container: container.clone(),
            grant: grant.clone(),
        }
    }

    /// The API has begun to answer; `is_refusal` if it does not take the key.
    pub(crate) fn answered(&mut self, status: StatusCode, is_refusal: bool) {
        self.ended = self.grant.seen.overloaded();
        if (self.grant.seen).answered(self.provider, status, is_refusal) {
            self.container.changed();
        }
    }

    fn read(&mut self, piece: &[u8]) {
        self.scanner.read(piece);
        if let Some(status) = self.scanner.overload().filter(|_| !self.is_overload) {
            self.is_overload = true;
            (self.grant.seen).overload(self.provider, status, self.ended);
            self.container.changed();
        }
        self.count(None);
    }

    /// Counts what is new, if the model or a name for it is known.
    fn count(&mut self, unnamed: Option<&str>) {
        let Some((model, stated)) = self.scanner.stated() else {
            return;
        };
        let Some(model) = model.or(unnamed).filter(|_| self.counted != Some(stated)) else {
            return;
        };
        let (seen, known) = (&self.grant.seen, self.counted.unwrap_or_default());
        seen.used(self.provider, model, known, stated, self.counted.is_none());
        self.counted = Some(stated);
    }

    /// The answer has ended; another one may follow. Returns whether it was a whole one.
    fn end(&mut self) -> bool {
        self.count(Some(UNKNOWN));
        self.scanner.next_answer();
        let is_counted = self.counted.take().is_some();
        if is_counted {
            self.container.changed();
        }
        let is_overload = std::mem::take(&mut self.is_overload);
        is_counted && !is_overload
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.end();
    }
}

/// The body of one answer, counted as it passes.
pub(crate) struct Metered<B> {
    body: B,
    /// `None` if it is not counted.
    meter: Option<Meter>,
}

impl<B> Metered<B> {
    pub(crate) fn new(body: B, meter: Option<Meter>) -> Self {
        Self { body, meter }
    }
}

impl<B: Body<Data = Bytes> + Unpin> Body for Metered<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let frame = std::task::ready!(Pin::new(&mut self.body).poll_frame(context));
        if let Some(Ok(frame)) = &frame
            && let Some(data) = frame.data_ref()
            && let Some(meter) = &mut self.meter
        {
            meter.read(data);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// What an API sends through a WebSocket. The message that states an answer's tokens has all of
/// them.
pub(crate) struct Messages {
    meter: Meter,
    frames: Frames,
    /// It does not speak the protocol.
    is_lost: bool,
}

impl Messages {
    pub(crate) fn new(meter: Meter) -> Self {
        Self {
            meter,
            frames: Frames::default(),
            is_lost: false,
        }
    }

    /// Reads the next piece. Without extensions, which the broker does not let the container ask
    /// for, a server's text is as it is.
    pub(crate) fn read(&mut self, piece: &[u8]) {
        if self.is_lost {
            return;
        }
        let meter = &mut self.meter;
        let read = self.frames.read(piece, |part| {
            match part {
                Part::Begin => {}
                Part::Text(text) => meter.read(text),
                Part::End => {
                    if meter.end() {
                        meter.answered(StatusCode::OK, false);
                        // The next answer is another one.
                        meter.ended = None;
                    }
                }
            }
            Ok::<_, NoFrames>(())
        });
        self.is_lost = read.is_err();
    }
}
