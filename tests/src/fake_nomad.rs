//! The parts of Nomad's HTTP API that the shim uses, in the test's process: nodes with blocking
//! queries, the sizes of pools, and dispatches of jobs on demand. It schedules nothing. Tests of
//! Nomad itself use the real one.

mod routes;

use std::{
    collections::BTreeMap,
    net::TcpListener,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use serde_json::Value;
use tokio::sync::watch;

/// The group of every pool's job.
const GROUP: &str = "pool";

/// How Nomad answers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Mood {
    #[default]
    Well,
    /// Nomad does not answer.
    Stalled,
    /// Nomad answers with status 500.
    Failing,
    /// Nomad answers like a server that knows no leader and no nodes.
    Leaderless,
}

/// A dispatched job on demand.
#[derive(Debug, Clone)]
pub struct Dispatched {
    /// The id of the child job.
    pub job: String,
    /// The run that the job is for.
    pub run_id: String,
    pub idempotency_token: String,
}

/// A simulated Nomad server. It serves until the end of the runtime that started it.
pub struct FakeNomad {
    pub address: String,
    cluster: Arc<Cluster>,
}

struct Cluster {
    /// The index of the last change.
    index: watch::Sender<u64>,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    mood: Mood,
    nodes: BTreeMap<String, Value>,
    /// Pools by the ids of their jobs.
    pools: BTreeMap<String, Pool>,
    /// Ids of parameterised jobs.
    on_demand: Vec<String>,
    dispatched: Vec<Dispatched>,
    stopped: Vec<String>,
    /// How many lists of nodes were requested.
    lists: usize,
    /// Requests with another token are refused.
    token: Option<String>,
    /// The paths and queries of all requests.
    asked: Vec<String>,
}

/// A job that keeps warm slots.
#[derive(Default)]
struct Pool {
    size: u32,
    /// During a deployment Nomad refuses another size.
    deploying: bool,
    /// Scaling events as Nomad lists them, the oldest first.
    events: Vec<Value>,
    /// How many sizes were refused.
    refused: usize,
}

impl Cluster {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes what Nomad knows, and wakes waiting queries.
    fn change<T>(&self, change: impl FnOnce(&mut Inner) -> T) -> T {
        let changed = change(&mut self.lock());
        self.index.send_modify(|index| *index += 1);
        changed
    }
}

impl FakeNomad {
    /// Serves a cluster without nodes or jobs.
    ///
    /// # Errors
    /// The kernel's, if no port can be bound.
    ///
    /// # Panics
    /// Outside a runtime.
    pub fn start() -> std::io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        listener.set_nonblocking(true)?;
        let address = format!("http://{}", listener.local_addr()?);
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let cluster = Arc::new(Cluster {
            index: watch::Sender::new(1),
            inner: Mutex::default(),
        });
        let router = routes::router(cluster.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        Ok(Self { address, cluster })
    }

    /// Adds nodes or replaces their descriptions, which are as [`FakeNode::description`] has them.
    ///
    /// [`FakeNode::description`]: crate::fake_node::FakeNode::description
    ///
    /// # Panics
    /// If a description has no id.
    pub fn set_nodes(&self, descriptions: impl IntoIterator<Item = Value>) {
        self.cluster.change(|inner| {
            for node in descriptions {
                let id = node["ID"].as_str().expect("a node has an id").to_owned();
                inner.nodes.insert(id, node);
            }
        });
    }

    /// Changes how a node is described.
    ///
    /// # Panics
    /// If there is no such node.
    pub fn change_node(&self, node_id: &str, change: impl FnOnce(&mut Value)) {
        self.cluster.change(|inner| {
            let node = inner.nodes.get_mut(node_id);
            change(node.expect("there is such a node"));
        });
    }

    pub fn remove_node(&self, node_id: &str) {
        self.cluster.change(|inner| inner.nodes.remove(node_id));
    }

    pub fn set_mood(&self, mood: Mood) {
        self.cluster.change(|inner| inner.mood = mood);
    }

    /// How often the list of nodes was requested.
    #[must_use]
    pub fn lists(&self) -> usize {
        self.cluster.lock().lists
    }

    /// From now on only requests with this token are answered.
    pub fn set_token(&self, token: &str) {
        let token = Some(token.to_owned());
        self.cluster.change(|inner| inner.token = token);
    }

    /// The paths and queries of all requests.
    #[must_use]
    pub fn asked(&self) -> Vec<String> {
        self.cluster.lock().asked.clone()
    }

    /// Registers the job of a provider's pool.
    pub fn add_pool(&self, provider: &str, size: u32) {
        let pool = Pool {
            size,
            ..Pool::default()
        };
        let job = format!("polydev-pool-{provider}");
        self.cluster.change(|inner| inner.pools.insert(job, pool));
    }

    /// Starts or ends a deployment of a pool's job.
    ///
    /// # Panics
    /// If there is no such pool.
    pub fn set_deploying(&self, provider: &str, deploying: bool) {
        self.cluster.change(|inner| {
            let pool = inner.pools.get_mut(&format!("polydev-pool-{provider}"));
            pool.expect("there is such a pool").deploying = deploying;
        });
    }

    /// A pool's size, and how many other sizes were refused.
    ///
    /// # Panics
    /// If there is no such pool.
    #[must_use]
    pub fn pool(&self, provider: &str) -> (u32, usize) {
        let inner = self.cluster.lock();
        let pool = inner.pools.get(&format!("polydev-pool-{provider}"));
        let pool = pool.expect("there is such a pool");
        (pool.size, pool.refused)
    }

    /// Registers a provider's job on demand.
    pub fn add_on_demand(&self, provider: &str) {
        let job = format!("polydev-on-demand-{provider}");
        self.cluster.change(|inner| inner.on_demand.push(job));
    }

    /// The dispatched jobs, the oldest first.
    #[must_use]
    pub fn dispatched(&self) -> Vec<Dispatched> {
        self.cluster.lock().dispatched.clone()
    }

    /// The ids of the stopped jobs.
    #[must_use]
    pub fn stopped(&self) -> Vec<String> {
        self.cluster.lock().stopped.clone()
    }
}
