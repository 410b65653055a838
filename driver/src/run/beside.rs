//! One message of a run, kept next to its output in the driver's tmpfs for the next life of
//! the driver: the list of its artifacts, or its refreshed account.

use std::{
    fs,
    io::ErrorKind,
    marker::PhantomData,
    path::{Path, PathBuf},
};

use prost::Message;

use super::{file_name, journal::Claimed};

/// The file that holds the message, if there is one.
#[derive(Debug)]
pub(super) struct Beside<M> {
    path: PathBuf,
    message: PhantomData<M>,
}

impl<M: Message + Default> Beside<M> {
    pub(super) fn new(windows: &Path, claimed: &Claimed, name: &str) -> Self {
        Self {
            path: windows.join(file_name(claimed, name)),
            message: PhantomData,
        }
    }

    /// Replaces the previous message. Without memory for it, the message is lost when this
    /// process ends.
    pub(super) fn keep(&self, message: &M) {
        let new = self.path.with_added_extension("new");
        let written = fs::write(&new, message.encode_to_vec());
        if let Err(error) = written.and_then(|()| fs::rename(&new, &self.path)) {
            tracing::warn!(path = %self.path.display(), %error, "cannot keep a message for a restart");
            remove(&new);
        }
    }

    /// Reads what an earlier life of the driver left.
    pub(super) fn read(&self) -> Option<M> {
        let bytes = fs::read(&self.path).ok()?;
        M::decode(&*bytes).ok()
    }

    pub(super) fn release(&self) {
        remove(&self.path);
    }
}

fn remove(path: &Path) {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            tracing::warn!(path = %path.display(), %error, "cannot remove a message from memory");
        }
        _ => {}
    }
}
