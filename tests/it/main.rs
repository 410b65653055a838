//! Tests of the whole system from outside, with real Docker, real Nomad and the real CLIs.
//! The tests need root, and the programs that `make test` installs. `.config/nextest.toml` says
//! which tests run in parallel.

mod access;
mod api;
mod broker;
mod clients;
mod cluster;
mod corners;
mod credentials;
mod egress;
mod ends;
mod exec;
mod faults;
mod files;
mod host;
mod http;
mod idle;
mod images;
mod jobspecs;
mod kept;
mod leases;
mod long;
mod metrics;
mod network;
mod newer;
mod nomad;
mod on_demand;
mod once;
mod output;
mod package;
mod plain;
mod pools;
mod queue;
mod recovery;
mod refreshed;
mod refusals;
mod registry;
mod rolls;
mod runs;
mod secrets;
mod store;
mod survive;
mod terminal;
mod tokens;
mod traces;
mod walk;
