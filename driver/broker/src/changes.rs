//! Which containers have something new for the driver. What it is, is read when it is sent: so
//! nothing is lost while the driver is away, and however much happens, there is one message for
//! each container.

use std::{
    collections::{BTreeSet, VecDeque},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};

/// The longest wait of what is not urgent.
const SOON: Duration = Duration::from_secs(1);

/// The names of the containers, in the order in which they came; each once.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    state: Mutex<State>,
    added: Notify,
}

#[derive(Debug, Default)]
struct State {
    names: VecDeque<String>,
    /// Those that may wait, and until when.
    soon: BTreeSet<String>,
    due: Option<Instant>,
}

impl Changes {
    pub(crate) fn add(&self, container: &str) {
        let mut state = self.state.lock();
        state.soon.remove(container);
        state.add(container.to_owned());
        drop(state);
        self.added.notify_one();
    }

    /// The same, within a second: much that may be told comes together.
    pub(crate) fn add_soon(&self, container: &str) {
        let mut state = self.state.lock();
        if state.names.iter().any(|known| known == container) {
            return;
        }
        state.soon.insert(container.to_owned());
        if state.due.is_none() {
            state.due = Some(Instant::now() + SOON);
            drop(state);
            self.added.notify_one();
        }
    }

    /// The next one, for one caller at a time.
    ///
    /// # Cancel safety
    /// Loses nothing.
    pub(crate) async fn next(&self) -> String {
        loop {
            let due = {
                let mut state = self.state.lock();
                state.look(Instant::now());
                if let Some(container) = state.names.pop_front() {
                    return container;
                }
                state.due
            };
            let due = async {
                match due {
                    Some(due) => sleep_until(due).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = self.added.notified() => {}
                () = due => {}
            }
        }
    }
}

impl State {
    fn add(&mut self, container: String) {
        if !self.names.contains(&container) {
            self.names.push_back(container);
        }
    }

    /// Takes over those that have waited.
    fn look(&mut self, now: Instant) {
        if self.due.is_some_and(|due| due <= now) {
            self.due = None;
            for container in std::mem::take(&mut self.soon) {
                self.add(container);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_may_wait_is_told_within_a_second_and_once() {
        let (changes, begun) = (Changes::default(), Instant::now());
        for _ in 0..3 {
            changes.add_soon("a");
            changes.add_soon("b");
        }
        changes.add("b");
        assert_eq!(changes.next().await, "b");
        assert_eq!(begun.elapsed(), Duration::ZERO);
        assert_eq!(changes.next().await, "a");
        let waited = begun.elapsed();
        assert!(waited <= SOON + Duration::from_millis(1), "{waited:?}");
        changes.add_soon("b");
        assert_eq!(changes.next().await, "b");
        assert!(begun.elapsed() > waited);
    }
}
