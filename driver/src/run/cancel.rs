//! A request to end a run early, and its cause.

use std::sync::OnceLock;

use polydev_proto::node::ended::Reason;
use tokio_util::sync::CancellationToken;

/// Why a run should end early.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cause {
    /// A caller or an operator wants it, with a sentence for people; may be empty.
    Asked(String),
    /// An API does not take the run's key, as the sentence says.
    CredentialRefused(String),
    /// An API was overloaded for longer than the run waits, as the sentence says.
    ApiUnavailable(String),
    /// The user's budget for the day is used up, as the sentence says.
    BudgetExhausted(String),
}

impl Cause {
    pub(super) fn reason(&self) -> Reason {
        match self {
            Self::Asked(_) => Reason::Cancelled,
            Self::CredentialRefused(_) => Reason::CredentialRefused,
            Self::ApiUnavailable(_) => Reason::ApiUnavailable,
            Self::BudgetExhausted(_) => Reason::BudgetExhausted,
        }
    }

    /// The message for the run's end.
    pub(super) fn message(&self) -> String {
        match self {
            Self::Asked(words) if words.is_empty() => "it was cancelled".into(),
            Self::Asked(words) => format!("it was cancelled: {words}"),
            Self::CredentialRefused(words)
            | Self::ApiUnavailable(words)
            | Self::BudgetExhausted(words) => words.clone(),
        }
    }
}

/// The first request counts; later ones have no effect.
#[derive(Debug, Default)]
pub(super) struct Cancel {
    cause: OnceLock<Cause>,
    token: CancellationToken,
}

impl Cancel {
    pub(super) fn ask(&self, cause: Cause) {
        let _earlier_stands = self.cause.set(cause);
        self.token.cancel();
    }

    /// Waits for a request. Cancel safe.
    pub(super) async fn asked(&self) {
        self.token.cancelled().await;
    }

    /// The cause of the first request; `None` without a request.
    pub(super) fn cause(&self) -> Option<&Cause> {
        self.cause.get()
    }
}
