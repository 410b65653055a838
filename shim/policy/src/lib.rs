//! Decides what may run. Nothing here reads or writes anything but what its caller opens.
//!
//! - [`lattice`] and [`provenance`] say what is known of data;
//! - [`sink`] and [`capability`] say what a tool call leads to, and what a tool was granted;
//! - [`boundary`] has what no call may contain;
//! - [`rules`] are the rules in Cedar, of ours and of operators;
//! - [`agent`] knows the tools of providers' CLIs;
//! - [`evaluate`] asks all of these in their order, and [`decision`] is the answer;
//! - [`token`] binds a decision to what is executed, and [`nonces`] lets a token be used once;
//! - [`seal`] signs a decision, with the [`secrets`] of tokens;
//! - [`canonical`] is the form that is hashed and signed.

pub mod agent;
pub mod boundary;
pub mod canonical;
pub mod capability;
pub mod decision;
pub mod evaluate;
pub mod lattice;
pub mod nonces;
pub mod provenance;
pub mod rules;
pub mod seal;
pub mod secrets;
pub mod sink;
pub mod token;
