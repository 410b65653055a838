//! The list of a run's artifacts: beside their bytes, in the driver's tmpfs, for the next life
//! of the driver.

use std::{
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
};

use polydev_proto::init::Artifacts;
use prost::Message;

use super::{file_name, journal::Claimed};

/// The file with the list, if there is one.
#[derive(Debug)]
pub(super) struct Manifest(PathBuf);

impl Manifest {
    pub(super) fn new(windows: &Path, claimed: &Claimed) -> Self {
        Self(windows.join(file_name(claimed, "manifest")))
    }

    /// Without memory for it, the artifacts are lost with this process.
    pub(super) fn keep(&self, artifacts: &Artifacts) {
        if let Err(error) = fs::write(&self.0, artifacts.encode_to_vec()) {
            tracing::warn!(path = %self.0.display(), %error, "not kept for a restart");
            self.release();
        }
    }

    /// What an earlier life of the driver left.
    pub(super) fn recover(&self) -> Option<Artifacts> {
        let bytes = fs::read(&self.0).ok()?;
        Artifacts::decode(&*bytes).ok()
    }

    pub(super) fn release(&self) {
        match fs::remove_file(&self.0) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                tracing::warn!(path = %self.0.display(), %error, "a list stays in memory");
            }
            _ => {}
        }
    }
}
