//! One connection of a run beside those to its model, from the try to its end, on record.

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use polydev_proto::{
    broker::{Destination, PORT},
    egress::Host,
};

use crate::{
    container::Container,
    egress::{Denied, Target},
    grant::Grant,
    request::Refusal,
};

/// A try to connect. Unless it ends otherwise, it has failed.
pub(crate) struct Attempt {
    container: Arc<Container>,
    grant: Arc<Grant>,
    target: Target,
    is_settled: bool,
}

impl Attempt {
    pub(crate) fn new(container: &Arc<Container>, grant: &Arc<Grant>, target: &Target) -> Self {
        Self {
            container: container.clone(),
            grant: grant.clone(),
            target: target.clone(),
            is_settled: false,
        }
    }

    /// The target is not allowed. The driver hears of the first such try at once, and of the
    /// number of further ones with the next report.
    pub(crate) fn denied(mut self, reason: &Denied) {
        self.is_settled = true;
        if self.grant.reached.denied(&self.target, reason) {
            self.container.changed();
        }
    }

    pub(crate) fn connected(mut self, address: IpAddr) -> Connection {
        self.is_settled = true;
        let at = self.grant.reached.allowed(&self.target, |destination| {
            destination.address = address.to_string();
            destination.connections += 1;
        });
        self.container.changed();
        Connection {
            container: self.container.clone(),
            grant: self.grant.clone(),
            at,
        }
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        if !self.is_settled {
            self.grant
                .reached
                .allowed(&self.target, |destination| destination.failed += 1);
            self.container.changed();
        }
    }
}

/// A request to the broker itself that was refused is on record too, as a destination that the
/// run was not allowed. Returns whether that is new for the driver.
pub(crate) fn refused(grant: &Grant, refusal: &Refusal) -> bool {
    match refusal {
        Refusal::NoKey(_)
        | Refusal::NotOurs(_)
        | Refusal::Path { .. }
        | Refusal::Method(_)
        | Refusal::TooLong
        | Refusal::Target(_) => {
            let host = Host::Address(Ipv4Addr::LOCALHOST.into());
            grant.reached.denied(&Target { host, port: PORT }, refusal)
        }
        // A budget ends the run; the others are no denials.
        Refusal::OverBudget(_) | Refusal::NoRun | Refusal::Over | Refusal::Tunnels { .. } => false,
    }
}

/// A connection of a run, while it lasts. What passes it is counted.
pub(crate) struct Connection {
    container: Arc<Container>,
    grant: Arc<Grant>,
    /// Where it is counted: looking for that with each piece would take longer than the rest.
    at: usize,
}

impl Connection {
    /// Counts what the run has sent.
    pub(crate) fn sent(&self, bytes: usize) {
        self.count(|destination| &mut destination.sent_bytes, bytes);
    }

    /// Counts what the run has received.
    pub(crate) fn received(&self, bytes: usize) {
        self.count(|destination| &mut destination.received_bytes, bytes);
    }

    fn count(&self, figure: impl FnOnce(&mut Destination) -> &mut u64, bytes: usize) {
        self.grant.reached.change(self.at, |destination| {
            let figure = figure(destination);
            *figure = figure.saturating_add(bytes as u64);
        });
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.container.changed();
    }
}
