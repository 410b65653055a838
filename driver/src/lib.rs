//! `nomad-driver-polydev`: a Nomad task driver that keeps warm containers.
//!
//! ```text
//!  Nomad agent --go-plugin--> plugin --> service --+
//!                                                  +--> slot (book, keeper) --> docker --> dockerd
//!  shims --polydev.node.v1--> node/service --+-----+        |  |
//!                                            +--> run <-----+  +-> link --> polydev-init
//! ```
//!
//! Nothing on the right knows anything on its left. `docker` alone names bollard;
//! `plugin`, `service`, `node/service` and `metrics` alone name tonic.

pub mod plugin;
pub mod service;

pub mod fingerprint;
pub mod firewall;
pub mod identity;
pub mod images;
pub mod node;
pub mod sandbox;
pub mod slot;
pub mod task;

mod backoff;
pub mod config;
pub mod docker;
pub mod events;
pub mod limits;
mod link;
pub mod logging;
pub mod metrics;
mod netlink;
mod process;
mod reap;
pub mod run;
mod ticks;

use polydev_proto::error::chain;
