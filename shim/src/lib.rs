//! `polydev-shim`: runs users' commands in warm containers.
//!
//! ```text
//!  caller --polydev.runtime.v1--> service --> run --> pool --polydev.node.v1--> drivers
//!                                              |        ^
//!                                  provider <--+        +-- engine (nomad or embedded)
//! ```
//!
//! A module does not know the modules on its left. A shim keeps no state except what drivers
//! report. Only `nomad`, `token`, `approval` and
//! `web` name reqwest.

pub mod service;

pub mod metrics;
pub mod run;

pub mod access;
pub mod approval;
pub mod audit;
pub mod credentials;
pub mod environment;
pub mod listen;
pub mod permission;
pub mod policy;
pub mod pool;
pub mod private;
pub mod provider;
pub mod rate;
pub mod secret;
pub mod token;
pub mod tools;
pub mod traces;
pub mod web;

pub mod engine;
pub mod nomad;

use polydev_proto::error::chain;
