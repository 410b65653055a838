//! Every run of the node that a question may come about, and the decision about a claim:
//! the only place where a run id gets a run.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use procfs::{Current, sys::kernel::random::boot_id};
use rustix::fs::statvfs;
use tokio::{sync::mpsc, time::MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::{
    Ballot, Ended, Input, Outcome, Progress, Run, STREAMS,
    claim::{self, ID_AGE_MOST, Parsed, Refusal},
    journal::{self, Claimed, Journal, Record},
    window::Window,
};

/// From a run's end, for a caller that comes back.
pub const KEEP_RESULTS: Duration = Duration::from_secs(10 * 60);
/// A run id is remembered until no claim of it can come any more, by any clock.
const REMEMBER: Duration = ID_AGE_MOST.saturating_add(KEEP_RESULTS);
const LOOK: Duration = Duration::from_secs(5);
/// How much of the node's memory the output of its runs may take.
const WINDOWS: &str = "size=25%,mode=0700";
/// By how much the clock that made a run id may differ from this machine's.
const CLOCKS: Duration = Duration::from_secs(60);
/// Left for the output of one more run.
const ROOM: u64 = 16 << 20;

/// Why runs cannot be taken up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Journal(#[from] journal::Error),
    #[error("cannot keep output in memory at `{path}`")]
    Windows {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("the kernel does not say its boot id")]
    Boot(#[source] procfs::ProcError),
}

/// The runs of one node.
#[derive(Debug)]
pub struct Runs {
    inner: Mutex<Inner>,
    /// A tmpfs of our own with the runs' output.
    windows: PathBuf,
    pub(crate) boot_id: String,
    /// Of runs that were made before, some may be forgotten: the machine was restarted.
    since: SystemTime,
}

#[derive(Debug)]
struct Inner {
    known: HashMap<String, Known>,
    journal: Journal,
}

/// What is known of a run id.
#[derive(Debug)]
enum Known {
    Run(Arc<Run>),
    /// Its results are not kept any more.
    Past(Past),
    /// It has not run here, and claims up to this ballot are refused.
    Fenced {
        ballot: Ballot,
        at: SystemTime,
        /// A claim of it came to nothing.
        aborted: bool,
    },
}

#[derive(Debug, Clone)]
struct Past {
    spec_hash: String,
    slot_id: String,
    generation: u64,
    claimed_at: SystemTime,
}

/// The answer to a claim that is not refused.
pub(crate) enum Admitted {
    /// A new run, which the slot is to carry.
    New(Arc<Run>, mpsc::Receiver<Input>),
    /// The run was claimed before.
    Known(Arc<Run>),
}

/// The answer to a fence.
pub enum Fenced {
    Have {
        slot_id: String,
        generation: u64,
        ended: bool,
    },
    Fenced(Ballot),
    Unknown,
}

/// Why a run cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum NotFound {
    #[error("this node has no run `{run_id}`")]
    Unknown { run_id: String },
    #[error("run `{run_id}` has ended, and its results were kept for {} minutes", KEEP_RESULTS.as_secs() / 60)]
    Released { run_id: String },
    #[error("run `{run_id}` was claimed and not started")]
    Aborted { run_id: String },
    #[error("run `{run_id}` is another user's")]
    Forbidden { run_id: String },
}

/// A container that a claim gets, as the journal must have it.
#[derive(Debug, Clone)]
pub(crate) struct Occupant {
    pub(crate) container: String,
    pub(crate) pid: u32,
    pub(crate) pid_start: u64,
    pub(crate) link: PathBuf,
}

impl Runs {
    /// Reads what an earlier life of the driver left. The runs that were open then are
    /// returned with it, for [`super::recover`].
    ///
    /// # Errors
    /// [`Error`]; nothing has been changed that a later try would miss.
    pub(crate) fn open(state_dir: &Path) -> Result<(Self, Vec<super::recover::Open>), Error> {
        let boot_id = boot_id().map_err(Error::Boot)?;
        let (journal, records) = Journal::open(state_dir)?;
        let windows = mount_windows(state_dir).map_err(|source| Error::Windows {
            path: state_dir.join("output"),
            source,
        })?;
        let begun = journal.begun();
        let mut known = HashMap::new();
        let mut open = Vec::new();
        for (run_id, found) in fold(records) {
            let entry = match found {
                Found::Past(past) => Known::Past(past),
                Found::Fenced {
                    ballot,
                    at,
                    aborted,
                } => Known::Fenced {
                    ballot,
                    at,
                    aborted,
                },
                Found::Run {
                    claimed,
                    started,
                    cancelled,
                    ended,
                } => {
                    let (run, inputs) = take_up(*claimed, started, ended, &windows);
                    if cancelled {
                        run.cancel.cancel();
                    }
                    if !run.is_over() {
                        open.push(super::recover::Open {
                            run: run.clone(),
                            inputs,
                        });
                    }
                    Known::Run(run)
                }
            };
            known.insert(run_id, entry);
        }
        let runs = Self {
            inner: Inner { known, journal }.into(),
            windows,
            boot_id,
            since: (booted().map_err(Error::Boot)? + CLOCKS).max(begun),
        };
        Ok((runs, open))
    }

    /// Decides about a claim. `take` takes the slot, if it can be had, and is given the
    /// function that writes the run down.
    ///
    /// # Errors
    /// [`Refusal`], definite: nothing has changed.
    pub(crate) fn admit(
        &self,
        parsed: &Parsed,
        arrived: Instant,
        kill: impl FnOnce() -> CancellationToken,
        take: impl FnOnce(&mut dyn FnMut(Claimed) -> Result<(), Refusal>) -> Result<(), Refusal>,
    ) -> Result<Admitted, Refusal> {
        let run_id = &parsed.start.run_id;
        let mut inner = self.lock();
        if let Some(run) = inner.repeated(parsed)? {
            return Ok(Admitted::Known(run));
        }
        claim::check_age(run_id, SystemTime::now())?;
        while !self.has_room() {
            if !inner.release_oldest() {
                let held = inner.runs().count();
                return Err(Refusal::NoOutput { held });
            }
        }
        let mut written = None;
        let Inner { known, journal } = &mut *inner;
        take(&mut |claimed: Claimed| {
            journal.write(&Record::Claimed(claimed.clone().into()))?;
            written = Some(claimed);
            Ok(())
        })?;
        let claimed = written.expect("whoever takes a slot writes its claim down");
        let (run, inputs) = Run::new(claimed, arrived, &self.windows, kill());
        known.insert(run_id.clone(), Known::Run(run.clone()));
        Ok(Admitted::New(run, inputs))
    }

    /// The run that a claim is for, if it has been claimed before.
    ///
    /// # Errors
    /// [`Refusal`] if no slot can be claimed for it.
    pub(crate) fn repeated(&self, parsed: &Parsed) -> Result<Option<Arc<Run>>, Refusal> {
        self.lock().repeated(parsed)
    }

    /// A run with its results, for its own user.
    ///
    /// # Errors
    /// [`NotFound`]
    pub fn find(&self, run_id: &str, user_id: &str) -> Result<Arc<Run>, NotFound> {
        let run_id = run_id.to_owned();
        match self.lock().known.get(&run_id) {
            Some(Known::Run(run)) if run.claimed.user_id == user_id => Ok(run.clone()),
            Some(Known::Run(_)) => Err(NotFound::Forbidden { run_id }),
            Some(Known::Past(_)) => Err(NotFound::Released { run_id }),
            Some(Known::Fenced { aborted: true, .. }) => Err(NotFound::Aborted { run_id }),
            Some(Known::Fenced { .. }) | None => Err(NotFound::Unknown { run_id }),
        }
    }

    /// Closes a run to claims below `ballot`, unless there is a run.
    ///
    /// # Errors
    /// [`journal::Error`]: it is not closed.
    pub fn fence(&self, run_id: &str, ballot: Ballot) -> Result<Fenced, journal::Error> {
        let mut inner = self.lock();
        let Inner { known, journal } = &mut *inner;
        let highest = match known.get(run_id) {
            Some(Known::Run(run)) => {
                let (slot_id, generation) = (run.claimed.slot_id.clone(), run.claimed.generation);
                return Ok(Fenced::Have {
                    slot_id,
                    generation,
                    ended: run.is_over(),
                });
            }
            Some(Known::Past(past)) => {
                return Ok(Fenced::Have {
                    slot_id: past.slot_id.clone(),
                    generation: past.generation,
                    ended: true,
                });
            }
            Some(Known::Fenced { ballot: fence, .. }) => (*fence).max(ballot),
            None if self.may_have_forgotten(run_id) => return Ok(Fenced::Unknown),
            None => ballot,
        };
        let aborted = matches!(known.get(run_id), Some(Known::Fenced { aborted: true, .. }));
        let at = SystemTime::now();
        journal.write(&Record::Fenced {
            run_id: run_id.to_owned(),
            ballot: highest,
            at,
        })?;
        let fence = Known::Fenced {
            ballot: highest,
            at,
            aborted,
        };
        known.insert(run_id.to_owned(), fence);
        Ok(Fenced::Fenced(highest))
    }

    /// What was made before this boot or this journal, and what is remembered no longer.
    fn may_have_forgotten(&self, run_id: &str) -> bool {
        let oldest = SystemTime::now().checked_sub(REMEMBER);
        claim::made_at(run_id)
            .is_ok_and(|made| made < self.since || oldest.is_some_and(|oldest| made < oldest))
    }

    /// Asks a run to end: SIGTERM now, SIGKILL after its kill timeout; a restarted driver
    /// remembers that.
    pub fn cancel(&self, run: &Run) {
        if !run.is_over() && !run.cancel.is_cancelled() {
            let run_id = run.claimed.run_id.clone();
            self.remember(&Record::Cancelled { run_id }, |_| ());
        }
        run.cancel.cancel();
    }

    /// The open run in a slot, if there is one.
    pub(crate) fn open_in(&self, slot_id: &str) -> Option<Arc<Run>> {
        let inner = self.lock();
        let mut open = inner
            .runs()
            .filter(|run| run.claimed.slot_id == slot_id && !run.gone.is_cancelled());
        open.next().cloned()
    }

    /// The last container of a slot that had a run.
    pub(crate) fn last_generation(&self, slot_id: &str) -> u64 {
        let inner = self.lock();
        let generations = inner.known.values().filter_map(|known| match known {
            Known::Run(run) if run.claimed.slot_id == slot_id => Some(run.claimed.generation),
            Known::Past(past) if past.slot_id == slot_id => Some(past.generation),
            _ => None,
        });
        generations.max().unwrap_or(0)
    }

    /// Whether a run is in a container, or was until a moment ago.
    pub(crate) fn holds(&self, container: &str) -> bool {
        let inner = self.lock();
        inner
            .runs()
            .any(|run| run.claimed.container == container && !run.gone.is_cancelled())
    }

    /// Whether a run goes on.
    pub(crate) fn is_busy(&self) -> bool {
        self.lock().runs().any(|run| !run.is_over())
    }

    pub(super) fn started(&self, run: &Run) {
        let after = run.arrived.elapsed();
        let record = Record::Started {
            run_id: run.claimed.run_id.clone(),
            after,
        };
        self.remember(&record, |_| {
            run.update(|progress| progress.started = Some(after));
        });
    }

    /// A run is over, with a result.
    pub(super) fn ended(&self, run: &Run, ended: Ended) {
        let record = Record::Exited {
            run_id: run.claimed.run_id.clone(),
            ended: ended.clone(),
        };
        let outcome = Some(Outcome::Ended(ended));
        self.remember(&record, |_| {
            run.update(|progress| progress.outcome = outcome);
        });
    }

    /// A claim came to nothing: another one may follow, above its ballot.
    pub(crate) fn aborted(&self, run: &Run, refusal: Refusal) {
        let run_id = &run.claimed.run_id;
        let record = Record::Aborted {
            run_id: run_id.clone(),
        };
        let outcome = Some(Outcome::Aborted(refusal.into()));
        let fence = Known::Fenced {
            ballot: run.claimed.ballot,
            at: SystemTime::now(),
            aborted: true,
        };
        self.remember(&record, |known| {
            known.insert(run_id.clone(), fence);
            run.update(|progress| progress.outcome = outcome);
        });
        run.output.iter().for_each(Window::release);
    }

    /// Gives up the results of the run that ended first.
    pub(super) fn make_room(&self) {
        self.lock().release_oldest();
    }

    /// Nothing is left that a driver could take up; results of ended runs go too.
    pub(crate) fn leave(&self) {
        if let Err(error) = umount2(&self.windows, MntFlags::MNT_DETACH) {
            tracing::debug!(%error, "the output's memory stays");
        }
    }

    /// Writes a step down, and takes it before the journal can be written anew. One that
    /// cannot be written does not stop what already runs.
    fn remember(&self, record: &Record, step: impl FnOnce(&mut HashMap<String, Known>)) {
        let mut inner = self.lock();
        if let Err(error) = inner.journal.write(record) {
            let run_id = record.run_id();
            tracing::error!(run_id, error = crate::chain(&error), "not in the journal");
        }
        step(&mut inner.known);
    }

    /// Whether the output of one more run fits.
    fn has_room(&self) -> bool {
        statvfs(&self.windows).is_ok_and(|space| space.f_bavail * space.f_frsize >= ROOM)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tidy(&self, now: SystemTime) {
        let mut inner = self.lock();
        let old: Vec<Arc<Run>> = inner
            .runs()
            .filter(|run| run.ended_before(now.checked_sub(KEEP_RESULTS)))
            .cloned()
            .collect();
        old.iter().for_each(|run| inner.release(run));
        inner.known.retain(|_, known| match known {
            Known::Run(_) => true,
            Known::Past(Past { claimed_at: at, .. }) | Known::Fenced { at, .. } => {
                // A time to come is one of a clock that was set back.
                now.duration_since(*at).map_or(true, |age| age < REMEMBER)
            }
        });
        if inner.journal.is_long(inner.known.len()) {
            let records: Vec<Record> = inner.known.iter().flat_map(Known::records).collect();
            if let Err(error) = inner.journal.rewrite(&records) {
                tracing::warn!(error = crate::chain(&error), "the journal stays long");
            }
        }
    }
}

impl Inner {
    fn runs(&self) -> impl Iterator<Item = &Arc<Run>> {
        self.known.values().filter_map(|known| match known {
            Known::Run(run) => Some(run),
            Known::Past(_) | Known::Fenced { .. } => None,
        })
    }

    fn repeated(&self, parsed: &Parsed) -> Result<Option<Arc<Run>>, Refusal> {
        let run_id = parsed.start.run_id.clone();
        match self.known.get(&run_id) {
            None => Ok(None),
            Some(Known::Run(run)) if run.claimed.spec_hash == parsed.spec_hash => {
                Ok(Some(run.clone()))
            }
            Some(Known::Past(past)) if past.spec_hash == parsed.spec_hash => {
                Err(Refusal::Released { run_id })
            }
            Some(Known::Run(_) | Known::Past(_)) => Err(Refusal::OtherCommand { run_id }),
            // Above a fence it is the turn of who made it, and of nobody else.
            Some(Known::Fenced { ballot: fence, .. })
                if parsed.ballot <= *fence || parsed.ballot.nonce != fence.nonce =>
            {
                Err(Refusal::Fenced { fence: *fence })
            }
            Some(Known::Fenced { .. }) => Ok(None),
        }
    }

    /// False if there is nothing to give up.
    fn release_oldest(&mut self) -> bool {
        let ended = self.runs().filter(|run| run.is_over());
        let oldest = ended.min_by_key(|run| run.claimed.claimed_at).cloned();
        oldest.inspect(|run| self.release(run)).is_some()
    }

    fn release(&mut self, run: &Run) {
        run.output.iter().for_each(Window::release);
        let past = Past {
            spec_hash: run.claimed.spec_hash.clone(),
            slot_id: run.claimed.slot_id.clone(),
            generation: run.claimed.generation,
            claimed_at: run.claimed.claimed_at,
        };
        let run_id = run.claimed.run_id.clone();
        if let Err(error) = self.journal.write(&past.record(&run_id)) {
            tracing::warn!(run_id, error = crate::chain(&error), "not in the journal");
        }
        self.known.insert(run_id, Known::Past(past));
    }
}

impl Past {
    fn record(&self, run_id: &str) -> Record {
        Record::Released {
            run_id: run_id.to_owned(),
            spec_hash: self.spec_hash.clone(),
            slot_id: self.slot_id.clone(),
            generation: self.generation,
            claimed_at: self.claimed_at,
        }
    }
}

impl Known {
    fn records((run_id, known): (&String, &Self)) -> Vec<Record> {
        let run_id = run_id.clone();
        match known {
            Self::Past(past) => vec![past.record(&run_id)],
            Self::Fenced { ballot, at, .. } => vec![Record::Fenced {
                run_id,
                ballot: *ballot,
                at: *at,
            }],
            Self::Run(run) => {
                let progress = run.progress.borrow();
                let started = progress.started.map(|after| Record::Started {
                    run_id: run_id.clone(),
                    after,
                });
                let exited = match &progress.outcome {
                    Some(Outcome::Ended(ended)) => Some(Record::Exited {
                        run_id,
                        ended: ended.clone(),
                    }),
                    Some(Outcome::Aborted(_)) | None => None,
                };
                let cancelled = run.cancel.is_cancelled().then(|| Record::Cancelled {
                    run_id: run.claimed.run_id.clone(),
                });
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

impl Run {
    fn ended_before(&self, moment: Option<SystemTime>) -> bool {
        let progress = self.progress.borrow();
        let Some(Outcome::Ended(ended)) = &progress.outcome else {
            return false;
        };
        moment.is_some_and(|moment| self.claimed.claimed_at + ended.after < moment)
    }
}

/// What records say of a run, taken together.
enum Found {
    Run {
        claimed: Box<Claimed>,
        started: Option<Duration>,
        cancelled: bool,
        ended: Option<Ended>,
    },
    Past(Past),
    Fenced {
        ballot: Ballot,
        at: SystemTime,
        aborted: bool,
    },
}

fn fold(records: Vec<Record>) -> HashMap<String, Found> {
    let mut found: HashMap<String, Found> = HashMap::new();
    for record in records {
        let run_id = record.run_id().to_owned();
        match record {
            Record::Format { .. } => {}
            Record::Claimed(claimed) => {
                let run = Found::Run {
                    claimed,
                    started: None,
                    cancelled: false,
                    ended: None,
                };
                found.insert(run_id, run);
            }
            Record::Started { after, .. } => {
                if let Some(Found::Run { started, .. }) = found.get_mut(&run_id) {
                    *started = Some(after);
                }
            }
            Record::Cancelled { .. } => {
                if let Some(Found::Run { cancelled, .. }) = found.get_mut(&run_id) {
                    *cancelled = true;
                }
            }
            Record::Exited { ended: end, .. } => {
                if let Some(Found::Run { ended, .. }) = found.get_mut(&run_id) {
                    *ended = Some(end);
                }
            }
            Record::Aborted { .. } => {
                if let Some(Found::Run { claimed, .. }) = found.get(&run_id) {
                    let fence = Found::Fenced {
                        ballot: claimed.ballot,
                        at: claimed.claimed_at,
                        aborted: true,
                    };
                    found.insert(run_id, fence);
                }
            }
            Record::Released {
                spec_hash,
                slot_id,
                generation,
                claimed_at,
                ..
            } => {
                let past = Past {
                    spec_hash,
                    slot_id,
                    generation,
                    claimed_at,
                };
                found.insert(run_id, Found::Past(past));
            }
            Record::Fenced { ballot, at, .. } => {
                let fence = Found::Fenced {
                    ballot,
                    at,
                    aborted: false,
                };
                found.insert(run_id, fence);
            }
        }
    }
    found
}

/// A run of an earlier life of the driver.
fn take_up(
    claimed: Claimed,
    started: Option<Duration>,
    ended: Option<Ended>,
    windows: &Path,
) -> (Arc<Run>, mpsc::Receiver<Input>) {
    let output = STREAMS.map(|name| {
        let path = windows.join(super::file_name(&claimed, name));
        Window::recover(path.clone()).unwrap_or_else(|error| {
            tracing::error!(path = %path.display(), %error, "output is lost");
            Window::new(path)
        })
    });
    let arrived = Run::arrival(&claimed);
    let is_over = ended.is_some();
    let progress = Progress {
        started,
        outcome: ended.map(Outcome::Ended),
        ..Progress::default()
    };
    let kill = CancellationToken::new();
    let (run, inputs) = Run::with(claimed, arrived, output, kill, progress);
    if is_over {
        run.gone.cancel();
    }
    (run, inputs)
}

/// When the machine was started.
fn booted() -> Result<SystemTime, procfs::ProcError> {
    let uptime = procfs::Uptime::current()?.uptime_duration();
    Ok(SystemTime::now()
        .checked_sub(uptime)
        .unwrap_or(SystemTime::UNIX_EPOCH))
}

/// Output is to be in memory and on no disk, and outlives this process.
fn mount_windows(state_dir: &Path) -> std::io::Result<PathBuf> {
    use std::os::unix::fs::MetadataExt;
    let path = state_dir.join("output");
    std::fs::create_dir_all(&path)?;
    if path.metadata()?.dev() != state_dir.metadata()?.dev() {
        return Ok(path); // Of an earlier life.
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let mount = |options: &str| mount(Some("tmpfs"), &path, Some("tmpfs"), flags, Some(options));
    // Linux knows `noswap` since 6.4.
    let mounted = mount(&format!("{WINDOWS},noswap")).or_else(|_| mount(WINDOWS));
    mounted.map_err(std::io::Error::from)?;
    Ok(path)
}

/// Gives up what is kept no longer, and takes the journal to the disk, for ever.
pub(crate) async fn keep(runs: Arc<Runs>) {
    let dirty = runs.lock().journal.dirty();
    let sync = journal::sync(dirty, || runs.lock().journal.file());
    let tidy = async {
        let mut ticks = tokio::time::interval(LOOK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            runs.tidy(SystemTime::now());
        }
    };
    tokio::join!(sync, tidy);
}
