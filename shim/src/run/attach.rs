//! Finds a run that exists, on any node, and attaches to it: after a broken connection, or for a
//! caller that comes through another shim.

use std::time::{Duration, Instant};

use futures_util::{StreamExt, stream::FuturesUnordered};
use polydev_proto::{
    id::{RunId, UserId},
    node::{
        Attach, AttachRequest, CancelRunRequest, RunInput, attach_request,
        node_service_client::NodeServiceClient,
    },
    stream::{PerStream, Stream},
};
use tokio::{sync::mpsc, time::sleep};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, transport::Channel};

use super::{
    Connection, Error, Events, MAX_INPUTS, answered,
    request::{parse_id, parse_user},
};
use crate::pool::View;
use polydev_transport::backoff::Backoff;

/// Time between two tries to reach a driver that was reachable just now.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// A run and its user.
#[derive(Debug, Clone)]
pub struct Name {
    pub run_id: RunId,
    pub user_id: UserId,
}

impl Name {
    /// # Errors
    /// [`Error::Invalid`] names the field.
    pub fn parse(run_id: &str, user_id: String) -> Result<Self, Error> {
        // An empty user id means the operator to a driver.
        let user_id = parse_user(user_id)?;
        let run_id = parse_id("run_id", run_id)?;
        Ok(Self { run_id, user_id })
    }

    /// The name of a lease, which has the id of its run.
    ///
    /// # Errors
    /// [`Error::Invalid`] names the field.
    pub fn parse_lease(lease_id: &str, user_id: String) -> Result<Self, Error> {
        let user_id = parse_user(user_id)?;
        let run_id = parse_id("lease_id", lease_id)?;
        Ok(Self { run_id, user_id })
    }
}

/// Attaches to a run of `node_id`, from the given offsets of stdout, stderr and artifacts.
///
/// # Errors
/// The driver's status, or UNAVAILABLE.
async fn attach_at(
    node_id: String,
    channel: Channel,
    name: &Name,
    offsets: PerStream<u64>,
) -> Result<Connection, Status> {
    let sent = Instant::now();
    let (inputs, queue) = mpsc::channel::<RunInput>(MAX_INPUTS);
    let first = attach_request::Message::Attach(Attach {
        run_id: name.run_id.into(),
        user_id: name.user_id.clone().into(),
        stdout_offset: offsets[Stream::Stdout],
        stderr_offset: offsets[Stream::Stderr],
        artifact_offset: offsets[Stream::Artifacts],
        event_offset: offsets[Stream::Events],
    });
    let rest = ReceiverStream::new(queue).map(attach_request::Message::Input);
    let requests = futures_util::stream::iter([first])
        .chain(rest)
        .map(|message| AttachRequest {
            message: Some(message),
        });
    let mut client = NodeServiceClient::new(channel);
    answered(async {
        let events = client.attach(requests).await?.into_inner();
        Connection::new(node_id, sent, inputs, Events::Attached(Box::new(events))).await
    })
    .await
}

/// Attaches to a run on whichever node has it.
///
/// # Errors
/// [`Error`]
///
/// # Cancel safety
/// Loses nothing.
pub async fn attach(
    view: &View,
    name: &Name,
    offsets: PerStream<u64>,
) -> Result<Connection, Error> {
    let ask = |node_id, channel| attach_at(node_id, channel, name, offsets);
    first_of(view, name, ask).await
}

/// Attaches to a run on the node that has it, as soon as the node can be reached.
///
/// # Errors
/// As [`attach`], but waits for a node that cannot be reached.
///
/// # Cancel safety
/// Loses nothing.
pub async fn attach_again(
    view: &View,
    node_id: &str,
    name: &Name,
    offsets: PerStream<u64>,
) -> Result<Connection, Error> {
    let mut retry = Backoff::steady(RETRY_INTERVAL);
    loop {
        let channel = view.channel(node_id).await;
        match attach_at(node_id.to_owned(), channel, name, offsets).await {
            Ok(connection) => return Ok(connection),
            Err(status) if is_answer(&status) => return Err(Error::of(status, name)),
            Err(status) => tracing::debug!(node_id, %status, "not attached yet"),
        }
        sleep(retry.next_wait()).await;
    }
}

/// Ends a run on whichever node has it.
///
/// # Errors
/// [`Error`]
pub async fn cancel(view: &View, name: &Name) -> Result<(), Error> {
    let ask = |_, channel| async {
        let request = CancelRunRequest {
            run_id: name.run_id.into(),
            user_id: name.user_id.clone().into(),
            ..Default::default()
        };
        let mut client = NodeServiceClient::new(channel);
        answered(client.cancel_run(request)).await.map(drop)
    };
    first_of(view, name, ask).await
}

/// Asks every node at once; at most one has the run. A node may have another user's run with the
/// same id: that is no answer about this one.
pub(super) async fn first_of<T, F>(
    view: &View,
    name: &Name,
    ask: impl Fn(String, Channel) -> F,
) -> Result<T, Error>
where
    F: Future<Output = Result<T, Status>>,
{
    let (nodes, mut unreachable) = view.channels();
    let mut asked: FuturesUnordered<_> = nodes
        .into_iter()
        .map(|(node_id, channel)| {
            let answer = ask(node_id.clone(), channel);
            async move { (node_id, answer.await) }
        })
        .collect();
    let (mut not_found, mut forbidden) = (None, None);
    while let Some((node_id, answer)) = asked.next().await {
        match answer {
            Ok(found) => return Ok(found),
            Err(status) if status.code() == Code::NotFound => {
                not_found.get_or_insert(status);
            }
            // A claim of the run did not start there; another node may have the run.
            Err(status) if status.code() == Code::FailedPrecondition => not_found = Some(status),
            Err(status) if status.code() == Code::PermissionDenied => {
                forbidden.get_or_insert(status);
            }
            Err(status) if is_answer(&status) => return Err(Error::of(status, name)),
            Err(_) => unreachable.push(node_id),
        }
    }
    match forbidden.or(not_found) {
        _ if !unreachable.is_empty() => Err(Error::Unasked { nodes: unreachable }),
        Some(status) => Err(Error::of(status, name)),
        None => Err(Error::NoNode),
    }
}

/// Whether the status comes from the driver, and not from the connection.
fn is_answer(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::NotFound
            | Code::PermissionDenied
            | Code::FailedPrecondition
            | Code::OutOfRange
            | Code::InvalidArgument
    )
}

impl Error {
    fn of(status: Status, name: &Name) -> Self {
        let reason = status.message().to_owned();
        match status.code() {
            Code::NotFound => Self::UnknownRun { reason },
            Code::PermissionDenied => Self::Forbidden {
                run_id: name.run_id,
                user_id: name.user_id.clone(),
            },
            Code::FailedPrecondition => Self::NotStarted { reason },
            Code::OutOfRange => Self::BeyondEnd { reason },
            _ => Self::Refused { reason },
        }
    }
}
