//! Every run of the node that somebody may ask about, and the decision about a claim: this
//! is the only place where a run id gets a run. [`admission`] is that decision in its
//! phases, [`replay`] converts between book and journal, [`reports`] is for what the broker
//! has seen, [`memory`] is where output is kept, [`tidy`] discards what is no longer kept,
//! and [`fence`] closes a run to all tries but one.

mod admission;
mod fence;
mod memory;
mod replay;
mod reports;
mod tidy;

pub(crate) use admission::{Admission, Admit};
pub use fence::Fenced;
pub(crate) use replay::Open;
pub(crate) use tidy::keep;

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use parking_lot::{Mutex, MutexGuard};
use polydev_proto::{
    id::{Generation, RunId, SlotId, UserId},
    init::{Form, ToolCall},
};
use procfs::sys::kernel::random::boot_id;
use tokio::sync::broadcast;

use super::{
    Ended, Outcome, Run,
    cancel::Cause,
    claim::{self, MAX_ID_AGE, Parsed, Refusal},
    journal::{self, Journal, Record},
    script,
    standing::{OnClaim, Standing},
};
use crate::{scripts::Scripts, spent::Spent, state::files, tokens::Tokens};
use fence::Fence;
use memory::Memory;

/// How long after its end a run's results stay for a caller that comes back.
pub const RESULTS_TIMEOUT: Duration = Duration::from_secs(10 * 60);
/// A run id is remembered until no claim with it can arrive any longer, by any clock.
const MEMORY_TIMEOUT: Duration = MAX_ID_AGE.saturating_add(RESULTS_TIMEOUT);
/// How many steps a watcher may lag before it must list all runs again.
const MAX_STEPS: usize = 1024;
/// How far the clock that made a run id may be ahead of this machine's clock when the driver
/// decides whether the run may be older than the machine's start. The larger value in
/// `claim.rs` only limits which ids may be claimed.
const MAX_CLOCK_SKEW: Duration = Duration::from_secs(60);

/// Why the book cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Journal(#[from] journal::Error),
    #[error(transparent)]
    Files(#[from] files::Error),
    #[error("cannot keep output in memory at `{path}`")]
    Windows {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("cannot read the kernel's boot id")]
    Boot(#[source] procfs::ProcError),
}

/// The runs of one node.
#[derive(Debug)]
pub struct Runs {
    inner: Mutex<Inner>,
    /// Holds the runs' output.
    windows: Memory,
    pub(crate) boot_id: String,
    /// Runs older than the machine's start or the journal may be forgotten.
    booted: SystemTime,
    begun: SystemTime,
    /// The id of each run that is new or has made progress.
    steps: broadcast::Sender<RunId>,
    /// The id of each run with a newly refreshed account.
    pub(super) refreshed: broadcast::Sender<RunId>,
    /// Each call of a tool that comes to wait for an answer, or ends.
    pub(super) tool_calls: broadcast::Sender<(Arc<Run>, CallNews)>,
    /// Used by the runs of this life of the driver.
    pub(crate) tokens: Tokens,
    pub(crate) spent: Spent,
    pub(crate) scripts: Scripts,
}

/// What shims hear about a call of a tool.
#[derive(Debug, Clone)]
pub enum CallNews {
    /// It waits for an answer.
    Waits(Arc<ToolCall>),
    /// The call with this number does not wait any longer.
    Ended(u64),
}

#[derive(Debug)]
struct Inner {
    known: HashMap<RunId, Known>,
    journal: Journal,
}

/// What is known about a run id.
#[derive(Debug)]
enum Known {
    Run(Arc<Run>),
    /// The run's results are no longer kept.
    Past(Past),
    /// The run has not run here.
    Fenced(Fence),
}

#[derive(Debug, Clone)]
struct Past {
    /// `None` if an older driver wrote the record.
    user_id: Option<UserId>,
    spec_hash: String,
    slot_id: SlotId,
    generation: Generation,
    claimed_at: SystemTime,
}

/// Why a run is not available.
#[derive(Debug, thiserror::Error)]
pub enum NotFound {
    #[error("this node has no run `{run_id}`")]
    Unknown { run_id: RunId },
    #[error("run `{run_id}` has ended, and its results were kept for {} minutes", RESULTS_TIMEOUT.as_secs() / 60)]
    Released { run_id: RunId },
    #[error("run `{run_id}` was claimed but not started")]
    Aborted { run_id: RunId },
    #[error("run `{run_id}` belongs to another user")]
    Forbidden { run_id: RunId },
}

impl Runs {
    /// Reads what an earlier life of the driver left. Returns the runs that were open then,
    /// for `node/recover.rs`.
    ///
    /// # Errors
    /// [`Error`]; a later attempt finds everything unchanged.
    pub(crate) fn open(state_dir: &Path) -> Result<(Self, Vec<Open>), Error> {
        let boot_id = boot_id().map_err(Error::Boot)?;
        let (journal, records) = Journal::open(state_dir)?;
        let windows = Memory::mount(state_dir).map_err(|source| Error::Windows {
            path: state_dir.join("output"),
            source,
        })?;
        let begun = journal.begun();
        let (known, open) = replay::replay(records, windows.path());
        let continued = open.iter().map(|open| open.run.claimed.run_id);
        let spent = Spent::open(state_dir, &continued.collect())?;
        let runs = Self {
            inner: Inner { known, journal }.into(),
            windows,
            boot_id,
            booted: booted(),
            begun,
            steps: broadcast::Sender::new(MAX_STEPS),
            refreshed: broadcast::Sender::new(MAX_STEPS),
            tool_calls: broadcast::Sender::new(MAX_STEPS),
            tokens: Tokens::default(),
            spent,
            scripts: Scripts::open(state_dir),
        };
        Ok((runs, open))
    }

    /// The run of a claim that was made before.
    ///
    /// # Errors
    /// [`Refusal`] if the claim cannot get a slot.
    pub(crate) fn repeated(&self, parsed: &Parsed) -> Result<Option<Arc<Run>>, Refusal> {
        self.lock().repeated(parsed)
    }

    /// Starts to admit a claim. No other claim is decided until the [`Admission`] is used
    /// or dropped.
    ///
    /// # Errors
    /// [`Refusal`], which is final: nothing has changed.
    pub(crate) fn admit(&self, parsed: &Parsed) -> Result<Admit<'_>, Refusal> {
        let inner = self.lock();
        if let Some(run) = inner.repeated(parsed)? {
            return Ok(Admit::Known(run));
        }
        claim::check_age(parsed.run_id, SystemTime::now())?;
        Ok(Admit::New(Admission { runs: self, inner }))
    }

    /// A run with its results, for its own user or, with `None`, for the operator.
    ///
    /// # Errors
    /// [`NotFound`]
    pub fn find(&self, run_id: RunId, user_id: Option<&UserId>) -> Result<Arc<Run>, NotFound> {
        let inner = self.lock();
        let known = inner.known.get(&run_id);
        let is_others = known.is_some_and(|known| known.is_others(user_id));
        match known {
            // Another user's fence tells nothing.
            Some(Known::Fenced(_)) if is_others => Err(NotFound::Unknown { run_id }),
            Some(_) if is_others => Err(NotFound::Forbidden { run_id }),
            Some(Known::Run(run)) => Ok(run.clone()),
            Some(Known::Past(_)) => Err(NotFound::Released { run_id }),
            Some(Known::Fenced(fence)) if fence.aborted => Err(NotFound::Aborted { run_id }),
            Some(Known::Fenced(_)) | None => Err(NotFound::Unknown { run_id }),
        }
    }

    /// Whether a run is older than this boot or this journal, or was forgotten since.
    fn may_have_forgotten(&self, run_id: RunId) -> bool {
        // A journal that was started in this boot has lost nothing to it.
        let since = if self.begun > self.booted {
            self.begun
        } else {
            self.booted + MAX_CLOCK_SKEW
        };
        let oldest = SystemTime::now().checked_sub(MEMORY_TIMEOUT);
        let made = run_id.made_at();
        made < since || oldest.is_some_and(|oldest| made < oldest)
    }

    /// Asks a run to end: SIGTERM now, and SIGKILL after its kill timeout. A restarted
    /// driver remembers the request.
    pub fn cancel(&self, run: &Run, cause: Cause) {
        if run.is_over() || run.cancel.cause().is_some() {
            return;
        }
        let record = Record::cancelled(run.claimed.run_id, &cause);
        self.remember(run, &record, |_| run.cancel.ask(cause));
    }

    /// The open run in a slot, if any.
    pub(crate) fn open_in(&self, slot_id: &SlotId) -> Option<Arc<Run>> {
        let inner = self.lock();
        let mut open = inner
            .runs()
            .filter(|run| run.claimed.slot_id == *slot_id && !run.gone.is_cancelled());
        open.next().cloned()
    }

    /// The number of a slot's last container that had a run; 0 if none had.
    pub(crate) fn last_generation(&self, slot_id: &SlotId) -> Generation {
        let inner = self.lock();
        let generations = inner.known.values().filter_map(|known| match known {
            Known::Run(run) if run.claimed.slot_id == *slot_id => Some(run.claimed.generation),
            Known::Past(past) if past.slot_id == *slot_id => Some(past.generation),
            _ => None,
        });
        generations.max().unwrap_or_default()
    }

    /// Whether a run has been claimed on this node.
    pub(crate) fn has_run(&self, run_id: RunId) -> bool {
        let inner = self.lock();
        let known = inner.known.get(&run_id);
        matches!(known, Some(Known::Run(_) | Known::Past(_)))
    }

    /// Whether a container has a run, or had one until a moment ago.
    pub(crate) fn holds(&self, container: &str) -> bool {
        let inner = self.lock();
        inner
            .runs()
            .any(|run| run.claimed.container == container && !run.gone.is_cancelled())
    }

    /// The matching runs whose results are kept, in no particular order.
    pub(super) fn all(&self, fits: impl Fn(&Run) -> bool) -> Vec<Arc<Run>> {
        let inner = self.lock();
        inner.runs().filter(|run| fits(run)).cloned().collect()
    }

    /// The number of runs that have not ended.
    pub(crate) fn going(&self) -> usize {
        self.lock().runs().filter(|run| !run.is_over()).count()
    }

    pub(super) fn started(&self, run: &Run, form: Option<Form>) {
        let after = run.arrived.elapsed();
        let record = Record::Started {
            run_id: run.claimed.run_id,
            after,
        };
        self.remember(run, &record, |_| {
            run.update(|progress| {
                progress.started = Some(after);
                progress.form = form;
            });
        });
    }

    /// Records that a run ended, with its result.
    pub(crate) fn ended(&self, run: &Run, ended: Ended) {
        let record = Record::Exited {
            run_id: run.claimed.run_id,
            ended: ended.clone(),
        };
        let script = script::execution(run, &ended);
        let outcome = Some(Outcome::Ended(ended));
        self.remember(run, &record, |_| {
            run.update(|progress| progress.outcome = outcome);
        });
        self.end_tool_calls(run);
        if let Some(script) = script {
            self.scripts.ended(&script);
        }
        // After the outcome, with which reports of the run no longer count.
        self.spent.over(run.claimed.run_id, &run.claimed.user_id);
    }

    /// Records that a claim failed before the start. The same try may claim again, above
    /// its ballot.
    pub(crate) fn aborted(&self, run: &Run, refusal: Refusal) {
        let run_id = run.claimed.run_id;
        let record = Record::Aborted { run_id };
        let outcome = Some(Outcome::Aborted(refusal.into()));
        let fence = Known::Fenced(Fence::aborted(&run.claimed, SystemTime::now()));
        self.remember(run, &record, |known| {
            known.insert(run_id, fence);
            run.update(|progress| progress.outcome = outcome);
        });
        run.release_output();
    }

    /// Discards the results of the run that ended first.
    pub(super) fn make_room(&self) {
        self.lock().release_oldest();
    }

    /// Unmounts the output: no run is left to recover, and the results of ended runs go too.
    pub(crate) fn leave(&self) {
        self.windows.unmount();
    }

    /// Journals a step, and applies it before the journal can be rewritten. If the write
    /// fails, what already runs continues.
    fn remember(&self, run: &Run, record: &Record, step: impl FnOnce(&mut HashMap<RunId, Known>)) {
        let run_id = run.claimed.run_id;
        let mut inner = self.lock();
        if let Err(error) = inner.journal.write(record) {
            tracing::error!(
                %run_id,
                error = crate::chain(&error),
                "cannot write to the journal"
            );
        }
        step(&mut inner.known);
        self.tell(run_id);
    }

    fn tell(&self, run_id: RunId) {
        // Often there is no listener.
        let _listeners = self.steps.send(run_id);
    }

    /// When the journal was started; older runs may be unknown to this node.
    pub fn since(&self) -> SystemTime {
        self.begun
    }

    /// The id of each run that is new or makes progress, from now on.
    pub fn steps(&self) -> broadcast::Receiver<RunId> {
        self.steps.subscribe()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock()
    }
}

impl Known {
    fn run(&self) -> Option<&Arc<Run>> {
        match self {
            Self::Run(run) => Some(run),
            Self::Past(_) | Self::Fenced(_) => None,
        }
    }

    /// Whether the id was first seen with a run of another user than this.
    fn is_others(&self, user_id: Option<&UserId>) -> bool {
        let own = match self {
            Self::Run(run) => Some(&run.claimed.user_id),
            Self::Past(past) => past.user_id.as_ref(),
            Self::Fenced(fence) => fence.user_id.as_ref(),
        };
        own.zip(user_id).is_some_and(|(own, user)| own != user)
    }

    fn standing(&self, user_id: Option<&UserId>) -> Standing<&str> {
        match self {
            _ if self.is_others(user_id) => Standing::OtherUser,
            Self::Run(run) => Standing::Ran {
                spec: &run.claimed.spec_hash,
                kept: true,
            },
            Self::Past(past) => Standing::Ran {
                spec: &past.spec_hash,
                kept: false,
            },
            Self::Fenced(fence) => Standing::Fenced(fence.ballot),
        }
    }
}

impl Inner {
    fn runs(&self) -> impl Iterator<Item = &Arc<Run>> {
        self.known.values().filter_map(Known::run)
    }

    fn repeated(&self, parsed: &Parsed) -> Result<Option<Arc<Run>>, Refusal> {
        let run_id = parsed.run_id;
        let known = self.known.get(&run_id);
        let standing = known.map(|known| known.standing(Some(&parsed.user_id)));
        match Standing::on_claim(standing.as_ref(), &&*parsed.spec_hash, parsed.ballot) {
            OnClaim::Take => Ok(None),
            OnClaim::Repeat => Ok(known.and_then(Known::run).cloned()),
            OnClaim::Released => Err(Refusal::Released { run_id }),
            OnClaim::OtherCommand => Err(Refusal::OtherCommand { run_id }),
            OnClaim::Fenced(fence) => Err(Refusal::Fenced { fence }),
            OnClaim::OtherUser => Err(Refusal::OtherUser { run_id }),
        }
    }

    /// Returns false if there is nothing to discard.
    fn release_oldest(&mut self) -> bool {
        let ended = self.runs().filter(|run| run.is_over());
        let oldest = ended.min_by_key(|run| run.claimed.claimed_at).cloned();
        oldest.inspect(|run| self.release(run)).is_some()
    }

    fn release(&mut self, run: &Run) {
        run.release_output();
        let past = Past {
            user_id: Some(run.claimed.user_id.clone()),
            spec_hash: run.claimed.spec_hash.clone(),
            slot_id: run.claimed.slot_id.clone(),
            generation: run.claimed.generation,
            claimed_at: run.claimed.claimed_at,
        };
        let run_id = run.claimed.run_id;
        if let Err(error) = self.journal.write(&past.record(run_id)) {
            tracing::warn!(
                %run_id,
                error = crate::chain(&error),
                "cannot write to the journal"
            );
        }
        self.known.insert(run_id, Known::Past(past));
    }
}

/// When the machine was started.
fn booted() -> SystemTime {
    let now = SystemTime::now();
    now.checked_sub(super::uptime()).unwrap_or(now)
}
