//! What users have used today of models, for the budgets that shims enforce. What runs that are
//! over have used is in a file for each user, because the next life of the driver needs it; what
//! the others have used so far, the broker reports again.

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
    time::SystemTime,
};

use parking_lot::{Mutex, MutexGuard};
use polydev_proto::{
    broker::Seen,
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
    over: BTreeMap<UserId, Figures>,
    open: HashMap<RunId, (UserId, Figures)>,
}

/// How much of models was used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Figures {
    pub(crate) requests: u64,
    /// Input and output.
    pub(crate) tokens: u64,
}

/// The file of a user.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    user_id: UserId,
    day: u64,
    #[serde(flatten)]
    figures: Figures,
}

impl Spent {
    /// Reads what an earlier life of the driver has counted today, and removes the rest.
    ///
    /// # Errors
    /// [`files::Error`]
    pub(crate) fn open(state_dir: &Path) -> Result<Self, files::Error> {
        let records = Records::<Record>::open(state_dir.join("spent"))?;
        let day = today();
        let mut over = BTreeMap::new();
        for found in records.read() {
            let Record {
                user_id,
                day: of,
                figures,
            } = found.record;
            if of == day {
                over.insert(user_id, figures);
            } else {
                records.remove(&name(&user_id));
            }
        }
        let inner = Inner {
            day,
            over,
            ..Inner::default()
        };
        Ok(Self {
            records,
            inner: inner.into(),
        })
    }

    /// The broker has reported what a run has used from its start.
    pub(crate) fn saw(&self, run_id: RunId, user_id: &UserId, seen: &Seen) {
        let mut figures = Figures {
            requests: seen.requests,
            tokens: 0,
        };
        for used in &seen.usage {
            figures.add(Figures {
                requests: 0,
                tokens: used.input_tokens.saturating_add(used.output_tokens),
            });
        }
        if figures != Figures::default() {
            let mut inner = self.lock();
            inner.open.insert(run_id, (user_id.clone(), figures));
        }
    }

    /// A run is over.
    pub(crate) fn over(&self, run_id: RunId) {
        let mut inner = self.lock();
        let Some((user_id, figures)) = inner.open.remove(&run_id) else {
            return;
        };
        let day = inner.day;
        let of_user = inner.over.entry(user_id.clone()).or_default();
        of_user.add(figures);
        let record = Record {
            figures: *of_user,
            day,
            user_id,
        };
        // Another run of the user may end meanwhile: the later figures must win.
        let written = self.records.write(&name(&record.user_id), &record);
        drop(inner);
        if let Err(error) = written {
            let error = crate::chain(&error);
            tracing::error!(%run_id, error, "a restarted driver will not count what a run has used");
        }
    }

    /// The day, in days since 1970-01-01 (UTC), and what each user has used of it.
    pub(crate) fn today(&self) -> (u64, BTreeMap<UserId, Figures>) {
        let inner = self.lock();
        let mut all = inner.over.clone();
        for (user_id, figures) in inner.open.values() {
            all.entry(user_id.clone()).or_default().add(*figures);
        }
        (inner.day, all)
    }

    /// The figures of today, whatever day it was before.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        let mut inner = self.inner.lock();
        let day = today();
        if inner.day != day {
            inner.day = day;
            for user_id in std::mem::take(&mut inner.over).into_keys() {
                self.records.remove(&name(&user_id));
            }
        }
        inner
    }
}

impl Figures {
    fn add(&mut self, other: Self) {
        self.requests = self.requests.saturating_add(other.requests);
        self.tokens = self.tokens.saturating_add(other.tokens);
    }
}

fn today() -> u64 {
    const DAY: u64 = 24 * 60 * 60;
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.unwrap_or_default().as_secs() / DAY
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

    #[test]
    fn what_a_user_has_used_is_the_sum_of_the_runs_and_outlives_the_driver() {
        let folder = tempfile::tempdir().unwrap();
        let user = |name: &str| UserId::from(name);
        let runs: Vec<RunId> = (0..3).map(|_| RunId::now()).collect();
        let of = |spent: &Spent, name: &str| spent.today().1.get(&user(name)).copied();
        let spent = Spent::open(folder.path()).unwrap();
        spent.saw(runs[0], &user("alice"), &seen(1, 9));
        spent.saw(runs[0], &user("alice"), &seen(2, 19));
        spent.saw(runs[1], &user("alice"), &seen(5, 99));
        spent.saw(runs[2], &user("../bob"), &seen(1, 0));
        let figures = |requests, tokens| Some(Figures { requests, tokens });
        assert_eq!(of(&spent, "alice"), figures(7, 120));
        spent.over(runs[0]);
        spent.over(runs[0]);
        spent.over(runs[2]);
        assert_eq!(of(&spent, "alice"), figures(7, 120));

        // What was open, the broker reports again.
        let next = Spent::open(folder.path()).unwrap();
        assert_eq!(of(&next, "alice"), figures(2, 20));
        assert_eq!(of(&next, "../bob"), figures(1, 1));
        next.saw(runs[1], &user("alice"), &seen(6, 99));
        assert_eq!(of(&next, "alice"), figures(8, 120));
    }

    #[test]
    fn yesterdays_figures_are_gone() {
        let folder = tempfile::tempdir().unwrap();
        let spent = Spent::open(folder.path()).unwrap();
        let alice = UserId::from("alice");
        let (ended, open) = (RunId::now(), RunId::now());
        spent.saw(ended, &alice, &seen(1, 1));
        spent.over(ended);
        spent.saw(open, &alice, &seen(3, 1));
        spent.inner.lock().day -= 1;
        let (day, all) = spent.today();
        assert_eq!(day, today());
        assert_eq!(all[&alice].requests, 3, "a run that goes on counts");
        assert!(spent.records.read().is_empty());
    }
}
