//! Tests of what the shim alone decides: the real `polydev-shim serve` in front of simulated
//! drivers and a simulated Nomad. The tests need neither root nor Docker nor Nomad. They run in
//! parallel: each test has a shim, a folder and nodes of its own.
//!
//! The tests in `tests/it` show that a real driver, Docker and Nomad do what is simulated here.

mod caller;
mod certificates;
mod issuer;
mod site;

mod access;
mod approvals;
mod audit;
mod claims;
mod discovery;
mod http;
mod input;
mod leases;
mod listing;
mod nomad_agent;
mod orders;
mod permissions;
mod policy;
mod queue;
mod refused_http;
mod requests;
mod retries;
mod rules;
mod serving;
mod sizes;
mod specs;
mod streams;
mod tls;
mod tokens;
