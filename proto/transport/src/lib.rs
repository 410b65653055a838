//! How callers, shims and drivers reach each other.
//!
//! [`address`] describes where a shim listens, and connects to it. [`mod@accept`] takes what
//! arrives there. [`tls`] secures connections between machines, and [`mod@incoming`] takes them, with
//! files that [`reload`] follows, also lists of [`revoked`] certificates. Callers whose names are
//! not known yet have [`places`]. A [`connection`] knows the caller at its other end, and a pattern
//! of [`names`] says which callers are meant.
//! [`backoff`] gives the waits between tries. [`upstream`] is the server that an operator names
//! in place of a provider's own.

pub mod accept;
pub mod address;
pub mod backoff;
pub mod connection;
pub mod incoming;
pub mod names;
pub mod places;
pub mod reload;
pub mod revoked;
pub mod tls;
pub mod upstream;
