//! The node's broker: what it should know of the node's containers. [`mod@keep`] starts it,
//! sends this to it and to the broker that takes its place, and receives what it reports.

mod keep;
mod process;
mod wire;

pub use keep::keep;

use std::{
    collections::HashMap,
    mem,
    os::fd::OwnedFd,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use parking_lot::Mutex;
use polydev_proto::broker::{Close, Closed, Grant, Open, Policy, Seen, to_broker};
use tokio::{
    sync::{Notify, oneshot},
    time::timeout,
};

use wire::Greeted;

/// The broker answers within a millisecond.
const GRANT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the end of a run may wait for the last that the broker has seen.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// What the broker should know. Changes are sent to it as they come.
#[derive(Debug)]
pub struct Broker {
    inner: Mutex<Inner>,
    changed: Notify,
    /// Notified when the broker has not answered: its connection is given up.
    silent: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    containers: HashMap<String, Container>,
    /// What has not been sent yet.
    unsent: Vec<Order>,
    /// Who waits for the broker's answer to a grant, by container.
    waiting: HashMap<String, oneshot::Sender<Result<(), String>>>,
    /// Who waits for the last of a container's run.
    closing: HashMap<String, oneshot::Sender<Closed>>,
    /// What keys are sealed to. Empty without a broker.
    public_key: Bytes,
    /// The memory with the seed of its key, for the next broker.
    seed: Option<OwnedFd>,
    /// This process ends, and its runs go on.
    has_left: bool,
}

impl Inner {
    /// Without a connection there is nothing to keep: everything is sent on the next one.
    fn queue(&mut self, order: Order) {
        if !self.public_key.is_empty() {
            self.unsent.push(order);
        }
    }
}

/// A container whose requests the broker serves.
#[derive(Debug)]
struct Container {
    /// Where the container listens. `None` until its init has connected in this life of the
    /// driver.
    socket: Option<Arc<OwnedFd>>,
    /// What is sent to the broker, with the grant of its run as the shim has sealed it.
    open: Open,
    /// Whether an earlier life of the driver has opened it, and no broker has reported how.
    is_inherited: bool,
    /// When the broker reported what the grant has of it.
    seen_at: Instant,
}

impl Container {
    /// Remembers what the broker has seen of the run, for the next broker.
    fn saw(&mut self, seen: &Seen) {
        let grant = self.open.grant.as_mut();
        if let Some(grant) = grant.filter(|grant| grant.run_id == seen.run_id) {
            grant.seen = Some(seen.clone());
            self.seen_at = Instant::now();
        }
    }

    /// What a broker is told. An overload has gone on since it was reported.
    fn order(&self) -> Open {
        let mut open = self.open.clone();
        let grant = open.grant.as_mut();
        let seen = grant.and_then(|grant| grant.seen.as_mut());
        if let Some(overloaded) = seen.and_then(|seen| seen.overloaded_ms.as_mut()) {
            let since = u64::try_from(self.seen_at.elapsed().as_millis()).unwrap_or(u64::MAX);
            *overloaded = overloaded.saturating_add(since);
        }
        open
    }
}

/// Something to send to the broker.
#[derive(Debug)]
enum Order {
    Open(String),
    Grant(String),
    Close(String),
}

/// Why the broker has no grant for a run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the node has no broker")]
    None,
    #[error("the broker does not answer")]
    Silent,
    #[error("the broker refused the run: {0}")]
    Refused(String),
}

/// A container that the broker serves, until this is dropped.
#[derive(Debug)]
pub struct Opened {
    broker: Arc<Broker>,
    container: String,
    /// Whether the broker must hear of every run, with keys or not: it is the container's way to
    /// the network, or answers in place of a model until there is a run.
    needs_grant: bool,
}

impl Opened {
    /// A run or a plain task has the container, with these keys. They are on their way when this returns, and
    /// there when the result has been waited for. `None` if the run has no keys, and its
    /// container reaches nothing through the broker.
    pub fn grant(
        &self,
        run_id: impl Into<String>,
        sealed_keys: Bytes,
        policy: Option<Policy>,
        bytes_per_second: u64,
    ) -> Option<Granting> {
        if sealed_keys.is_empty() && !self.needs_grant {
            return None;
        }
        Some(self.broker.grant(Grant {
            container: self.container.clone(),
            run_id: run_id.into(),
            sealed_keys,
            bytes_per_second,
            seen: None,
            policy,
        }))
    }

    /// Init has connected again, and has sent the socket on which the container listens.
    pub fn listens(&self, socket: OwnedFd) {
        self.broker.listens(&self.container, socket);
    }

    /// The container is gone, and so is its run.
    pub fn close(&self) {
        let _nobody_waits = self.broker.close(&self.container);
    }

    /// The container's run has ended: nothing of it passes any longer. Returns the last that
    /// the broker has seen of the run; `None` if the run had no grant there, or the broker does
    /// not answer.
    pub async fn finish(&self) -> Option<Seen> {
        let last = self.broker.close(&self.container)?;
        // Without a broker, or with one that is too busy, what it has reported is all there is.
        timeout(CLOSE_TIMEOUT, last).await.ok()?.ok()?.seen
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        self.close();
    }
}

/// A grant on its way to the broker.
#[derive(Debug)]
pub struct Granting {
    broker: Arc<Broker>,
    answer: oneshot::Receiver<Result<(), String>>,
}

impl Granting {
    /// Waits until the broker has the grant.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn done(self) -> Result<(), Error> {
        let answered = timeout(GRANT_TIMEOUT, self.answer).await;
        let answered = answered.map_err(|_| {
            self.broker.silent.notify_one();
            Error::Silent
        })?;
        answered.map_err(|_| Error::None)?.map_err(Error::Refused)
    }
}

impl Broker {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            inner: Mutex::default(),
            changed: Notify::new(),
            silent: Notify::new(),
        })
    }

    /// What a shim seals a run's keys to. Empty while there is no broker: then there are no runs
    /// with keys outside.
    pub fn public_key(&self) -> Bytes {
        self.inner.lock().public_key.clone()
    }

    /// A container may connect until the result is dropped. Its requests are refused until
    /// there is a grant.
    pub fn open(self: &Arc<Self>, open: Open, socket: OwnedFd) -> Opened {
        let container = open.container.clone();
        let needs_grant = open.egress.is_some() || open.rehearses;
        let opened = Container {
            socket: Some(socket.into()),
            open,
            is_inherited: false,
            seen_at: Instant::now(),
        };
        let mut inner = self.inner.lock();
        inner.containers.insert(container.clone(), opened);
        inner.queue(Order::Open(container.clone()));
        drop(inner);
        self.changed.notify_one();
        Opened {
            broker: self.clone(),
            container,
            needs_grant,
        }
    }

    /// A container that an earlier life of the driver has opened stays so until the result is
    /// dropped. If its broker is dead too, its run has no keys any more, and its requests are
    /// refused at the given rate.
    pub fn keep(self: &Arc<Self>, container: &str, bytes_per_second: u64) -> Opened {
        let open = Open {
            container: container.to_owned(),
            bytes_per_second,
            ..Open::default()
        };
        let kept = Container {
            socket: None,
            open,
            is_inherited: true,
            seen_at: Instant::now(),
        };
        let mut inner = self.inner.lock();
        inner.containers.insert(container.to_owned(), kept);
        drop(inner);
        Opened {
            broker: self.clone(),
            container: container.to_owned(),
            needs_grant: false, // There is no further grant.
        }
    }

    fn grant(self: &Arc<Self>, grant: Grant) -> Granting {
        let (answers, answer) = oneshot::channel();
        let mut inner = self.inner.lock();
        // Without a broker, the sender is dropped here.
        if !inner.public_key.is_empty()
            && let Some(container) = inner.containers.get_mut(&grant.container)
        {
            let name = grant.container.clone();
            container.open.bytes_per_second = grant.bytes_per_second;
            container.open.grant = Some(grant);
            inner.waiting.insert(name.clone(), answers);
            inner.queue(Order::Grant(name));
        }
        drop(inner);
        self.changed.notify_one();
        Granting {
            broker: self.clone(),
            answer,
        }
    }

    fn listens(&self, container: &str, socket: OwnedFd) {
        let mut inner = self.inner.lock();
        if let Some(known) = inner.containers.get_mut(container) {
            known.socket = Some(socket.into());
            inner.queue(Order::Open(container.to_owned()));
        }
        drop(inner);
        self.changed.notify_one();
    }

    /// Returns where the last of the container's run comes, if it has a grant there.
    fn close(&self, container: &str) -> Option<oneshot::Receiver<Closed>> {
        let mut inner = self.inner.lock();
        if inner.has_left {
            return None;
        }
        let known = inner.containers.remove(container)?;
        inner.waiting.remove(container);
        let (tells, last) = oneshot::channel();
        // Without a broker, the sender is dropped here.
        if known.open.grant.is_some() && !inner.public_key.is_empty() {
            inner.closing.insert(container.to_owned(), tells);
        }
        inner.queue(Order::Close(container.to_owned()));
        drop(inner);
        self.changed.notify_one();
        known.open.grant.map(|_| last)
    }

    /// The broker has reported what it has seen of a run.
    fn saw(&self, seen: &Seen) {
        if let Some(known) = self.inner.lock().containers.get_mut(&seen.container) {
            known.saw(seen);
        }
    }

    /// The broker has closed a container.
    fn closed(&self, closed: Closed) {
        if let Some(waits) = self.inner.lock().closing.remove(&closed.container) {
            let _gave_up = waits.send(closed);
        }
    }

    /// What to send first on a new connection, by what the broker reports that it has. What a
    /// broker already knows changes nothing there.
    fn connected(&self, greeted: Greeted) -> Vec<Order> {
        let mut inner = self.inner.lock();
        inner.public_key = greeted.public_key;
        inner.seed = Some(greeted.seed);
        let known = &mut inner.containers;
        let mut orders = Vec::new();
        for open in greeted.held {
            match known.get_mut(&open.container) {
                Some(container) if container.is_inherited => {
                    container.is_inherited = false;
                    container.open = open;
                    container.seen_at = Instant::now();
                }
                Some(container) => {
                    if let Some(seen) = open.grant.and_then(|grant| grant.seen) {
                        container.saw(&seen);
                    }
                }
                None => orders.push(Order::Close(open.container)),
            }
        }
        orders.extend(known.keys().cloned().map(Order::Open));
        orders
    }

    fn seed(&self) -> Option<OwnedFd> {
        let inner = self.inner.lock();
        let seed = inner.seed.as_ref()?;
        seed.try_clone()
            .inspect_err(|error| tracing::warn!(%error, "the next broker has another key"))
            .ok()
    }

    /// There is no broker any longer: nobody answers what it was asked.
    fn lost(&self) {
        let mut inner = self.inner.lock();
        inner.public_key.clear();
        inner.unsent.clear();
        inner.waiting.clear();
        inner.closing.clear();
    }

    /// From now on no end is reported to the broker: what ends is this process.
    pub(crate) fn leave(&self) {
        self.inner.lock().has_left = true;
    }

    /// The broker's answer to a grant.
    fn answered(&self, container: &str, answer: Result<(), String>) {
        if let Some(waits) = self.inner.lock().waiting.remove(container) {
            let _gave_up = waits.send(answer);
        }
    }

    fn unsent(&self) -> Vec<Order> {
        mem::take(&mut self.inner.lock().unsent)
    }

    /// The order as a message, with the socket that goes with it. `None` if it no longer
    /// matters.
    fn message(&self, order: Order) -> Option<(to_broker::Message, Option<Arc<OwnedFd>>)> {
        Some(match order {
            Order::Open(container) => {
                let inner = self.inner.lock();
                let known = inner.containers.get(&container)?;
                let socket = known.socket.clone()?;
                (to_broker::Message::Open(known.order().into()), Some(socket))
            }
            Order::Grant(container) => {
                let inner = self.inner.lock();
                let open = &inner.containers.get(&container)?.open;
                (to_broker::Message::Grant(open.grant.clone()?.into()), None)
            }
            Order::Close(container) => (to_broker::Message::Close(Close { container }), None),
        })
    }
}
