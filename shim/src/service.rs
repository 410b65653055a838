//! `polydev.runtime.v1`, served over gRPC and over HTTP. In reading order: [`server`] accepts
//! connections, of which [`incoming`] knows the caller, or [`identify`] if the caller shows a
//! token. [`grpc`] and [`http`] decode a call, ask [`api`], and encode its answer. [`trace`] is
//! the caller's place in a trace, and [`status`] maps errors to what callers receive.

mod server;

mod identify;
mod incoming;

mod grpc;
mod http;

mod api;

mod status;
mod trace;

pub use server::{Limits, Parts, serve};

use std::time::Duration;

/// A run with argv and environment at the kernel's limits.
const MAX_MESSAGE: usize = 4 << 20;
/// For a caller to say what it wants.
const FIRST_MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);
