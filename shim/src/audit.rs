//! Records of each decision about a call and of each access to a run, which nobody without the key
//! can change unnoticed.
//!
//! - [`record`] is what a record says;
//! - [`chain`] binds a record to all earlier ones;
//! - [`log`] writes them to the files of a folder;
//! - [`reader`] reads them, and finds what was changed;
//! - [`dsse`] makes signed statements of what a policy has decided;
//! - [`ocsf`] gives them the form of the Open Cybersecurity Schema Framework.

pub mod chain;
pub mod dsse;
pub mod log;
pub mod ocsf;
pub mod reader;
pub mod record;

#[cfg(test)]
mod tests;

use std::{
    io,
    path::{Path, PathBuf},
};

use self::{chain::Key, log::Log, reader::Broken, record::Record};
use crate::private;

/// Takes the records of a shim: into its ordinary log, and into an audit log if there is one.
#[derive(Debug, Clone, Default)]
pub struct Audit(Option<Log>);

impl Audit {
    /// With an audit log in `folder`.
    ///
    /// # Errors
    /// [`Error`]
    pub fn open(folder: &Path, key: &Path) -> Result<Self, Error> {
        Ok(Self(Some(Log::open(folder, Key::read(key)?)?)))
    }

    /// Whoever gets an error must not do what would have been recorded.
    ///
    /// # Errors
    /// [`Error::Write`]
    pub fn record(&self, record: &Record) -> Result<(), Error> {
        if let Some(log) = &self.0 {
            log.write(record).inspect_err(|error| {
                let error = polydev_proto::error::chain(error);
                tracing::error!(error, "refused a call that cannot be recorded");
            })?;
        }
        record.log();
        Ok(())
    }
}

/// Why there is no audit log.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot use the key of the audit log")]
    Key(#[from] private::Error),
    #[error("the key of the audit log `{}` must be 64 hexadecimal digits", path.display())]
    NoKey { path: PathBuf },
    #[error("cannot read `{}`", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("cannot write `{}`", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("`{}` is in use by another shim", path.display())]
    InUse { path: PathBuf },
    #[error(transparent)]
    Broken(#[from] Broken),
}
