//! Fences: a run that has not run here, and may run in one place only, is closed to all
//! tries but one. The id is bound to the user of the first fence or claim.

use std::{collections::BTreeSet, time::SystemTime};

use polydev_proto::id::{Generation, RunId, SlotId, UserId};

use super::{Known, Runs};
use crate::run::{
    Ballot,
    journal::{self, Claimed, Record},
    standing::{OnFence, Standing},
};

/// Most newer nodes that are remembered per run; with more, this node cannot decide.
const MAX_NEWER: usize = 100;

/// Accepts only claims above this ballot that have its nonce.
#[derive(Debug, Clone)]
pub(super) struct Fence {
    /// `None` if an older shim or driver did not say.
    pub(super) user_id: Option<UserId>,
    pub(super) ballot: Ballot,
    pub(super) at: SystemTime,
    /// Whether a claim of the run failed before its start.
    pub(super) aborted: bool,
    /// Ids of the nodes, newer than the run, that tries have announced they will claim on.
    pub(super) claims_on: BTreeSet<String>,
}

/// The response to a fence.
pub enum Fenced {
    Have {
        slot_id: SlotId,
        generation: Generation,
        ended: bool,
    },
    Fenced {
        /// The highest ballot seen.
        ballot: Ballot,
        claims_on: BTreeSet<String>,
    },
    /// The id was first seen here with another user's run, and nothing is closed.
    OtherUser,
    Unknown {
        /// Whether the journal was started after the run id was made.
        is_newer: bool,
    },
}

impl Runs {
    /// Closes a run to all tries but the one of `ballot`, unless the run is here. Records
    /// the newer node that the try announces, if any. Without a user, as an older shim asks,
    /// the run may be anybody's.
    ///
    /// # Errors
    /// [`journal::Error`]; the run is not closed.
    pub fn fence(
        &self,
        run_id: RunId,
        user_id: Option<UserId>,
        ballot: Ballot,
        claims_on: Option<String>,
    ) -> Result<Fenced, journal::Error> {
        let mut inner = self.lock();
        let known = inner.known.get(&run_id);
        let is_others = known.is_some_and(|known| known.is_others(user_id.as_ref()));
        // This user's run may have been here before the other user's came.
        if (known.is_none() || is_others) && self.may_have_forgotten(run_id) {
            let is_newer = run_id.made_at() < self.begun;
            return Ok(Fenced::Unknown { is_newer });
        }
        let before = match known {
            Some(_) if is_others => return Ok(Fenced::OtherUser),
            Some(Known::Run(run)) => {
                return Ok(Fenced::Have {
                    slot_id: run.claimed.slot_id.clone(),
                    generation: run.claimed.generation,
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
            Some(Known::Fenced(fence)) => Some(fence.clone()),
            None => None,
        };
        let standing = known.map(|known| known.standing(user_id.as_ref()));
        let OnFence::Fenced(highest) = Standing::on_fence(standing.as_ref(), ballot) else {
            unreachable!("only a run that has run here is `Have`")
        };
        let (mut newer, aborted, bound_to) = before.map_or_else(
            || (BTreeSet::new(), false, user_id),
            // One that belongs to nobody may be of this user's run, or of another's.
            |fence| (fence.claims_on, fence.aborted, fence.user_id),
        );
        newer.extend(claims_on);
        if newer.len() > MAX_NEWER {
            return Ok(Fenced::Unknown { is_newer: false });
        }
        let fence = Fence {
            user_id: bound_to,
            ballot: highest,
            at: SystemTime::now(),
            aborted,
            claims_on: newer,
        };
        inner.journal.write(&fence.record(run_id))?;
        let claims_on = fence.claims_on.clone();
        inner.known.insert(run_id, Known::Fenced(fence));
        Ok(Fenced::Fenced {
            ballot: highest,
            claims_on,
        })
    }
}

impl Fence {
    /// The fence after a claim that failed before its start.
    pub(super) fn aborted(claimed: &Claimed, at: SystemTime) -> Self {
        Self {
            user_id: Some(claimed.user_id.clone()),
            ballot: claimed.ballot,
            at,
            aborted: true,
            claims_on: BTreeSet::new(),
        }
    }

    /// Its only journal record.
    pub(super) fn record(&self, run_id: RunId) -> Record {
        Record::Fenced {
            run_id,
            user_id: self.user_id.clone(),
            ballot: self.ballot,
            at: self.at,
            aborted: self.aborted,
            claims_on: self.claims_on.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::run::{
        Ended,
        book::NotFound,
        journal::{Journal, tests::claimed},
    };

    /// A folder for the state, with the output in memory: mounting requires root.
    fn folders() -> [tempfile::TempDir; 2] {
        let folder = tempfile::tempdir().unwrap();
        let elsewhere = tempfile::tempdir_in("/dev/shm").unwrap();
        std::os::unix::fs::symlink(elsewhere.path(), folder.path().join("output")).unwrap();
        [folder, elsewhere]
    }

    fn id(after: i64) -> RunId {
        let seconds = Duration::from_secs(after.unsigned_abs());
        let now = SystemTime::now();
        let made = if after < 0 {
            now - seconds
        } else {
            now + seconds
        };
        RunId::new(made, [7; 10])
    }

    fn fence(runs: &Runs, run_id: RunId, user_id: Option<&str>) -> Fenced {
        let ballot = Ballot {
            attempt: 2,
            nonce: 9,
        };
        let user_id = user_id.map(UserId::from);
        runs.fence(run_id, user_id, ballot, None).unwrap()
    }

    #[test]
    fn an_id_is_the_users_who_first_comes_with_it_also_after_a_restart() {
        let [folder, _output] = folders();
        let (run_id, bob) = (id(1), UserId::from("bob"));
        for _ in 0..2 {
            let (runs, _) = Runs::open(folder.path()).unwrap();
            for (user, is_hers) in [(Some("alice"), true), (Some("bob"), false), (None, true)] {
                let answer = fence(&runs, run_id, user);
                assert_eq!(matches!(answer, Fenced::Fenced { .. }), is_hers, "{user:?}");
                assert_eq!(matches!(answer, Fenced::OtherUser), !is_hers, "{user:?}");
            }
            let found = runs.find(run_id, Some(&bob));
            assert!(matches!(found, Err(NotFound::Unknown { .. })), "{found:?}");
        }
    }

    /// The node may have had a run of this user, and have lost its journal since.
    #[test]
    fn a_newer_node_cannot_tell_even_if_another_users_run_has_the_id() {
        let [folder, _output] = folders();
        let run_id = id(-60);
        let (mut journal, _) = Journal::open(folder.path()).unwrap();
        let record = Record::Claimed(claimed(run_id).into());
        journal.write(&record).unwrap();
        let ended = Ended::default();
        journal.write(&Record::Exited { run_id, ended }).unwrap();
        drop(journal);
        let (runs, _) = Runs::open(folder.path()).unwrap();
        let owner = claimed(run_id).user_id.to_string();
        let answer = fence(&runs, run_id, Some(&owner));
        assert!(matches!(answer, Fenced::Have { ended: true, .. }));
        let answer = fence(&runs, run_id, Some("somebody else"));
        assert!(matches!(answer, Fenced::Unknown { is_newer: true }));
    }
}
