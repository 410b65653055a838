//! Process 1 of the containers of slots, and of plain tasks unless `init = false`: one
//! thread, one `poll` loop.
//!
//! It fills the home, connects to the driver's socket and waits. Then it receives the files
//! of one command, runs the command, carries its streams and enforces its deadline. At the
//! end it collects artifacts and the refreshed account, reaps orphans, and reports how the
//! command ended.
//!
//! ```text
//!  driver <-- link --> supervisor --> command (own process group)
//!                        |   ^ ^        | | |
//!                 deadline   | +-stdin--+ | |
//!                            +--output x2---+--drain x2--> Nomad's FIFOs
//! ```
//!
//! A run's output goes to the driver, a plain task's output to Nomad's FIFOs.
//!
//! It needs no capability and no writable root. It is not dumpable, so a run's command, which
//! has the same user, cannot trace or read it. With a plain task it is, and has no secret: others
//! write to its streams.

mod account;
mod agent;
mod artifacts;
mod asking;
mod command;
mod deadline;
mod drain;
mod home;
mod interpreter;
mod link;
mod output;
mod shown;
mod stdin;
mod supervisor;
mod terminal;
mod workspace;

use std::{
    fs::OpenOptions,
    net::{Ipv4Addr, TcpListener},
    num::NonZeroU16,
    path::Path,
};

use nix::sys::{
    prctl,
    signal::{SigSet, Signal},
};

/// Serves one container until the driver releases it or has removed its socket, or SIGTERM
/// or SIGINT arrives while no command runs. Returns the exit status. With a port, init
/// listens there and hands the socket to the driver: it is the broker that accepts.
///
/// # Errors
/// An error that prevents process 1 from working at all; the container then ends.
pub fn run(socket: &Path, port: Option<NonZeroU16>) -> std::io::Result<u8> {
    // Opened while it still belongs to this user: once a process is not dumpable, its files
    // in /proc/self belong to root.
    let oom_score = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/proc/self/oom_score_adj")
        .ok();
    prctl::set_dumpable(false)?;
    home::seed(Path::new(home::SEED), home::path().as_deref()).map_err(|error| {
        let message = format!("cannot copy `{}` into the home: {error}", home::SEED);
        std::io::Error::new(error.kind(), message)
    })?;
    let listen = |port: NonZeroU16| TcpListener::bind((Ipv4Addr::LOCALHOST, port.get()));
    let requests = port.map(listen).transpose()?;
    supervisor::Supervisor::new(socket, requests, oom_score)?.run()
}

/// Waits for SIGTERM or SIGINT, while others use this process's namespaces.
///
/// # Errors
/// If waiting for signals is not possible.
pub fn pause() -> std::io::Result<()> {
    let mut ends = SigSet::empty();
    ends.add(Signal::SIGTERM);
    ends.add(Signal::SIGINT);
    ends.thread_block()?;
    ends.wait()?;
    Ok(())
}
