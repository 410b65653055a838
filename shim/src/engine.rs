//! What runs the pools and knows the drivers: a Nomad cluster, or this machine alone.

pub mod embedded;
pub mod nomad;
