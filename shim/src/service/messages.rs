//! The memory for messages that are being received over gRPC. A message is held until its last
//! byte has come, so what has come of all of them is counted, and each must come in time.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use axum::{
    body::{Body, Bytes},
    extract::{Request, State},
    middleware::Next,
    response::Response,
};
use http_body::{Frame, SizeHint};
use tokio::time::{Sleep, sleep};
use tonic::Status;

use super::{
    FIRST_MESSAGE_TIMEOUT,
    bodies::{Bodies, MAX_SHORT, Share},
};
use crate::run::Error;

/// A flag, and the length of the message (gRPC over HTTP/2, "Length-Prefixed-Message").
const PREFIX: usize = 5;

/// Counts what arrives of gRPC messages. Bodies of other requests are counted where they are read.
pub(super) async fn count(State(bodies): State<Bodies>, request: Request, next: Next) -> Response {
    // The server of gRPC does not look at the content type.
    let is_http = request.uri().path().starts_with("/v1/");
    let request = match is_http {
        false => request.map(|body| {
            Body::new(Counted {
                body,
                bodies,
                message: Message::default(),
                held: None,
            })
        }),
        true => request,
    };
    next.run(request).await
}

struct Counted {
    body: Body,
    bodies: Bodies,
    message: Message,
    /// The share of a message that is more than a short one, and when its time is over.
    held: Option<(Share, Pin<Box<Sleep>>)>,
}

/// How much of the current message has come.
#[derive(Debug, Default, PartialEq, Eq)]
struct Message {
    prefix: Vec<u8>,
    /// Of the message itself, without its prefix.
    come: usize,
}

impl Message {
    /// Takes the next bytes, which may begin and end anywhere.
    fn take(&mut self, mut bytes: &[u8]) {
        loop {
            let missing = PREFIX - self.prefix.len();
            let (prefix, rest) = bytes.split_at(missing.min(bytes.len()));
            self.prefix.extend_from_slice(prefix);
            let Some(length) = self.length() else { return };
            let (message, rest) = rest.split_at((length - self.come).min(rest.len()));
            self.come += message.len();
            if self.come < length {
                return;
            }
            *self = Self::default();
            bytes = rest;
        }
    }

    /// `None` until the whole prefix has come.
    fn length(&self) -> Option<usize> {
        let [_, length @ ..]: [u8; PREFIX] = self.prefix[..].try_into().ok()?;
        usize::try_from(u32::from_be_bytes(length)).ok()
    }
}

impl Counted {
    fn count(&mut self, bytes: &Bytes) -> Result<(), Error> {
        self.message.take(bytes);
        if self.message.come <= MAX_SHORT {
            self.held = None;
            return Ok(());
        }
        let (share, _) = match &mut self.held {
            Some(held) => held,
            none => none.insert((self.bodies.share()?, Box::pin(sleep(FIRST_MESSAGE_TIMEOUT)))),
        };
        share.grow_to(self.message.come)
    }
}

impl http_body::Body for Counted {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if let Some((_, time)) = &mut self.held
            && time.as_mut().poll(context).is_ready()
        {
            let late = format!(
                "the message did not arrive within {} s",
                FIRST_MESSAGE_TIMEOUT.as_secs()
            );
            return Poll::Ready(Some(Err(axum::Error::new(Status::deadline_exceeded(late)))));
        }
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        if let Some(Ok(frame)) = &frame
            && let Some(bytes) = frame.data_ref()
            && let Err(busy) = self.count(bytes)
        {
            return Poll::Ready(Some(Err(axum::Error::new(Status::from(busy)))));
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

#[cfg(test)]
mod tests {
    use futures_util::{StreamExt, stream};
    use http_body_util::BodyExt;
    use proptest::prelude::*;

    use super::*;

    fn message(length: usize) -> Vec<u8> {
        let prefix = u32::try_from(length).unwrap().to_be_bytes();
        [&[0], &prefix[..], &vec![7; length]].concat()
    }

    fn counted(bodies: &Bodies, pieces: Vec<Vec<u8>>, ends: bool) -> Counted {
        let pieces = stream::iter(pieces.into_iter().map(Ok::<_, axum::Error>));
        let body = match ends {
            true => Body::from_stream(pieces),
            false => Body::from_stream(pieces.chain(stream::pending())),
        };
        Counted {
            body,
            bodies: bodies.clone(),
            message: Message::default(),
            held: None,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn messages_that_are_not_complete_have_one_memory_together() {
        let bodies = Bodies::new();
        let part = message(4 << 20)[..3 << 20].to_vec();
        let mut waiting = Vec::new();
        let refused = loop {
            let mut body = counted(&bodies, vec![part.clone()], false);
            match body.frame().await.unwrap() {
                Ok(_) => waiting.push(body),
                Err(refused) => break refused,
            }
        };
        assert!((10..=22).contains(&waiting.len()), "{}", waiting.len());
        let status = Status::from_error(refused.into_inner());
        assert_eq!(status.code(), tonic::Code::Unavailable, "{status}");
        // Short ones and those that are complete need none of it.
        let mut short = counted(&bodies, vec![message(1000)], true);
        assert!(short.frame().await.unwrap().is_ok());
        let mut whole = counted(&bodies, vec![message(2 << 20), message(2 << 20)], true);
        assert!(whole.frame().await.unwrap().is_ok());
        // A message that stops coming is given up, and its memory is free again.
        let late = waiting[0].frame().await.unwrap().unwrap_err();
        let status = Status::from_error(late.into_inner());
        assert_eq!(status.code(), tonic::Code::DeadlineExceeded, "{status}");
        waiting.clear();
        let mut next = counted(&bodies, vec![part], false);
        assert!(next.frame().await.unwrap().is_ok());
    }

    proptest! {
        #[test]
        fn messages_end_where_they_end_however_they_are_cut(
            lengths in prop::collection::vec(0_usize..2000, 0..6),
            rest in 0_usize..1000,
            cut in 1_usize..700,
        ) {
            let mut bytes: Vec<u8> = lengths.iter().flat_map(|length| message(*length)).collect();
            bytes.extend(&message(1000)[..PREFIX + rest]);
            let mut counted = Message::default();
            bytes.chunks(cut).for_each(|piece| counted.take(piece));
            prop_assert_eq!(counted.come, rest);
        }
    }
}
