//! What the shim alone decides: the real `polydev-shim serve` in front of simulated drivers and
//! a simulated Nomad. Neither root nor Docker nor Nomad is needed, and tests run beside each
//! other: each has a shim, a folder and nodes of its own.
//!
//! That a real driver, Docker and Nomad do what is simulated here is shown in `tests/it`.

mod caller;
mod certificates;
mod issuer;
mod site;

mod access;
mod claims;
mod discovery;
mod http;
mod input;
mod leases;
mod listing;
mod orders;
mod queue;
mod refused_http;
mod requests;
mod retries;
mod serving;
mod sizes;
mod specs;
mod streams;
mod tls;
mod tokens;
