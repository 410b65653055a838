//! A client of `polydev-shim`.
//!
//! [`Client::run`] starts a command and is a stream of its events, which goes on over broken
//! connections and shims that are restarted: every byte comes once, in order. Every other call
//! of the API is in [`Client::calls`].
#![doc = include_str!("../README.md")]

mod client;
mod input;
mod run;

pub use bytes::Bytes;
pub use polydev_proto::runtime as api;
pub use polydev_transport::{
    address::{Address, DEFAULT},
    tls::{Files, Trust},
};
pub use tonic::{Code, Status};

pub use client::{Added, Calls, Client, Error, Identity, Token};
pub use input::{Closed, Input};
pub use run::Run;
