//! Discards results, run ids and records that are no longer kept.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::time::MissedTickBehavior;

use super::{Known, MEMORY_TIMEOUT, Past, RESULTS_TIMEOUT, Runs, fence::Fence};
use crate::run::{
    Outcome, Run,
    journal::{self, Record, Rewrite},
};

const TIDY_INTERVAL: Duration = Duration::from_secs(5);

/// Discards what is no longer kept, and syncs the journal to disk, forever.
pub(crate) async fn keep(runs: Arc<Runs>) {
    let dirty = runs.lock().journal.dirty();
    let sync = journal::sync(dirty, || runs.lock().journal.file());
    let tidy = async {
        let mut ticks = tokio::time::interval(TIDY_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let Some(rewrite) = runs.tidy(SystemTime::now()) else {
                continue;
            };
            // Nobody waits for the disk: the runs are not locked meanwhile.
            let mut written = on_disk(|| rewrite.write()).await;
            loop {
                let finished = runs.lock().journal.finish(written);
                match finished {
                    Ok(Some(more)) => written = on_disk(|| more.sync()).await,
                    Ok(None) => break,
                    Err(error) => {
                        tracing::warn!(error = crate::chain(&error), "cannot shorten the journal");
                        break;
                    }
                }
            }
        }
    };
    tokio::join!(sync, tidy);
}

async fn on_disk<T: Send + 'static>(write: impl FnOnce() -> T + Send + 'static) -> T {
    let written = tokio::task::spawn_blocking(write).await;
    written.expect("writing does not panic")
}

impl Runs {
    /// Returns the journal's new content if it has become too long.
    fn tidy(&self, now: SystemTime) -> Option<Rewrite> {
        let mut inner = self.lock();
        let old: Vec<Arc<Run>> = inner
            .runs()
            .filter(|run| run.ended_before(now.checked_sub(RESULTS_TIMEOUT)))
            .cloned()
            .collect();
        old.iter().for_each(|run| inner.release(run));
        inner.known.retain(|_, known| match known {
            Known::Run(_) => true,
            Known::Past(Past { claimed_at: at, .. }) | Known::Fenced(Fence { at, .. }) => {
                // A time in the future means that the clock was set back.
                now.duration_since(*at)
                    .map_or(true, |age| age < MEMORY_TIMEOUT)
            }
        });
        let is_long = inner.journal.is_long(inner.known.len());
        is_long.then(|| {
            let records: Vec<Record> = inner.known.iter().flat_map(Known::records).collect();
            inner.journal.begin(&records)
        })
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::{
        Ended,
        book::NotFound,
        journal::{
            Claimed, Journal,
            tests::{claimed, run_id},
        },
    };

    #[tokio::test]
    async fn results_are_kept_for_ten_minutes_and_ids_for_longer() {
        let (folder, elsewhere) = (
            tempfile::tempdir().unwrap(),
            tempfile::tempdir_in("/dev/shm").unwrap(),
        );
        // Uses a link to a folder in memory, because mounting requires root.
        std::os::unix::fs::symlink(elsewhere.path(), folder.path().join("output")).unwrap();
        let now = SystemTime::now();
        let minutes = |minutes: u64| Duration::from_secs(60 * minutes);
        let (mut journal, _) = Journal::open(folder.path()).unwrap();
        let (short, long) = (run_id(1), run_id(2));
        for (run_id, after) in [(short, minutes(0)), (long, minutes(8))] {
            let claimed = Claimed {
                claimed_at: now,
                ..claimed(run_id)
            };
            journal.write(&Record::Claimed(claimed.into())).unwrap();
            let ended = Ended {
                after,
                ..Ended::default()
            };
            journal.write(&Record::Exited { run_id, ended }).unwrap();
        }
        drop(journal);

        let (runs, open) = Runs::open(folder.path()).unwrap();
        assert!(open.is_empty());
        let state = |run_id| match runs.find(run_id, None) {
            Ok(_) => "kept",
            Err(NotFound::Released { .. }) => "released",
            Err(NotFound::Unknown { .. }) => "unknown",
            Err(other) => panic!("{other}"),
        };
        for (minute, shorts, longs) in [
            (9, "kept", "kept"),
            (11, "released", "kept"),
            (19, "released", "released"),
            (69, "released", "released"),
            (71, "unknown", "unknown"),
        ] {
            let rewrite = runs.tidy(now + minutes(minute));
            assert!(rewrite.is_none(), "the journal is short");
            assert_eq!([state(short), state(long)], [shorts, longs], "{minute} min");
        }
    }

    #[tokio::test]
    async fn a_journal_is_shortened_while_runs_go_on() {
        let (folder, elsewhere) = (
            tempfile::tempdir().unwrap(),
            tempfile::tempdir_in("/dev/shm").unwrap(),
        );
        std::os::unix::fs::symlink(elsewhere.path(), folder.path().join("output")).unwrap();
        let (mut journal, _) = Journal::open(folder.path()).unwrap();
        let now = SystemTime::now();
        let old = Claimed {
            claimed_at: now - MEMORY_TIMEOUT - MEMORY_TIMEOUT,
            ..claimed(run_id(1))
        };
        let record = Record::Claimed(old.into());
        while !journal.is_long(1) {
            journal.write(&record).unwrap();
        }
        let length = |folder: &std::path::Path| {
            std::fs::metadata(folder.join("runs.journal"))
                .unwrap()
                .len()
        };
        let before = length(folder.path());
        drop(journal);
        let (runs, _) = Runs::open(folder.path()).unwrap();
        runs.inner.lock().known.clear();
        let rewrite = runs.tidy(now).expect("it is long");
        // A disk may take its time here.
        let meanwhile = Record::Claimed(claimed(run_id(2)).into());
        runs.lock().journal.write(&meanwhile).unwrap();
        assert!(runs.find(run_id(3), None).is_err());
        let more = runs.lock().journal.finish(rewrite.write()).unwrap();
        let more = more.expect("something was written meanwhile").sync();
        assert!(runs.lock().journal.finish(more).unwrap().is_none());
        assert!(length(folder.path()) < before / 100);
        drop(runs);
        let (_, read) = Journal::open(folder.path()).unwrap();
        assert_eq!(read, [meanwhile]);
    }
}
