//! A request to end a run early, and its reason.

use std::sync::OnceLock;

use tokio_util::sync::CancellationToken;

/// The first request counts; later ones have no effect.
#[derive(Debug, Default)]
pub(super) struct Cancel {
    reason: OnceLock<String>,
    token: CancellationToken,
}

impl Cancel {
    /// `reason` is a sentence for people; may be empty.
    pub(super) fn ask(&self, reason: &str) {
        let _earlier_stands = self.reason.set(reason.to_owned());
        self.token.cancel();
    }

    /// Waits for a request. Cancel safe.
    pub(super) async fn asked(&self) {
        self.token.cancelled().await;
    }

    /// The reason of the first request; `None` without a request.
    pub(super) fn reason(&self) -> Option<&str> {
        self.reason.get().map(String::as_str)
    }

    /// The message for the run's end.
    pub(super) fn message(&self) -> String {
        match self.reason() {
            None | Some("") => "it was cancelled".into(),
            Some(reason) => format!("it was cancelled: {reason}"),
        }
    }
}
