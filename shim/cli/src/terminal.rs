//! The caller's terminal, for a run that has one.

use std::io::{IsTerminal, Stdin, stdin};

use anyhow::{Context, ensure};
use polydev_proto::runtime::TerminalSize;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// The terminal in raw mode: every key goes to the run. Drop restores the previous mode.
pub(super) struct Raw {
    before: Termios,
    stdin: Stdin,
}

impl Raw {
    /// # Errors
    /// If stdin is not a terminal.
    pub(super) fn new() -> anyhow::Result<Self> {
        let stdin = stdin();
        let before = tcgetattr(&stdin).context("--tty: cannot read the terminal's settings")?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Now, &raw).context("--tty: cannot set the terminal")?;
        Ok(Self { before, stdin })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Err(error) = tcsetattr(&self.stdin, OptionalActions::Now, &self.before) {
            eprintln!("polydev-shim: cannot restore the terminal: {error}");
        }
    }
}

/// The size of the terminal. A terminal that nobody looks at may have the size 0; then it is 24
/// rows by 80 columns, as in Docker.
///
/// # Errors
/// If stdin is not a terminal.
pub(super) fn size() -> anyhow::Result<TerminalSize> {
    ensure!(stdin().is_terminal(), "--tty: stdin is not a terminal");
    let size = tcgetwinsize(stdin()).context("--tty: the terminal has no size")?;
    let or = |given: u16, default| if given == 0 { default } else { given.into() };
    Ok(TerminalSize {
        rows: or(size.ws_row, 24),
        columns: or(size.ws_col, 80),
    })
}
