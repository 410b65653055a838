//! How callers, shims and drivers reach each other.
//!
//! [`address`] says where a shim listens, and connects to it. [`tls`] secures connections between
//! machines, with files that [`reload`] follows. A [`connection`] knows who is at its other end.

pub mod address;
pub mod connection;
pub mod reload;
pub mod tls;
