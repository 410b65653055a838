//! The whole system from outside, with real Docker, real Nomad and the real CLIs.
//! They need root, and what `make test` installs; one runs after the other.

mod access;
mod api;
mod clients;
mod cluster;
mod corners;
mod credentials;
mod ends;
mod exec;
mod faults;
mod files;
mod http;
mod images;
mod jobspecs;
mod leases;
mod long;
mod network;
mod nomad;
mod on_demand;
mod output;
mod package;
mod plain;
mod pools;
mod queue;
mod recovery;
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
