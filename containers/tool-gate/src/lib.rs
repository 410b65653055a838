//! `polydev-tool-gate`: decides each tool call of a model's answer, and executes what is allowed.
//!
//! - [`payload`] reads the calls, [`registry`] the tools that there are, [`settings`] the switches;
//! - [`batch`] decides about all calls and then has [`execute`] run what is allowed;
//! - [`report`] says what became of them;
//! - [`demo`] has what can be shown without tools of one's own;
//! - [`command`] is the command line.

pub mod batch;
pub mod command;
pub mod demo;
pub mod execute;
pub mod payload;
pub mod registry;
pub mod report;
pub mod settings;
