//! Process 1 of every container the driver starts: one thread, one `poll` loop.
//!
//! It fills the home, connects to the driver's socket and waits. Then it runs one
//! command, carries its streams, reaps what the command leaves, keeps the
//! deadline, and tells how it ended.
//!
//! ```text
//!  driver <-- link --> supervisor --> command (own process group)
//!                        |   ^ ^        | | |
//!                 deadline   | +-stdin--+ | |
//!                            +--output x2---+
//! ```
//!
//! It needs no capability and no writable root, and it cannot be traced or read
//! by the command, which has the same user: it is not dumpable.

mod command;
mod deadline;
mod home;
mod link;
mod output;
mod stdin;
mod supervisor;

use std::{fs::OpenOptions, path::Path};

use nix::sys::prctl;

/// Serves one container until the driver releases it or SIGTERM comes while it waits.
///
/// # Errors
/// What keeps process 1 from doing its work at all; the container ends with it.
pub fn run(socket: &Path) -> std::io::Result<()> {
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
