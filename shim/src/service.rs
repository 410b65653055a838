//! `polydev.runtime.v1`, served over gRPC and over HTTP. In reading order: [`server`] accepts
//! connections. [`incoming`] identifies the caller of a connection, [`identify`] the caller of a
//! token, and [`needs`] says who cannot have a right to a call. [`grpc`] and [`http`] decode a
//! call, for which there is the memory of [`bodies`] ([`messages`] counts those of gRPC), ask
//! [`api`], and encode its answer.
//! [`trace`] reads the caller's trace context. [`status`] maps errors to what callers receive.

mod server;

mod identify;
mod incoming;
mod needs;

mod bodies;
mod messages;

mod grpc;
mod http;

mod api;

mod status;
mod trace;

pub use server::{Limits, Parts, serve};

use std::time::Duration;

/// The largest message, in bytes: a run with argv and environment at the kernel's limits fits.
const MAX_MESSAGE: usize = 4 << 20;
/// How long a caller may take to send the first message of a call.
const FIRST_MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);
