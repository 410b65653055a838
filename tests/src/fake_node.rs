//! A simulated driver that runs no containers. It serves the node API to shims, in the test's
//! process, on a unix socket. Tests of what the shim alone decides use it. The benchmark puts one
//! shim in front of a thousand simulated drivers. Tests of the driver, Docker and Nomad use the
//! real ones.
//!
//! - [`slots`] has the slots and reports them.
//! - [`book`] has the runs. A [`run`] is one of them: [`script`] reads its arguments, [`execute`]
//!   does the steps, [`follow`] reports them.
//! - [`service`] is the API. [`claim`] answers a claim; [`brief`] answers it on a node that keeps
//!   nothing.
//! - [`knobs`] make the node refuse, stall and go away.

mod book;
mod brief;
mod claim;
mod execute;
mod follow;
mod knobs;
mod run;
mod script;
mod service;
mod slots;

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use futures_util::StreamExt;
use polydev_proto::{
    broker::Egress,
    node::{
        Ballot, CancelRunRequest, Claim, FenceRequest, LeaseRequest, ReleaseRequest, Slot, Spent,
        node_service_server::NodeServiceServer,
    },
};
use serde_json::{Value, json};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Code, Status, transport::Server};
use uuid::Uuid;

pub use knobs::Loss;

use book::Book;
use knobs::Knobs;
use slots::Slots;

/// How a node is made.
#[derive(Debug, Clone)]
pub struct Options {
    /// The node's id in Nomad, and its name there.
    pub id: String,
    /// What the driver says that it is.
    pub identity: String,
    /// The time from a run's end until its slot is idle again.
    pub refill: Duration,
    /// Whether the node keeps its runs, its connections and the requests. On a node that keeps
    /// nothing, a run ends as soon as it is claimed; a run whose program is `wait` never ends.
    pub keeps: bool,
    /// When the node's journal was started. The node is newer than runs that were made before that.
    pub since: Option<SystemTime>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            id: Uuid::new_v4().to_string(),
            identity: Uuid::new_v4().to_string(),
            refill: Duration::from_millis(20),
            keeps: true,
            since: None,
        }
    }
}

/// The requests that a node has received, each kind in the order of arrival.
#[derive(Debug, Clone, Default)]
pub struct Asked {
    pub claims: Vec<Claim>,
    pub leases: Vec<LeaseRequest>,
    pub releases: Vec<ReleaseRequest>,
    pub fences: Vec<FenceRequest>,
    pub cancels: Vec<CancelRunRequest>,
}

/// A simulated driver. It serves until the end of the runtime that started it.
pub struct FakeNode {
    node: Arc<Node>,
    socket: PathBuf,
}

/// The state of the node's service.
struct Node {
    id: String,
    identity: String,
    keeps: bool,
    slots: Arc<Slots>,
    book: Arc<Book>,
    knobs: Knobs,
    asked: Mutex<Asked>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl FakeNode {
    /// Serves a node without slots, on a socket in `folder`.
    ///
    /// # Errors
    /// The kernel's, if the socket cannot be bound.
    ///
    /// # Panics
    /// Outside a runtime.
    pub fn start(folder: &Path, options: Options) -> std::io::Result<Self> {
        let socket = folder.join(format!("{}.sock", options.id));
        let listener = UnixListener::bind(&socket)?;
        let node = Arc::new(Node {
            slots: Arc::new(Slots::new(&options)),
            book: Arc::new(Book::new(options.since)),
            knobs: Knobs::new(options.keeps),
            asked: Mutex::default(),
            keeps: options.keeps,
            id: options.id,
            identity: options.identity,
        });
        let accepting = node.clone();
        let incoming = UnixListenerStream::new(listener)
            .filter_map(move |stream| std::future::ready(accepting.knobs.accept(stream)));
        let service = NodeServiceServer::from_arc(node.clone());
        tokio::spawn(
            Server::builder()
                .add_service(service)
                .serve_with_incoming(incoming),
        );
        Ok(Self { node, socket })
    }

    #[must_use]
    pub fn id(&self) -> &str {
        &self.node.id
    }

    /// The node as Nomad lists it.
    #[must_use]
    pub fn description(&self) -> Value {
        json!({
            "ID": self.node.id,
            "Name": format!("client-{}", self.node.id),
            "Status": "ready",
            "SchedulingEligibility": "eligible",
            "Drivers": { "polydev": { "Attributes": {
                "driver.polydev.node_address": format!("unix://{}", self.socket.display()),
                "driver.polydev.node_identity": self.node.identity,
            } } },
        })
    }

    /// Adds idle slots to the node's part of a pool.
    pub fn add_slots(&self, provider: &str, count: usize) {
        self.node.slots.add(&self.node.id, provider, count);
    }

    /// Adds an idle slot that was made on demand for a run.
    pub fn add_slot_for(&self, provider: &str, run_id: &str) {
        self.add_slot_for_with(provider, run_id, None);
    }

    /// The same; its container reaches what is in the list.
    pub fn add_slot_for_with(&self, provider: &str, run_id: &str, egress: Option<Egress>) {
        let slots = &self.node.slots;
        slots.add_for(&self.node.id, provider, run_id, egress);
    }

    /// Changes every slot, and reports the changes.
    pub fn change_slots(&self, change: impl FnMut(&mut Slot)) {
        self.node.slots.change_all(change);
    }

    /// Reports what a user has used today.
    ///
    /// # Panics
    /// If it is before 1970.
    pub fn spend(&self, user_id: &str, requests: u64, tokens: u64) {
        let since = SystemTime::UNIX_EPOCH.elapsed().expect("it is later");
        self.node.slots.spend(&Spent {
            user_id: user_id.into(),
            day: since.as_secs() / (24 * 60 * 60),
            requests,
            tokens,
        });
    }

    /// Removes every slot of a provider, in any state.
    pub fn remove_slots(&self, provider: &str) {
        self.node.slots.remove(provider);
    }

    /// Refuses claims and leases with this status, until [`FakeNode::obey`]. A repeated claim still
    /// gets its answer.
    pub fn refuse(&self, code: Code, words: &str) {
        self.node.knobs.refuse(Some(Status::new(code, words)));
    }

    /// Answers nothing until [`FakeNode::obey`]. A request waits for as long as the shim waits.
    pub fn stall(&self) {
        self.node.knobs.stall(true);
    }

    /// Breaks every connection and accepts no new ones until [`FakeNode::obey`]. Runs continue.
    pub fn leave(&self) {
        self.node.knobs.leave();
    }

    /// Breaks every connection, and accepts new ones.
    pub fn break_connections(&self) {
        self.node.knobs.break_connections();
    }

    /// The next claim gets no answer: the connections break instead.
    pub fn lose_next_claim(&self, loss: Loss) {
        self.node.knobs.lose(loss);
    }

    /// Ends refusing, stalling and absence: the node behaves like a driver again.
    pub fn obey(&self) {
        self.node.knobs.obey();
    }

    /// Forgets a run: an attach no longer finds the run.
    pub fn forget(&self, run_id: &str) {
        self.node.book.forget(run_id);
    }

    /// From now on the node cannot know whether it had a run that it does not know.
    pub fn be_unsure(&self) {
        self.node.book.be_unsure();
    }

    /// Gives up a run that has not started: its claim fails after all.
    pub fn give_up(&self, run_id: &str) {
        self.node.book.give_up(run_id);
    }

    /// Closes a run, as another try of the user's run does.
    pub fn fence(&self, run_id: &str, user_id: &str, ballot: Ballot) {
        self.node.book.fence(&FenceRequest {
            run_id: run_id.to_owned(),
            ballot: Some(ballot),
            claims_on: String::new(),
            user_id: user_id.to_owned(),
        });
    }

    /// What the driver says that it is.
    #[must_use]
    pub fn identity(&self) -> &str {
        &self.node.identity
    }

    /// The requests that the node has received so far.
    #[must_use]
    pub fn asked(&self) -> Asked {
        lock(&self.node.asked).clone()
    }

    /// All that a run has read so far: the bytes of its files, then its stdin.
    ///
    /// # Panics
    /// If the node has no such run.
    #[must_use]
    pub fn input(&self, run_id: &str) -> Vec<u8> {
        let run = self.node.book.find(run_id, None);
        run.expect("the node has the run").read()
    }

    /// The signals that were sent to a run.
    ///
    /// # Panics
    /// If the node has no such run.
    #[must_use]
    pub fn signals(&self, run_id: &str) -> Vec<i32> {
        let run = self.node.book.find(run_id, None);
        run.expect("the node has the run").signals()
    }
}
