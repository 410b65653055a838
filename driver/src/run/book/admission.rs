//! The phases in which a claim becomes a run. The book stays locked throughout, so nothing
//! can happen between them.

use std::{sync::Arc, time::Instant};

use parking_lot::MutexGuard;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::{Inner, Known, Runs};
use crate::run::{
    Input, Run,
    claim::Refusal,
    journal::{Claimed, Record},
};

/// The response to a claim that is not refused.
pub(crate) enum Admit<'a> {
    /// The run was claimed before.
    Known(Arc<Run>),
    /// The run is new to this node, and may get a slot.
    New(Admission<'a>),
}

/// The right to one new run. It has no effect without [`Admission::write`].
pub(crate) struct Admission<'a> {
    pub(super) runs: &'a Runs,
    pub(super) inner: MutexGuard<'a, Inner>,
}

impl<'a> Admission<'a> {
    /// Writes the claim to the journal, after it has made room for the run's output: the
    /// results of the runs that ended first are discarded. From now on a restarted driver
    /// knows the run.
    ///
    /// # Errors
    /// [`Refusal::NoOutput`] or [`Refusal::Journal`]: the run is not admitted.
    pub(crate) fn write(mut self, claimed: Claimed) -> Result<Written<'a>, Refusal> {
        while !self.runs.windows.has_room() {
            if !self.inner.release_oldest() {
                let held = self.inner.runs().count();
                return Err(Refusal::NoOutput { held });
            }
        }
        let record = Record::Claimed(claimed.clone().into());
        self.inner.journal.write(&record)?;
        Ok(Written {
            admission: self,
            claimed,
        })
    }
}

/// A run that is in the journal, but not yet in the book.
pub(crate) struct Written<'a> {
    admission: Admission<'a>,
    claimed: Claimed,
}

impl Written<'_> {
    /// Puts the run into the book. The receiver is for the run's carrier.
    pub(crate) fn enter(
        self,
        arrived: Instant,
        kill: CancellationToken,
    ) -> (Arc<Run>, mpsc::Receiver<Input>) {
        let Self { admission, claimed } = self;
        let Admission { runs, mut inner } = admission;
        let run_id = claimed.run_id;
        let (run, inputs) = Run::new(claimed, arrived, runs.windows.path(), kill);
        inner.known.insert(run_id, Known::Run(run.clone()));
        runs.tell(run_id);
        (run, inputs)
    }
}
