//! Process 1 of every container the driver starts: one thread, one `poll` loop.
//!
//! It fills the home, connects to the driver's socket and waits. Then it takes the files of
//! one command, runs it, carries its streams, keeps the deadline, reads what files it leaves and
//! what it refreshed of its account, reaps its orphans, and tells how it ended.
//!
//! ```text
//!  driver <-- link --> supervisor --> command (own process group)
//!                        |   ^ ^        | | |
//!                 deadline   | +-stdin--+ | |
//!                            +--output x2---+--drain x2--> Nomad's FIFOs
//! ```
//!
//! The output of a run goes to the driver, that of a plain task to Nomad's FIFOs.
//!
//! It needs no capability and no writable root, and it cannot be traced or read
//! by the command, which has the same user: it is not dumpable.

mod account;
mod command;
mod deadline;
mod drain;
mod home;
mod link;
mod output;
mod stdin;
mod supervisor;
mod terminal;
mod workspace;

use std::{fs::OpenOptions, path::Path};

use nix::sys::{
    prctl,
    signal::{SigSet, Signal},
};

/// Serves one container until the driver releases it or SIGTERM comes while no command
/// runs; the status to exit with.
///
/// # Errors
/// What keeps process 1 from doing its work at all; the container ends with it.
pub fn run(socket: &Path) -> std::io::Result<u8> {
    // Opened while it still belongs to this user: of a process that is not
    // dumpable, /proc/self belongs to root.
    let oom_score = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/proc/self/oom_score_adj")
        .ok();
    prctl::set_dumpable(false)?;
    home::seed(Path::new(home::SEED), home::path().as_deref())?;
    supervisor::Supervisor::new(socket, oom_score)?.run()
}

/// Does nothing until SIGTERM or SIGINT comes: whose namespaces are in use by others.
///
/// # Errors
/// If signals cannot be waited for.
pub fn pause() -> std::io::Result<()> {
    let mut ends = SigSet::empty();
    ends.add(Signal::SIGTERM);
    ends.add(Signal::SIGINT);
    ends.thread_block()?;
    ends.wait()?;
    Ok(())
}
