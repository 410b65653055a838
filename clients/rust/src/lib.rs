//! A client of `polydev-shim`.
//!
//! [`Client::run`] starts a command and returns the stream of its events. The stream continues
//! when a connection breaks or a shim restarts: every byte comes once, in order.
//! [`Client::calls`] has every other call of the API.
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
