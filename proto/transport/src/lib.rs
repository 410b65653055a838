//! How callers, shims and drivers reach each other.
//!
//! [`address`] describes where a shim listens, and connects to it. [`tls`] secures
//! connections between machines, with files that [`reload`] follows. A [`connection`] knows
//! the caller at its other end.
//! [`backoff`] gives the waits between tries. [`upstream`] is the server that an operator names
//! in place of a provider's own.

pub mod address;
pub mod backoff;
pub mod connection;
pub mod reload;
pub mod tls;
pub mod upstream;
