//! polydev-init as its driver sees it, with the real program and a real socket; it
//! is not process 1 here, and needs neither Docker nor root.

#![expect(clippy::unwrap_used, reason = "this is a test, its helpers too")]

mod agent;
mod asking;
mod commands;
mod init;
mod interpreter;
