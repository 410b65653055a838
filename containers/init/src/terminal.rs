//! A terminal for the command, created here, so that an idle container needs none.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::{Command, Stdio},
};

use polydev_proto::init::TerminalSize;
use rustix::{
    io::Errno,
    process::{ioctl_tiocsctty, setsid},
    stdio,
    termios::{Winsize, tcsetwinsize},
};

/// The key that a terminal's user presses for end of file.
pub(crate) const END_OF_FILE: u8 = 4;

/// Gives `command` a new terminal as its three standard descriptors, and returns the other end.
///
/// # Errors
/// If the container has no `/dev/ptmx` or no room for another terminal.
pub(crate) fn attach(command: &mut Command, size: Option<TerminalSize>) -> io::Result<File> {
    let pty = nix::pty::openpty(None, None)?;
    if let Some(size) = size {
        resize(&pty.master, size)?;
    }
    let slave = || pty.slave.try_clone().map(Stdio::from);
    command.stdin(slave()?).stdout(slave()?).stderr(slave()?);
    close_on_exec(&pty.master)?;
    close_on_exec(&pty.slave)?;
    lead_session(command);
    Ok(pty.master.into())
}

/// Sets the terminal's size, and informs its foreground process.
///
/// # Errors
/// The kernel's error.
pub(crate) fn resize(terminal: &impl AsFd, size: TerminalSize) -> io::Result<()> {
    let side = |given: u32| u16::try_from(given).unwrap_or(u16::MAX);
    let size = Winsize {
        ws_row: side(size.rows),
        ws_col: side(size.columns),
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    Ok(tcsetwinsize(terminal, size)?)
}

/// Makes the command the leader of a session with its stdin as terminal.
fn lead_session(command: &mut Command) {
    let lead = || -> io::Result<()> {
        setsid()?;
        ioctl_tiocsctty(stdio::stdin())?;
        Ok(())
    };
    // SAFETY: between fork and exec only two system calls are made; nothing is allocated,
    // locked or dropped.
    #[expect(unsafe_code, reason = "the terminal must be set between fork and exec")]
    unsafe {
        command.pre_exec(lead);
    }
}

fn close_on_exec(descriptor: &OwnedFd) -> Result<(), Errno> {
    rustix::io::fcntl_setfd(descriptor, rustix::io::FdFlags::CLOEXEC)
}
