//! What an earlier life of the driver knew about runs, from its journal, and what the
//! journal must contain for the next one.

use std::{collections::HashMap, path::Path, sync::Arc, time::Duration};

use polydev_proto::{id::RunId, stream::PerStream};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{Known, Past, fence::Fence};
use crate::run::{
    Ended, Input, Outcome, Progress, Run,
    api::Answers,
    cancel::Cause,
    file_name,
    journal::{Claimed, Record},
    window::Window,
};

/// A run that was open when an earlier life of the driver ended.
#[derive(Debug)]
pub(crate) struct Open {
    pub(crate) run: Arc<Run>,
    pub(crate) inputs: mpsc::Receiver<Input>,
}

impl Open {
    /// The folder of its container's socket, which is in use.
    pub(crate) fn link(&self) -> &Path {
        &self.run.claimed.link
    }
}

/// What is known about each run id, and the runs that were open.
pub(super) fn replay(records: Vec<Record>, windows: &Path) -> (HashMap<RunId, Known>, Vec<Open>) {
    let mut open = Vec::new();
    let known = fold(records).into_iter().map(|(run_id, found)| {
        let known = match found {
            Found::Settled(known) => known,
            Found::Run(traces) => {
                let (run, inputs) = take_up(*traces, windows);
                if !run.is_over() {
                    let run = run.clone();
                    open.push(Open { run, inputs });
                }
                Known::Run(run)
            }
        };
        (run_id, known)
    });
    (known.collect(), open)
}

/// The combined records of a run id.
enum Found {
    Run(Box<Traces>),
    Settled(Known),
}

struct Traces {
    claimed: Claimed,
    started: Option<Duration>,
    cancelled: Option<Cause>,
    ended: Option<Ended>,
}

fn fold(records: Vec<Record>) -> HashMap<RunId, Found> {
    let mut found: HashMap<RunId, Found> = HashMap::new();
    for record in records {
        let Some(run_id) = record.run_id() else {
            continue;
        };
        let run = match found.get_mut(&run_id) {
            Some(Found::Run(run)) => Some(run),
            Some(Found::Settled(_)) | None => None,
        };
        let known = match record {
            Record::Format { .. } => continue,
            Record::Claimed(claimed) => Found::Run(Box::new(Traces {
                claimed: *claimed,
                started: None,
                cancelled: None,
                ended: None,
            })),
            Record::Started { after, .. } => {
                run.into_iter().for_each(|run| run.started = Some(after));
                continue;
            }
            Record::Cancelled {
                reason,
                credential_refused,
                api_unavailable,
                budget_exhausted,
                ..
            } => {
                let cause = match (credential_refused, api_unavailable, budget_exhausted) {
                    (true, ..) => Cause::CredentialRefused(reason),
                    (_, true, _) => Cause::ApiUnavailable(reason),
                    (.., true) => Cause::BudgetExhausted(reason),
                    (false, false, false) => Cause::Asked(reason),
                };
                if let Some(run) = run {
                    run.cancelled.get_or_insert(cause);
                }
                continue;
            }
            Record::Exited { ended, .. } => {
                if let Some(run) = run {
                    run.ended = Some(ended);
                }
                continue;
            }
            Record::Aborted { .. } => {
                let Some(run) = run else { continue };
                let claimed = &run.claimed;
                let fence = Fence::aborted(claimed, claimed.claimed_at);
                Found::Settled(Known::Fenced(fence))
            }
            Record::Released {
                user_id,
                spec_hash,
                slot_id,
                generation,
                claimed_at,
                ..
            } => Found::Settled(Known::Past(Past {
                user_id,
                spec_hash,
                slot_id,
                generation,
                claimed_at,
            })),
            Record::Fenced {
                user_id,
                ballot,
                at,
                aborted,
                claims_on,
                ..
            } => Found::Settled(Known::Fenced(Fence {
                user_id,
                ballot,
                at,
                aborted,
                claims_on,
            })),
        };
        found.insert(run_id, known);
    }
    found
}

fn take_up(traces: Traces, windows: &Path) -> (Arc<Run>, mpsc::Receiver<Input>) {
    let Traces {
        claimed,
        started,
        cancelled,
        ended,
    } = traces;
    let output = PerStream::from_fn(|stream| {
        let path = windows.join(file_name(&claimed, stream.name()));
        Window::recover(path.clone()).unwrap_or_else(|error| {
            tracing::error!(path = %path.display(), %error, "cannot recover output; it is lost");
            Window::new(path)
        })
    });
    let arrived = Run::arrival(&claimed);
    let is_over = ended.is_some();
    let answers = ended.as_ref().map(|ended| Answers::of(ended).into());
    let progress = Progress {
        started,
        answers,
        outcome: ended.map(Outcome::Ended),
        ..Progress::default()
    };
    let kill = CancellationToken::new();
    let (run, inputs) = Run::with(claimed, arrived, windows, output, kill, progress);
    let artifacts = run.manifest.read().map(Arc::new);
    let refreshed = run.refreshed.read();
    run.update(|progress| {
        progress.artifacts = artifacts;
        progress.refreshed = refreshed;
    });
    if let Some(cause) = cancelled {
        run.cancel.ask(cause);
    }
    if is_over {
        run.is_gone();
    }
    (run, inputs)
}

impl Past {
    /// Its only journal record.
    pub(super) fn record(&self, run_id: RunId) -> Record {
        Record::Released {
            run_id,
            user_id: self.user_id.clone(),
            spec_hash: self.spec_hash.clone(),
            slot_id: self.slot_id.clone(),
            generation: self.generation,
            claimed_at: self.claimed_at,
        }
    }
}

impl Known {
    /// The records that a rewritten journal must contain.
    pub(super) fn records((&run_id, known): (&RunId, &Self)) -> Vec<Record> {
        match known {
            Self::Past(past) => vec![past.record(run_id)],
            Self::Fenced(fence) => vec![fence.record(run_id)],
            Self::Run(run) => {
                let progress = run.progress.borrow();
                let started = progress
                    .started
                    .map(|after| Record::Started { run_id, after });
                let exited = match &progress.outcome {
                    Some(Outcome::Ended(ended)) => Some(Record::Exited {
                        run_id,
                        ended: ended.clone(),
                    }),
                    Some(Outcome::Aborted(_)) | None => None,
                };
                let cancelled = run.cancel.cause();
                let cancelled = cancelled.map(|cause| Record::cancelled(run_id, cause));
                [Record::Claimed(run.claimed.clone().into())]
                    .into_iter()
                    .chain(started)
                    .chain(cancelled)
                    .chain(exited)
                    .collect()
            }
        }
    }
}
