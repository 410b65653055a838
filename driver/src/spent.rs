//! What users have used of models today, for the budgets of roles. The figures are in a file for
//! each user too: a run may end while the driver is away, and then nobody reports it again.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    path::Path,
};

use parking_lot::{Mutex, MutexGuard};
use polydev_proto::{
    broker::Seen,
    budget::{Used, today},
    id::{RunId, UserId},
};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::state::{files, records::Records};

/// The figures of one day. A run counts for the day on which it ends; until then, for today.
#[derive(Debug)]
pub(crate) struct Spent {
    records: Records<Record>,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    day: u64,
    users: BTreeMap<UserId, Figures>,
}

/// The figures of a user.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Figures {
    /// Of runs that are over.
    over: Used,
    /// Of each other run, from its start.
    open: HashMap<RunId, Used>,
}

/// The file of a user.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    user_id: UserId,
    day: u64,
    figures: Figures,
}

impl Spent {
    /// Reads what an earlier life of the driver has counted today, and removes the rest. `open` are
    /// the runs that continue.
    ///
    /// # Errors
    /// [`files::Error`]
    pub(crate) fn open(state_dir: &Path, open: &HashSet<RunId>) -> Result<Self, files::Error> {
        let records = Records::<Record>::open(state_dir.join("spent"))?;
        let day = today();
        let mut users = BTreeMap::new();
        for found in records.read() {
            let Record {
                user_id,
                day: of,
                mut figures,
            } = found.record;
            if of != day {
                figures.over = Used::default();
            }
            let (open, over): (HashMap<_, _>, HashMap<_, _>) =
                (figures.open.drain()).partition(|(run_id, _)| open.contains(run_id));
            figures.open = open;
            if of == day {
                over.into_values().for_each(|used| figures.over.add(used));
            }
            if figures.is_empty() {
                records.remove(&name(&user_id));
            } else {
                users.insert(user_id, figures);
            }
        }
        Ok(Self {
            records,
            inner: Inner { day, users }.into(),
        })
    }

    /// The broker has reported what a run that is not over has used from its start. Returns whether
    /// that is new, and should be [written](Self::write).
    #[must_use]
    pub(crate) fn saw(&self, run_id: RunId, user_id: &UserId, seen: &Seen) -> bool {
        let used = Used::of(seen.requests, &seen.usage);
        let mut inner = self.lock();
        let known = inner.users.get(user_id);
        let known = known.and_then(|figures| figures.open.get(&run_id));
        let is_new = used != known.copied().unwrap_or_default();
        if is_new {
            let figures = inner.users.entry(user_id.clone()).or_default();
            figures.open.insert(run_id, used);
        }
        is_new
    }

    /// A run is over: nothing is reported of it from now on.
    pub(crate) fn over(&self, run_id: RunId, user_id: &UserId) {
        let mut inner = self.lock();
        let figures = inner.users.get_mut(user_id);
        let used = figures.and_then(|figures| {
            let used = figures.open.remove(&run_id)?;
            figures.over.add(used);
            Some(used)
        });
        drop(inner);
        if used.is_some() {
            self.write(user_id);
        }
    }

    /// The day, in days since 1970-01-01 (UTC), and what each user has used of it.
    pub(crate) fn today(&self) -> (u64, BTreeMap<UserId, Used>) {
        let inner = self.lock();
        let users = inner.users.iter();
        let users = users.map(|(user_id, figures)| (user_id.clone(), figures.sum()));
        (inner.day, users.collect())
    }

    /// Writes the figures of a user for the next life of the driver.
    pub(crate) fn write(&self, user_id: &UserId) {
        // It stays locked, so that the last figures win.
        let inner = self.lock();
        let record = Record {
            user_id: user_id.clone(),
            day: inner.day,
            figures: inner.users.get(user_id).cloned().unwrap_or_default(),
        };
        if let Err(error) = self.records.write(&name(user_id), &record) {
            let error = crate::chain(&error);
            tracing::error!(
                %user_id,
                error,
                "a restarted driver will not know what a user has used"
            );
        }
    }

    /// The figures of today, whatever day it was before.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        let mut inner = self.inner.lock();
        let day = today();
        if inner.day != day {
            inner.day = day;
            inner.users.retain(|user_id, figures| {
                figures.over = Used::default();
                if figures.is_empty() {
                    self.records.remove(&name(user_id));
                }
                !figures.is_empty()
            });
        }
        inner
    }
}

impl Figures {
    fn is_empty(&self) -> bool {
        self.open.is_empty() && self.over == Used::default()
    }

    fn sum(&self) -> Used {
        let mut sum = self.over;
        self.open.values().for_each(|used| sum.add(*used));
        sum
    }
}

/// A user's id may have any bytes.
fn name(user_id: &UserId) -> String {
    hex::encode(&Sha256::digest(user_id.as_str())[..16])
}

#[cfg(test)]
mod tests {
    use polydev_proto::broker::ModelUsage;

    use super::*;

    fn seen(requests: u64, input_tokens: u64) -> Seen {
        Seen {
            requests,
            usage: vec![ModelUsage {
                input_tokens,
                output_tokens: 1,
                ..ModelUsage::default()
            }],
            ..Seen::default()
        }
    }

    fn saw(spent: &Spent, run_id: RunId, user: &UserId, seen: &Seen) {
        assert!(spent.saw(run_id, user, seen));
        assert!(!spent.saw(run_id, user, seen), "that is known");
        spent.write(user);
    }

    #[test]
    fn what_a_user_has_used_is_the_sum_of_the_runs_and_outlives_the_driver() {
        let folder = tempfile::tempdir().unwrap();
        let (alice, bob) = (UserId::from("alice"), UserId::from("../bob"));
        let runs: Vec<RunId> = (0..3).map(|_| RunId::now()).collect();
        let of = |spent: &Spent, user: &UserId| spent.today().1.get(user).copied();
        let used = |requests, tokens| Some(Used { requests, tokens });
        let spent = Spent::open(folder.path(), &HashSet::new()).unwrap();
        saw(&spent, runs[0], &alice, &seen(1, 9));
        saw(&spent, runs[0], &alice, &seen(2, 19));
        saw(&spent, runs[1], &alice, &seen(5, 99));
        saw(&spent, runs[2], &bob, &seen(1, 0));
        assert_eq!(of(&spent, &alice), used(7, 120));
        spent.over(runs[0], &alice);
        spent.over(runs[0], &alice);
        spent.over(runs[2], &bob);
        assert_eq!(of(&spent, &alice), used(7, 120));

        let next = Spent::open(folder.path(), &[runs[1]].into()).unwrap();
        assert_eq!(of(&next, &alice), used(7, 120));
        assert_eq!(of(&next, &bob), used(1, 1));
        saw(&next, runs[1], &alice, &seen(6, 99));
        assert_eq!(of(&next, &alice), used(8, 120));

        // One that ended meanwhile counts as it was, and is not open for ever.
        let last = Spent::open(folder.path(), &HashSet::new()).unwrap();
        assert_eq!(of(&last, &alice), used(8, 120));
        assert!(last.inner.lock().users[&alice].open.is_empty());
    }

    #[test]
    fn yesterdays_figures_are_gone() {
        let folder = tempfile::tempdir().unwrap();
        let spent = Spent::open(folder.path(), &HashSet::new()).unwrap();
        let (alice, bob) = (UserId::from("alice"), UserId::from("bob"));
        let (ended, open) = (RunId::now(), RunId::now());
        for (run, user) in [(ended, &alice), (RunId::now(), &bob)] {
            saw(&spent, run, user, &seen(1, 1));
            spent.over(run, user);
        }
        saw(&spent, open, &alice, &seen(3, 1));
        spent.inner.lock().day -= 1;
        let (day, all) = spent.today();
        assert_eq!(day, today());
        assert_eq!(all[&alice].requests, 3, "a run that goes on counts");
        assert_eq!(all.get(&bob), None);
    }
}
