//! The whole system from outside, with real Docker, real Nomad and the real CLIs.
//! They need root, and what `make test` installs; one runs after the other.

mod api;
mod ends;
mod images;
mod jobspecs;
mod nomad;
mod refusals;
mod runs;
mod secrets;
