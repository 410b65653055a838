//! That a run is to end before its time, and why.

use std::sync::OnceLock;

use tokio_util::sync::CancellationToken;

/// Asked for at most once: who comes later changes nothing.
#[derive(Debug, Default)]
pub(super) struct Cancel {
    reason: OnceLock<String>,
    token: CancellationToken,
}

impl Cancel {
    /// `reason` is a sentence for people, or empty.
    pub(super) fn ask(&self, reason: &str) {
        let _earlier_stands = self.reason.set(reason.to_owned());
        self.token.cancel();
    }

    /// Waits until somebody asks. Cancel safe.
    pub(super) async fn asked(&self) {
        self.token.cancelled().await;
    }

    /// Of the one who asked first; `None` if nobody did.
    pub(super) fn reason(&self) -> Option<&str> {
        self.reason.get().map(String::as_str)
    }

    /// For the run's end.
    pub(super) fn message(&self) -> String {
        match self.reason() {
            None | Some("") => "it was cancelled".into(),
            Some(reason) => format!("it was cancelled: {reason}"),
        }
    }
}
