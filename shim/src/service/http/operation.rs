//! What an operation is: one method of one path.

use std::sync::Arc;

use axum::routing::{MethodFilter, MethodRouter};

use crate::service::api::Api;

/// One operation: what serves it, and what the OpenAPI document says of it.
pub(super) struct Operation {
    pub(super) method: Method,
    pub(super) path: &'static str,
    pub(super) name: &'static str,
    pub(super) summary: &'static str,
    /// The message of `polydev.runtime.v1` that it takes.
    pub(super) body: Option<&'static str>,
    /// Names of a query.
    pub(super) query: &'static [(&'static str, Parameter)],
    pub(super) answer: Answer,
    /// What serves requests of these methods.
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
    /// As the message of this name has it.
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
    /// What serves it.
    pub(super) fn route(&self) -> MethodRouter<Arc<Api>> {
        (self.handler)(self.method.filter())
    }
}

impl Method {
    /// As OpenAPI spells it.
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
