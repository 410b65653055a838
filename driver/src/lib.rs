//! `nomad-driver-polydev`: a Nomad task driver that keeps warm containers.
//!
//! ```text
//!  Nomad agent --go-plugin--> plugin --> service --+
//!                                                  +--> slot (book, keeper) --> docker --> dockerd
//!  shims --polydev.node.v1--> node/service --------+        |  |
//!                                                  limits <-+  +-> link --> polydev-init
//! ```
//!
//! Nothing on the right knows anything on its left. `docker` alone names bollard;
//! `plugin`, `service` and `node/service` alone name tonic.

pub mod plugin;
pub mod service;

pub mod fingerprint;
pub mod node;
pub mod slot;

pub mod config;
pub mod docker;
pub mod events;
pub mod limits;
pub mod logging;
mod reap;

/// An error with its causes, for people who get no log with it.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
