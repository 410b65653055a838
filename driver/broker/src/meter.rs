//! Counts the tokens of one answer, or of a WebSocket with many, for its run.

use std::{
    io::Cursor,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::{Buf, Bytes, BytesMut};
use http::StatusCode;
use http_body::{Body, Frame, SizeHint};
use polydev_proto::provider::Provider;
use tungstenite::protocol::frame::{
    FrameHeader,
    coding::{Data, OpCode},
};

use crate::{
    container::Container,
    grant::Grant,
    usage::{Scanner, Tokens},
};

/// Longest header of a WebSocket's frame (RFC 6455, section 5.2).
const MAX_HEADER: usize = 14;
/// Stands for a model that an answer does not name.
const UNKNOWN: &str = "unknown";

/// The tokens of one answer.
pub(crate) struct Meter {
    provider: Provider,
    scanner: Scanner,
    counted: Option<Tokens>,
    container: Arc<Container>,
    grant: Arc<Grant>,
}

impl Meter {
    pub(crate) fn new(provider: Provider, container: &Arc<Container>, grant: &Arc<Grant>) -> Self {
        Self {
            provider,
            scanner: Scanner::new(provider),
            counted: None,
            container: container.clone(),
            grant: grant.clone(),
        }
    }

    /// The API has accepted a WebSocket.
    pub(crate) fn answered(&self, status: StatusCode) {
        if self.grant.seen.answered(self.provider, status, false) {
            self.container.changed();
        }
    }

    fn read(&mut self, piece: &[u8]) {
        self.scanner.read(piece);
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

    /// The answer has ended; another one may follow. Returns whether it stated tokens.
    fn end(&mut self) -> bool {
        self.count(Some(UNKNOWN));
        self.scanner.next_answer();
        let is_counted = self.counted.take().is_some();
        if is_counted {
            self.container.changed();
        }
        is_counted
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

/// What an API sends through a WebSocket: each answer is one message, or several.
pub(crate) struct Messages {
    meter: Meter,
    /// The beginning of a header.
    header: BytesMut,
    /// How much of the current frame is to come.
    left: u64,
    is_text: bool,
    is_last: bool,
    /// It does not speak the protocol.
    is_lost: bool,
}

impl Messages {
    pub(crate) fn new(meter: Meter) -> Self {
        Self {
            meter,
            header: BytesMut::new(),
            left: 0,
            is_text: false,
            is_last: false,
            is_lost: false,
        }
    }

    /// Reads the next piece. Without extensions, which the broker does not let the container ask
    /// for, a server's text is as it is.
    pub(crate) fn read(&mut self, mut piece: &[u8]) {
        while !piece.is_empty() && !self.is_lost {
            if self.left == 0 {
                let has_begun = self.begin(&mut piece);
                if !has_begun {
                    continue;
                }
            } else {
                let left = usize::try_from(self.left).unwrap_or(usize::MAX);
                let (payload, rest) = piece.split_at(left.min(piece.len()));
                if self.is_text {
                    self.meter.read(payload);
                }
                self.left -= payload.len() as u64;
                piece = rest;
            }
            if self.left == 0 && self.is_text && self.is_last && self.meter.end() {
                // Requests on a WebSocket are not read.
                self.meter.grant.seen.asked();
            }
        }
    }

    /// Reads a frame's header, as far as it has come. Returns whether that was all of it.
    fn begin(&mut self, piece: &mut &[u8]) -> bool {
        let known = self.header.len();
        let most = piece.len().min(MAX_HEADER - known);
        self.header.extend_from_slice(&piece[..most]);
        let mut header = Cursor::new(&self.header);
        match FrameHeader::parse(&mut header) {
            Ok(Some((frame, length))) => {
                let read = usize::try_from(header.position()).unwrap_or(MAX_HEADER);
                piece.advance(read.saturating_sub(known));
                self.header.clear();
                self.left = length;
                self.is_last = frame.is_final;
                self.is_text = match frame.opcode {
                    OpCode::Data(data) => matches!(data, Data::Text | Data::Continue),
                    OpCode::Control(_) => false,
                };
                true
            }
            Ok(None) => {
                piece.advance(most);
                false
            }
            Err(_) => {
                self.is_lost = true;
                false
            }
        }
    }
}
