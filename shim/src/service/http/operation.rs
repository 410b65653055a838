//! The type of an operation: one method of one path.

use std::sync::Arc;

use axum::routing::{MethodFilter, MethodRouter};

use crate::service::api::Api;

/// One operation: its handler, and its description in the OpenAPI document.
pub(super) struct Operation {
    pub(super) method: Method,
    pub(super) path: &'static str,
    pub(super) name: &'static str,
    pub(super) summary: &'static str,
    /// The message of `polydev.runtime.v1` in the request's body.
    pub(super) body: Option<&'static str>,
    /// The parameters of the query.
    pub(super) query: &'static [(&'static str, Parameter)],
    pub(super) answer: Answer,
    /// The handler for requests with these methods.
    pub(super) handler: fn(MethodFilter) -> MethodRouter<Arc<Api>>,
}

#[derive(Clone, Copy)]
pub(super) enum Method {
    Get,
    Post,
}

#[derive(Clone, Copy)]
pub(super) enum Parameter {
    Needed,
    Text,
    Flag,
    /// The type of the field with the same name in this message.
    Of(&'static str),
}

pub(super) enum Answer {
    /// The message of this name.
    Message(&'static str),
    /// Server-sent events; or, with `detach`, the message.
    Events(Option<&'static str>),
    Document,
}

impl Operation {
    /// The route of the operation.
    pub(super) fn route(&self) -> MethodRouter<Arc<Api>> {
        (self.handler)(self.method.filter())
    }
}

impl Method {
    /// The method's name in OpenAPI.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::Post => "post",
        }
    }

    fn filter(self) -> MethodFilter {
        match self {
            Self::Get => MethodFilter::GET,
            Self::Post => MethodFilter::POST,
        }
    }
}
