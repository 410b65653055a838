//! `nomad-driver-polydev`: a Nomad task driver that keeps warm containers.
//!
//! ```text
//!  Nomad agent --go-plugin--> plugin --> service --+
//!                                                  +--> slot, task --> site --> docker --> dockerd
//!  shims --polydev.node.v1--> node/service --+-----+      |  |
//!                                            +--> run <---+  +-> link --> polydev-init
//! ```
//!
//! Modules depend only on modules to their right: `tests/layers/main.rs` has the order. Only
//! `docker` uses bollard; only `plugin`, `service` and `node/service` use tonic.

pub mod plugin;
pub mod service;

pub mod fingerprint;
pub mod node;
mod reap;

pub mod slot;
pub mod task;

pub mod run;
pub mod sandbox;
pub mod site;

pub mod broker;
pub mod images;
pub mod link;
pub mod metrics;
pub mod telemetry;

pub mod docker;
pub mod events;
pub mod firewall;
mod guard;
pub mod headroom;
pub mod identity;
pub mod life;

pub mod check_job;
pub mod config;
pub mod limits;
pub mod logging;
mod netlink;
pub mod permits;
mod process;
mod scripts;
mod spent;
pub mod state;
mod ticks;
mod tokens;
mod traces;

use polydev_proto::error::chain;
