//! The record of one run: what it has connected to beside its model, and what it was not allowed
//! to.

use parking_lot::Mutex;
use polydev_proto::{
    broker::{Destination, PORT},
    egress::Host,
};

use crate::egress::Target;

/// Most destinations of one run that have figures of their own, of each kind: it may name as
/// many as it likes, and what it was not allowed must not hide what it has reached.
const MAX_ALLOWED: usize = 60;
const MAX_DENIED: usize = 27;
/// Most requests to the broker itself that were refused.
const MAX_REFUSED: usize = 10;
/// Most characters of a reason, which may quote what a command has sent.
const MAX_REASON: usize = 300;
const OTHER: &str = "other";
/// How a container reaches the broker, with its port.
const BROKER: &str = "127.0.0.1";

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
        let reason = reason.to_string().chars().take(MAX_REASON).collect();
        let at = find(&mut all, target, reason);
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

/// What a line of the record is about.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Allowed,
    Denied,
    /// A request to the broker itself.
    Refused,
}

impl Kind {
    fn of(destination: &Destination) -> Self {
        let is_broker = destination.host == BROKER && destination.port == u32::from(PORT);
        match (destination.denied.is_empty(), is_broker) {
            (true, _) => Self::Allowed,
            (false, false) => Self::Denied,
            (false, true) => Self::Refused,
        }
    }

    /// Most lines with figures of their own.
    fn most(self) -> usize {
        match self {
            Self::Allowed => MAX_ALLOWED,
            Self::Denied => MAX_DENIED,
            Self::Refused => MAX_REFUSED,
        }
    }

    /// The line for all further ones.
    fn further(self) -> Destination {
        let (host, port, denied) = match self {
            Self::Allowed => (OTHER, 0, ""),
            Self::Denied => (OTHER, 0, "further hosts that are not allowed"),
            Self::Refused => (BROKER, PORT.into(), "further requests that were refused"),
        };
        Destination {
            host: host.into(),
            port,
            denied: denied.into(),
            ..Destination::default()
        }
    }
}

/// Where a target is counted. `denied` is empty if it is allowed.
fn find(all: &mut Vec<Destination>, target: &Target, denied: String) -> usize {
    let mut wanted = Destination {
        host: match &target.host {
            Host::Name(name) => name.clone(),
            Host::Address(address) => address.to_string(),
        },
        port: target.port.into(),
        denied,
        ..Destination::default()
    };
    let find = |all: &[Destination], wanted: &Destination| {
        let is = |known: &Destination| {
            known.host == wanted.host && known.port == wanted.port && known.denied == wanted.denied
        };
        all.iter().position(is)
    };
    let mut at = find(all, &wanted);
    let kind = Kind::of(&wanted);
    let has_kind = |known: &&Destination| Kind::of(known) == kind;
    if at.is_none() && all.iter().filter(has_kind).count() >= kind.most() {
        wanted = kind.further();
        at = find(all, &wanted);
    }
    at.unwrap_or_else(|| {
        all.push(wanted);
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
        let broker = Target {
            host: Host::Address([127, 0, 0, 1].into()),
            port: PORT,
        };
        for number in 0..200 {
            reached.denied(&broker, &format!("path {number}"));
        }
        for number in 0..200 {
            let allowed = target(&format!("allowed-{number}.example"), 443);
            reached.allowed(&allowed, |destination| destination.connections += 1);
        }
        let all = reached.message();
        assert_eq!(all.len(), 100);
        assert_eq!(all.iter().map(|known| known.connections).sum::<u64>(), 600);
        assert!(all.iter().any(|known| known.host == "denied-20.example"));
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
