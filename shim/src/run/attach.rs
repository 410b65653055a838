//! The way to a run that exists, wherever it is: back to it after a broken connection, or
//! for a caller that comes through another shim.

use std::time::{Duration, Instant};

use futures_util::{StreamExt, stream::FuturesUnordered};
use polydev_proto::node::{
    Attach, AttachRequest, CancelRunRequest, RunInput, attach_request,
    node_service_client::NodeServiceClient,
};
use tokio::{sync::mpsc, time::sleep};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, transport::Channel};

use super::{
    Connection, Error, Events, INPUTS, answered,
    request::{check_user, parse_id},
};
use crate::pool::View;
use polydev_transport::backoff::Backoff;

/// Between attempts to reach a driver that has just been there.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// Which run, whose.
#[derive(Debug, Clone)]
pub struct Name {
    pub run_id: String,
    pub user_id: String,
}

impl Name {
    /// # Errors
    /// [`Error::Invalid`] names the field.
    pub fn parse(run_id: &str, user_id: String) -> Result<Self, Error> {
        // To a driver nobody is the operator.
        check_user(&user_id)?;
        let run_id = parse_id("run_id", run_id)?.to_string();
        Ok(Self { run_id, user_id })
    }

    /// Of a lease, which is called like its run.
    ///
    /// # Errors
    /// [`Error::Invalid`] names the field.
    pub fn parse_lease(lease_id: &str, user_id: String) -> Result<Self, Error> {
        check_user(&user_id)?;
        let run_id = parse_id("lease_id", lease_id)?.to_string();
        Ok(Self { run_id, user_id })
    }
}

/// Attaches to a run of `node_id`, from `offsets` of stdout, stderr and artifacts on.
///
/// # Errors
/// The driver's status, or UNAVAILABLE.
async fn attach_at(
    node_id: String,
    channel: Channel,
    name: &Name,
    offsets: [u64; 3],
) -> Result<Connection, Status> {
    let sent = Instant::now();
    let (inputs, queue) = mpsc::channel::<RunInput>(INPUTS);
    let [stdout_offset, stderr_offset, artifact_offset] = offsets;
    let first = attach_request::Message::Attach(Attach {
        run_id: name.run_id.clone(),
        user_id: name.user_id.clone(),
        stdout_offset,
        stderr_offset,
        artifact_offset,
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
pub async fn attach(view: &View, name: &Name, offsets: [u64; 3]) -> Result<Connection, Error> {
    let ask = |node_id, channel| attach_at(node_id, channel, name, offsets);
    first_of(view, name, ask).await
}

/// Attaches to a run on the node that has it, as soon as that can be reached.
///
/// # Errors
/// As [`attach`]; a node that cannot be reached is waited for.
///
/// # Cancel safety
/// Loses nothing.
pub async fn attach_again(
    view: &View,
    node_id: &str,
    name: &Name,
    offsets: [u64; 3],
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

/// Ends a run, wherever it is.
///
/// # Errors
/// [`Error`]
pub async fn cancel(view: &View, name: &Name) -> Result<(), Error> {
    let ask = |_, channel| async {
        let request = CancelRunRequest {
            run_id: name.run_id.clone(),
            user_id: name.user_id.clone(),
            ..Default::default()
        };
        let mut client = NodeServiceClient::new(channel);
        answered(client.cancel_run(request)).await.map(drop)
    };
    first_of(view, name, ask).await
}

/// Asks every node at once; at most one has the run.
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
    let mut not_found = None;
    while let Some((node_id, answer)) = asked.next().await {
        match answer {
            Ok(found) => return Ok(found),
            Err(status) if status.code() == Code::NotFound => {
                not_found.get_or_insert(status);
            }
            // A claim of it came to nothing there; another node may have the run.
            Err(status) if status.code() == Code::FailedPrecondition => not_found = Some(status),
            Err(status) if is_answer(&status) => return Err(Error::of(status, name)),
            Err(_) => unreachable.push(node_id),
        }
    }
    match not_found {
        _ if !unreachable.is_empty() => Err(Error::Unasked { nodes: unreachable }),
        Some(status) => Err(Error::of(status, name)),
        None => Err(Error::NoNode),
    }
}

/// The driver has spoken, and not the wire.
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
                run_id: name.run_id.clone(),
                user_id: name.user_id.clone(),
            },
            Code::FailedPrecondition => Self::NotStarted { reason },
            Code::OutOfRange => Self::BeyondEnd { reason },
            _ => Self::Refused { reason },
        }
    }
}
