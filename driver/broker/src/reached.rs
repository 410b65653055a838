//! The record of one run: what it has connected to beside its model, and what it was not allowed
//! to.

use parking_lot::Mutex;
use polydev_proto::{broker::Destination, egress::Host};

use crate::egress::Target;

/// Most destinations of one run that have figures of their own, of each kind: it may name as
/// many as it likes, and what it was not allowed must not hide what it has reached.
const MAX_ALLOWED: usize = 68;
const MAX_DENIED: usize = 30;
const OTHER: &str = "other";

/// All of them, in the order of the first tries.
#[derive(Debug, Default)]
pub(crate) struct Reached(Mutex<Vec<Destination>>);

impl Reached {
    /// Continues the record of an earlier broker.
    pub(crate) fn new(before: Vec<Destination>) -> Self {
        Self(before.into())
    }

    pub(crate) fn message(&self) -> Vec<Destination> {
        self.0.lock().clone()
    }

    /// Returns whether the target was not denied before, for this reason.
    pub(crate) fn denied(&self, target: &Target, reason: &impl ToString) -> bool {
        let mut all = self.0.lock();
        let before = all.len();
        let at = find(&mut all, target, reason.to_string());
        all[at].connections += 1;
        all.len() > before
    }

    /// Changes the figures of a target that is allowed. Returns where they are, for good.
    pub(crate) fn allowed(&self, target: &Target, change: impl FnOnce(&mut Destination)) -> usize {
        let mut all = self.0.lock();
        let at = find(&mut all, target, String::new());
        change(&mut all[at]);
        at
    }

    /// Changes the figures at a place that [`Self::allowed`] has returned.
    pub(crate) fn change(&self, at: usize, change: impl FnOnce(&mut Destination)) {
        change(&mut self.0.lock()[at]);
    }
}

/// Where a target is counted. `denied` is empty if it is allowed.
fn find(all: &mut Vec<Destination>, target: &Target, denied: String) -> usize {
    let host = match &target.host {
        Host::Name(name) => name.clone(),
        Host::Address(address) => address.to_string(),
    };
    let is_kind = |known: &&Destination| known.denied.is_empty() == denied.is_empty();
    let most = match denied.is_empty() {
        true => MAX_ALLOWED,
        false => MAX_DENIED,
    };
    let port = target.port.into();
    let is = |known: &Destination| known.host == host && known.port == port;
    let known = (all.iter()).position(|known| is(known) && known.denied == denied);
    let (at, host, port) = match known {
        None if all.iter().filter(is_kind).count() >= most => {
            let is_other = |known: &Destination| known.host == OTHER && is_kind(&known);
            (all.iter().position(is_other), OTHER.to_owned(), 0)
        }
        known => (known, host, port),
    };
    at.unwrap_or_else(|| {
        all.push(Destination {
            host,
            port,
            denied,
            ..Destination::default()
        });
        all.len() - 1
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOT_LISTED: &str = "not in a list";

    fn target(name: &str, port: u16) -> Target {
        let host = Host::Name(name.into());
        Target { host, port }
    }

    #[test]
    fn destinations_without_end_are_a_hundred_and_denied_ones_hide_none() {
        let reached = Reached::default();
        for number in 0..200 {
            reached.denied(
                &target(&format!("denied-{number}.example"), 443),
                &NOT_LISTED,
            );
        }
        for number in 0..200 {
            let allowed = target(&format!("allowed-{number}.example"), 443);
            reached.allowed(&allowed, |destination| destination.connections += 1);
        }
        let all = reached.message();
        assert_eq!(all.len(), 100);
        assert_eq!(all.iter().map(|known| known.connections).sum::<u64>(), 400);
        let others = all.iter().filter(|known| known.host == OTHER);
        assert_eq!(others.map(|known| known.port).collect::<Vec<_>>(), [0, 0]);
        assert!(all.iter().any(|known| known.host == "allowed-50.example"));
    }

    #[test]
    fn what_was_denied_is_apart_from_what_was_allowed() {
        let reached = Reached::default();
        let (secure, plain) = (target("a.example", 443), target("a.example", 80));
        assert!(reached.denied(&plain, &NOT_LISTED));
        reached.allowed(&secure, |destination| destination.failed += 1);
        assert!(!reached.denied(&plain, &NOT_LISTED));
        let next = Reached::new(reached.message());
        assert!(!next.denied(&plain, &NOT_LISTED));
        let all: Vec<_> = (next.message().into_iter())
            .map(|known| {
                (
                    known.port,
                    known.connections,
                    known.failed,
                    known.denied.is_empty(),
                )
            })
            .collect();
        assert_eq!(all, [(80, 3, 0, false), (443, 0, 1, true)]);
    }
}
