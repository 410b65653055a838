//! How callers receive errors: the only mapping to gRPC codes, with details of `google.rpc` for
//! programs. Every error has an `ErrorInfo` of the domain [`DOMAIN`].

use std::{collections::HashMap, time::Duration};

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::{
    approval, credentials, metrics,
    pool::scale,
    run::{
        self, Error,
        queue::{Full, MAX_WAITING},
    },
    token::Refused,
};

/// The longest message, in bytes.
const MAX_MESSAGE: usize = 1000;
/// The domain of every `ErrorInfo`.
const DOMAIN: &str = "polydev.runtime.v1";
/// How long a caller should wait after an error that may pass.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

impl From<run::Error> for Status {
    fn from(error: run::Error) -> Self {
        let message = short(crate::chain(&error));
        let (code, reason) = kind(&error);
        metrics::refused(reason);
        let mut details = ErrorDetails::with_error_info(reason, DOMAIN, HashMap::new());
        match &error {
            Error::Invalid(invalid) => {
                details.add_bad_request_violation(short(invalid.field()), &message);
            }
            Error::Credential(credentials::Error::Invalid(invalid)) => {
                let field = format!("credential.{}", invalid.field);
                details.add_bad_request_violation(short(field), &message);
            }
            Error::Credential(credentials::Error::NoAccount) => {
                details.add_bad_request_violation("keep_refreshed", &message);
            }
            Error::Credential(credentials::Error::NotForBroker) => {
                details.add_bad_request_violation("credential_mode", &message);
            }
            Error::AtLimit { user_id, .. }
            | Error::Full(Full::User { user_id, .. } | Full::Evicted { user_id }) => {
                details.add_quota_failure_violation(format!("user:{user_id}"), &message);
            }
            Error::Budget(exhausted) => {
                let subject = format!("user:{}", exhausted.user_id);
                details.add_quota_failure_violation(short(subject), &message);
            }
            Error::Rate(exceeded) => {
                let subject = format!("{}:{}", exceeded.whose, exceeded.name);
                details.add_quota_failure_violation(short(subject), &message);
            }
            Error::Full(Full::Shim) => {
                let most = format!("{MAX_WAITING} runs wait");
                details.add_quota_failure_violation("shim", most);
            }
            _ => {}
        }
        match &error {
            // In whole seconds, the unit of HTTP's `Retry-After`.
            Error::Rate(exceeded) => {
                let seconds = exceeded.wait.as_secs() + 1;
                details.set_retry_info(Some(Duration::from_secs(seconds)));
            }
            error if is_worth_another_try(error) => {
                details.set_retry_info(Some(RETRY_INTERVAL));
            }
            _ => {}
        }
        Self::with_error_details(code, message, details)
    }
}

impl From<Refused> for Status {
    fn from(refused: Refused) -> Self {
        let (code, reason) = match refused {
            Refused::NoKeys => (Code::Unavailable, "NO_TOKEN_KEYS"),
            _ => (Code::Unauthenticated, "NOT_AUTHENTICATED"),
        };
        metrics::refused(reason);
        let mut details = ErrorDetails::with_error_info(reason, DOMAIN, HashMap::new());
        if code == Code::Unavailable {
            details.set_retry_info(Some(RETRY_INTERVAL));
        }
        Self::with_error_details(code, short(refused.to_string()), details)
    }
}

fn kind(error: &Error) -> (Code, &'static str) {
    match error {
        Error::Invalid(_) => (Code::InvalidArgument, "INVALID"),
        Error::Refused { .. } => (Code::InvalidArgument, "REFUSED"),
        Error::Denied(_) => (Code::PermissionDenied, "NOT_ALLOWED"),
        Error::Policy(_) => (Code::PermissionDenied, "POLICY_BLOCKED"),
        Error::Approval(error) => approval(error),
        Error::Audit(_) => (Code::Unavailable, "AUDIT"),
        Error::Budget(_) => (Code::ResourceExhausted, "BUDGET_EXHAUSTED"),
        Error::Credential(error) => credential(error),
        Error::OtherCommand { .. } => (Code::AlreadyExists, "OTHER_COMMAND"),
        Error::NoIdleSlot { .. } => (Code::ResourceExhausted, "NO_IDLE_SLOT"),
        Error::AtLimit { .. } => (Code::ResourceExhausted, "USER_LIMIT"),
        Error::Full(_) => (Code::ResourceExhausted, "QUEUE_FULL"),
        Error::Rate(_) => (Code::ResourceExhausted, "RATE_LIMIT"),
        Error::Busy => (Code::Unavailable, "BUSY"),
        Error::Stopping => (Code::Unavailable, "STOPPING"),
        Error::NoNode => (Code::Unavailable, "NO_NODE"),
        Error::NotRun { .. } => (Code::Unavailable, "NOT_RUN"),
        Error::MayHaveRun { .. } => (Code::Unavailable, "MAY_HAVE_RUN"),
        Error::Unasked { .. } => (Code::Unavailable, "NODE_UNREACHABLE"),
        Error::Unclear { .. } => (Code::Aborted, "UNCLEAR"),
        Error::Lost { .. } => (Code::Aborted, "CONNECTION_LOST"),
        Error::NotStarted { .. } => (Code::FailedPrecondition, "NOT_STARTED"),
        Error::UnknownRun { .. } => (Code::NotFound, "UNKNOWN_RUN"),
        Error::Forbidden { .. } => (Code::PermissionDenied, "OTHER_USER"),
        Error::NoLease { .. } => (Code::NotFound, "NO_LEASE"),
        Error::LeaseEnded { .. } => (Code::FailedPrecondition, "LEASE_ENDED"),
        Error::BeyondEnd { .. } => (Code::OutOfRange, "BEYOND_END"),
    }
}

fn approval(error: &approval::Error) -> (Code, &'static str) {
    use approval::Error;
    match error {
        Error::Denied { .. } => (Code::PermissionDenied, "APPROVAL_DENIED"),
        Error::Expired { .. } => (Code::PermissionDenied, "APPROVAL_REQUIRED"),
        Error::Own(_) => (Code::PermissionDenied, "OWN_APPROVAL"),
        Error::NotFound { .. } => (Code::NotFound, "NO_APPROVAL"),
        Error::Full => (Code::ResourceExhausted, "APPROVALS_FULL"),
        Error::Stopping => (Code::Unavailable, "STOPPING"),
        Error::Audit(_) => (Code::Unavailable, "AUDIT"),
    }
}

fn credential(error: &credentials::Error) -> (Code, &'static str) {
    use credentials::Error;
    match error {
        Error::NoKeys => (Code::FailedPrecondition, "NO_MASTER_KEY"),
        Error::NoStore => (Code::FailedPrecondition, "NO_STORE"),
        Error::UnknownKey { .. } => (Code::FailedPrecondition, "UNKNOWN_MASTER_KEY"),
        Error::NotOpened => (Code::FailedPrecondition, "NOT_OPENED"),
        Error::NotFound { .. } => (Code::NotFound, "NO_CREDENTIAL"),
        Error::Contended { .. } => (Code::Aborted, "CONTENDED"),
        Error::NotUnderstood => (Code::FailedPrecondition, "NOT_UNDERSTOOD"),
        Error::NoAccount | Error::NotForBroker | Error::Invalid(_) => {
            (Code::InvalidArgument, "INVALID")
        }
        Error::Busy(_) => (Code::ResourceExhausted, "SCRYPT_BUSY"),
        Error::Store(_) => (Code::Unavailable, "STORE"),
    }
}

/// Whether the same call may succeed later and is safe to repeat.
fn is_worth_another_try(error: &Error) -> bool {
    match error {
        Error::NoIdleSlot { .. }
        | Error::AtLimit { .. }
        | Error::Full(_)
        | Error::Rate(_)
        | Error::Audit(_)
        | Error::Approval(approval::Error::Full | approval::Error::Audit(_))
        | Error::Busy
        | Error::Stopping
        | Error::NoNode
        | Error::NotRun { .. }
        | Error::MayHaveRun { .. }
        | Error::Unasked { .. }
        | Error::Credential(credentials::Error::Contended { .. } | credentials::Error::Busy(_)) => {
            true
        }
        Error::Credential(credentials::Error::Store(error)) => error.may_pass(),
        Error::Invalid(_)
        | Error::Refused { .. }
        | Error::Denied(_)
        | Error::Policy(_)
        | Error::Approval(_)
        | Error::Budget(_)
        | Error::Credential(_)
        | Error::OtherCommand { .. }
        | Error::Unclear { .. }
        | Error::Lost { .. }
        | Error::NotStarted { .. }
        | Error::UnknownRun { .. }
        | Error::Forbidden { .. }
        | Error::NoLease { .. }
        | Error::LeaseEnded { .. }
        | Error::BeyondEnd { .. } => false,
    }
}

/// Cuts a text. Errors travel in headers, of which clients accept some KiB, and may quote longer
/// values.
fn short(mut text: String) -> String {
    if text.len() > MAX_MESSAGE {
        text.truncate(text.floor_char_boundary(MAX_MESSAGE));
        text.push_str(" ...");
    }
    text
}

impl From<scale::Error> for Status {
    fn from(error: scale::Error) -> Self {
        let message = short(crate::chain(&error));
        let (code, reason) = match error {
            scale::Error::Size { .. } => (Code::InvalidArgument, "INVALID"),
            scale::Error::NoJob { .. } => (Code::NotFound, "NO_JOB"),
            scale::Error::Deployment { .. } => (Code::FailedPrecondition, "DEPLOYMENT"),
            scale::Error::NotDrained { .. } => (Code::FailedPrecondition, "NOT_DRAINED"),
            scale::Error::Nomad(_) => (Code::Unavailable, "NOMAD"),
        };
        metrics::refused(reason);
        let mut details = ErrorDetails::with_error_info(reason, DOMAIN, HashMap::new());
        if let scale::Error::Size { .. } = error {
            details.add_bad_request_violation("size", &message);
        }
        if let scale::Error::Nomad(_) = error {
            details.set_retry_info(Some(RETRY_INTERVAL));
        }
        Self::with_error_details(code, message, details)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_names_whose_it_is() {
        let full = Full::User {
            user_id: "alice".into(),
            most: 3,
        };
        let details = Status::from(Error::from(full)).get_error_details();
        let violations = &details.quota_failure().unwrap().violations;
        assert_eq!(violations[0].subject, "user:alice");
        assert_eq!(details.error_info().unwrap().reason, "QUEUE_FULL");
        assert!(details.retry_info().is_some());
    }

    #[test]
    fn long_words_are_cut_between_characters() {
        assert_eq!(short("short".into()), "short");
        let cut = short("\u{20ac}".repeat(1000));
        assert_eq!(cut.len(), 999 + 4);
    }
}
