//! What the broker itself answers, and what it leaves of an API's answer.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header};
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt, Empty, Full, combinators::UnsyncBoxBody};
use hyper::ext::ReasonPhrase;
use tokio_util::sync::WaitForCancellationFutureOwned;

use crate::{grant::Grant, request::end_to_end};

/// The body of every answer.
pub(crate) type AnswerBody = UnsyncBoxBody<Bytes, BoxError>;
type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// With the value `false`, Claude Code 2.1.332 does not try again.
const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

/// An answer that is not the API's.
pub(crate) fn error(status: StatusCode, message: &str) -> Response<AnswerBody> {
    // Anthropic's form has `type`, Google's has `code`, and all three have `message`.
    let body = serde_json::json!({
        "type": "error",
        "error": {
            "type": "polydev_broker",
            "code": status.as_u16(),
            "message": format!("polydev-broker: {message}"),
        },
    });
    let body = Full::new(Bytes::from(body.to_string()));
    let mut answer = Response::new(body.map_err(|never| match never {}).boxed_unsync());
    *answer.status_mut() = status;
    let headers = answer.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/json"),
    );
    if status.is_client_error() {
        do_not_retry(headers);
    }
    answer
}

/// An error for a program that uses the broker as its proxy. Many show the status line alone,
/// so the message is in it too.
pub(crate) fn proxy_error(status: StatusCode, message: &str) -> Response<AnswerBody> {
    let mut answer = error(status, message);
    if let Ok(reason) = ReasonPhrase::try_from(message.as_bytes().to_vec()) {
        answer.extensions_mut().insert(reason);
    }
    answer
}

/// A body without bytes.
pub(crate) fn empty() -> AnswerBody {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}

/// Says that the same request would get the same answer.
pub(crate) fn do_not_retry(headers: &mut HeaderMap) {
    headers.insert(SHOULD_RETRY, HeaderValue::from_static("false"));
}

/// The headers of an API's answer that the container gets.
pub(crate) fn headers(of_the_api: &HeaderMap) -> HeaderMap {
    let mut kept = end_to_end(of_the_api);
    kept.remove(header::SET_COOKIE);
    kept.remove(header::ALT_SVC);
    kept
}

/// A body that breaks off when the run ends, so that its receiver does not take it for whole.
pub(crate) struct OfRun<B> {
    body: B,
    over: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl<B> OfRun<B> {
    pub(crate) fn new(body: B, grant: &Grant) -> Self {
        let over = Box::pin(grant.over().clone().cancelled_owned());
        Self { body, over }
    }
}

/// The run ended while a body was on its way.
#[derive(Debug, thiserror::Error)]
#[error("the run has ended")]
struct RunEnded;

impl<B> Body for OfRun<B>
where
    B: Body<Data = Bytes, Error: Into<BoxError>> + Unpin,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if self.over.as_mut().poll(context).is_ready() {
            return Poll::Ready(Some(Err(RunEnded.into())));
        }
        let frame = std::task::ready!(Pin::new(&mut self.body).poll_frame(context));
        Poll::Ready(frame.map(|frame| frame.map_err(Into::into)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
