//! Errors of the driver's RPCs, and their only mapping to gRPC codes.

use polydev_proto::structs::RecoverableError;
use prost::Message;
use tonic::{Code, Status};

use crate::{chain, config, docker, sandbox, slot, task};

/// Why an RPC from Nomad failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the driver is not ready: {reason}")]
    NotReady { reason: String },
    #[error("task not found for given id: `{task_id}`")]
    UnknownTask { task_id: String },
    #[error("task `{task_id}` is running; only a forced destroy removes it")]
    StillRunning { task_id: String },
    #[error("the request has no `{field}`")]
    Missing { field: &'static str },
    #[error("invalid task config")]
    Config(#[source] config::Error),
    #[error("cannot read or write the task's handle")]
    Handle(#[source] serde_json::Error),
    #[error(transparent)]
    Duplicate(#[from] slot::book::Duplicate),
    #[error("cannot start the slot")]
    Start(#[source] slot::FillError),
    #[error("cannot start the task")]
    Task(#[source] task::StartError),
    #[error("cannot run a command in the task")]
    Exec(#[source] docker::Error),
    #[error(transparent)]
    Signal(#[from] task::UnknownSignal),
    #[error("the task has ended")]
    Ended,
    #[error(transparent)]
    Network(#[from] sandbox::Error),
    #[error("the task was stopped before its slot was warm")]
    StoppedWhileStarting,
    // Nomad passes on at most 123 bytes of an exec error, including its own 45.
    #[error("{operation} refused: the container of a warm slot is its user's alone")]
    Private { operation: &'static str },
}

/// `google.rpc.Status`; Nomad reads its first detail.
#[derive(Clone, PartialEq, Message)]
struct RpcStatus {
    #[prost(int32, tag = "1")]
    code: i32,
    #[prost(string, tag = "2")]
    message: String,
    #[prost(message, repeated, tag = "3")]
    details: Vec<prost_types::Any>,
}

/// A status that makes Nomad apply the job's restart policy instead of failing the
/// allocation: FAILED_PRECONDITION with a `RecoverableError` detail.
fn recoverable(message: String) -> Status {
    let status = RpcStatus {
        code: Code::FailedPrecondition.into(),
        message: message.clone(),
        details: vec![prost_types::Any {
            type_url: "type.googleapis.com/hashicorp.nomad.plugins.shared.structs.RecoverableError"
                .into(),
            value: RecoverableError { recoverable: true }.encode_to_vec(),
        }],
    };
    Status::with_details(
        Code::FailedPrecondition,
        message,
        status.encode_to_vec().into(),
    )
}

/// Never UNAVAILABLE or CANCELLED, which Nomad takes as the death of the plugin.
impl From<Error> for Status {
    fn from(error: Error) -> Self {
        // The operator sees only this text, so it must include the causes.
        let message = chain(&error);
        match error {
            Error::NotReady { .. } => recoverable(message),
            Error::Start(fill) if fill.is_recoverable() => recoverable(message),
            Error::Task(start) if start.is_recoverable() => recoverable(message),
            Error::UnknownTask { .. } => Self::not_found(message),
            Error::Missing { .. } | Error::Config(_) | Error::Handle(_) | Error::Signal(_) => {
                Self::invalid_argument(message)
            }
            Error::Start(_)
            | Error::Task(_)
            | Error::Ended
            | Error::Duplicate(_)
            | Error::StillRunning { .. }
            | Error::StoppedWhileStarting
            | Error::Private { .. } => Self::failed_precondition(message),
            Error::Exec(_) | Error::Network(_) => Self::unknown(message),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bytes that a Go host accepts as recoverable for the message `boom`.
    #[test]
    fn recoverable_errors_have_the_bytes_that_nomad_reads() {
        let expected = "08091204626f6f6d1a510a4b747970652e676f6f676c65617069732e636f6d2f68617368\
                        69636f72702e6e6f6d61642e706c7567696e732e7368617265642e737472756374732e52\
                        65636f76657261626c654572726f7212020801";
        let status = recoverable("boom".into());
        assert_eq!(status.code(), Code::FailedPrecondition);
        assert_eq!(hex::encode(status.details()), expected);
    }

    #[test]
    fn a_wrong_image_is_final_and_a_missing_docker_is_not() {
        let not_ready = Status::from(Error::NotReady {
            reason: "no Docker".into(),
        });
        assert!(!not_ready.details().is_empty());
        let root = slot::FillError::RootImage {
            image: "x".into(),
            user: "root".into(),
        };
        let status = Status::from(Error::Start(root));
        assert!(status.details().is_empty());
        assert!(
            status.message().contains("`slot.image`"),
            "{}",
            status.message()
        );
    }
}
