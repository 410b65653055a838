//! Errors over HTTP: an HTTP status, and in the body the gRPC status with the same message and
//! reason.

use std::error::Error as _;

use axum::{
    Json,
    extract::rejection::{PathRejection, QueryRejection},
    http::{HeaderValue, StatusCode, header::RETRY_AFTER},
    response::{IntoResponse, Response, sse},
};
use serde_json::{Value, json};
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::run::{Error, request::Invalid};

/// An error as the answer.
#[derive(Debug)]
pub(in crate::service) struct Problem {
    http: StatusCode,
    status: Status,
}

impl Problem {
    pub(super) fn media_type(given: &str) -> Self {
        let words = format!("`Content-Type` is `{given}`; must be application/json");
        Self {
            http: StatusCode::UNSUPPORTED_MEDIA_TYPE,
            status: Status::invalid_argument(words),
        }
    }

    pub(super) fn too_large(given: usize, most: usize) -> Self {
        let words = format!("the request has {given} bytes; must be at most {most}");
        Self {
            http: StatusCode::PAYLOAD_TOO_LARGE,
            status: Status::invalid_argument(words),
        }
    }

    pub(super) fn body(error: &axum::Error, most: usize) -> Self {
        let is_long = error
            .source()
            .is_some_and(|source| source.is::<http_body_util::LengthLimitError>());
        if is_long {
            let words = format!("the body has more than {most} bytes");
            return Self {
                http: StatusCode::PAYLOAD_TOO_LARGE,
                status: Status::invalid_argument(words),
            };
        }
        Status::invalid_argument(format!("cannot read the body: {error}")).into()
    }

    pub(super) fn browser(words: String) -> Self {
        Status::permission_denied(words).into()
    }

    pub(super) fn method() -> Self {
        Self {
            http: StatusCode::METHOD_NOT_ALLOWED,
            status: Status::unimplemented(
                "the path does not support this method; see /v1/openapi.json",
            ),
        }
    }

    pub(super) fn nowhere() -> Self {
        Status::not_found("unknown path; see /v1/openapi.json").into()
    }

    /// The error as the last event of a stream that has begun.
    pub(super) fn event(&self) -> sse::Event {
        let body = self.body_json().to_string();
        // An `EventSource` has an event `error` of its own.
        sse::Event::default().event("problem").data(body)
    }

    fn body_json(&self) -> Value {
        let status = &self.status;
        let details = status.get_error_details();
        let mut error = json!({
            "code": name(status.code()),
            "message": status.message(),
        });
        if let Some(info) = details.error_info() {
            error["reason"] = info.reason.clone().into();
        }
        if let Some(bad) = details.bad_request() {
            let fields = bad.field_violations.iter();
            let fields: Vec<_> = fields.map(|violation| violation.field.clone()).collect();
            error["fields"] = fields.into();
        }
        if let Some(seconds) = self.retry_after() {
            error["retry_after_seconds"] = seconds.into();
        }
        json!({ "error": error })
    }

    fn retry_after(&self) -> Option<u64> {
        let details = self.status.get_error_details();
        let delay = details.retry_info().and_then(|retry| retry.retry_delay);
        delay.map(|delay| delay.as_secs())
    }
}

/// The code's name in gRPC.
fn name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

/// The mapping of `google.rpc.Code`.
fn http(code: Code) -> StatusCode {
    match code {
        Code::Ok => StatusCode::OK,
        Code::InvalidArgument | Code::FailedPrecondition | Code::OutOfRange => {
            StatusCode::BAD_REQUEST
        }
        Code::Unauthenticated => StatusCode::UNAUTHORIZED,
        Code::PermissionDenied => StatusCode::FORBIDDEN,
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::AlreadyExists | Code::Aborted => StatusCode::CONFLICT,
        Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
        Code::Unimplemented => StatusCode::NOT_IMPLEMENTED,
        Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        Code::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
        Code::Cancelled | Code::Unknown | Code::Internal | Code::DataLoss => {
            StatusCode::INTERNAL_SERVER_ERROR
        }
    }
}

impl From<Status> for Problem {
    fn from(status: Status) -> Self {
        Self {
            http: http(status.code()),
            status,
        }
    }
}

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        Status::from(error).into()
    }
}

impl From<Invalid> for Problem {
    fn from(invalid: Invalid) -> Self {
        Error::from(invalid).into()
    }
}

impl From<PathRejection> for Problem {
    fn from(rejection: PathRejection) -> Self {
        Status::invalid_argument(rejection.body_text()).into()
    }
}

impl From<QueryRejection> for Problem {
    fn from(rejection: QueryRejection) -> Self {
        Status::invalid_argument(rejection.body_text()).into()
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let mut response = (self.http, Json(self.body_json())).into_response();
        if let Some(seconds) = self.retry_after() {
            let seconds = HeaderValue::from(seconds);
            response.headers_mut().insert(RETRY_AFTER, seconds);
        }
        response
    }
}
