//! The same service for callers without gRPC: JSON over HTTP at the same listeners, with the
//! same rules, and events as server-sent events. The messages are those of
//! `polydev.runtime.v1`, in protobuf's JSON form. [`routes`] has every path: the shim serves these
//! paths, and [`openapi`] describes them. In reading order: [`guard`] keeps web pages away,
//! [`handlers`] serve requests, [`body`] reads their bodies, [`events`] and [`json`] encode the
//! answers, and [`error`] encodes the errors.

mod guard;
mod openapi;
mod operation;
mod routes;

mod body;
mod events;
mod handlers;
mod json;

mod error;

pub(super) use error::Problem;
pub(super) use guard::no_browser;

use std::sync::Arc;

use axum::Router;
use futures_util::future;

use super::api::Api;
use routes::OPERATIONS;

/// All paths.
pub(super) fn router(api: Arc<Api>) -> Router {
    let mut router: Router<Arc<Api>> = Router::new();
    for operation in OPERATIONS {
        router = router.route(operation.path, operation.route());
    }
    router
        .fallback(nowhere)
        .method_not_allowed_fallback(|| future::ready(Problem::method()))
        .with_state(api)
}

/// All paths, as they are written in the OpenAPI document.
#[cfg(test)]
pub(super) fn paths() -> impl Iterator<Item = &'static str> {
    OPERATIONS.iter().map(|operation| operation.path)
}

async fn nowhere() -> Problem {
    Problem::nowhere()
}
