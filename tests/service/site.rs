//! A shim in front of simulated drivers and a simulated Nomad, for one test.

use std::time::Duration;

use nix::{sys::signal::Signal, unistd::getuid};
use polydev_proto::runtime::{ListPoolsRequest, ListPoolsResponse, RunStart};
use polydev_tests::{
    client::{Client, argv},
    fake_node::{Asked, FakeNode, Options},
    fake_nomad::FakeNomad,
    folder::Folder,
    shim::Shim,
    wait_until,
};
use tokio::runtime::{Builder, Runtime};
use tonic::Status;
use tonic_types::StatusExt;

/// How long tests wait, unless they have a limit of their own. Nothing takes longer.
pub(crate) const LIMIT: Duration = Duration::from_secs(20);

/// Providers, each with the number of idle slots of a node.
pub(crate) type Pools<'a> = &'a [(&'a str, usize)];

/// Dropping the site kills the shim, which keeps nothing.
pub(crate) struct Site {
    pub(crate) shim: Shim,
    pub(crate) nodes: Vec<FakeNode>,
    cluster: Cluster,
}

/// The runtime, the folder and the Nomad that serve the simulated nodes.
struct Cluster {
    nomad: FakeNomad,
    folder: Folder,
    runtime: Runtime,
}

impl Cluster {
    fn new() -> Self {
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime can be made");
        let nomad = {
            let _inside = runtime.enter();
            FakeNomad::start().expect("a port is free")
        };
        Self {
            nomad,
            folder: Folder::new("pdfake-"),
            runtime,
        }
    }

    /// A node that Nomad knows.
    fn node(&self, options: Options, pools: Pools) -> FakeNode {
        let node = {
            let _inside = self.runtime.enter();
            FakeNode::start(self.folder.path(), options).expect("a socket can be bound")
        };
        for (provider, count) in pools {
            node.add_slots(provider, *count);
        }
        self.nomad.set_nodes([node.description()]);
        node
    }
}

impl Site {
    /// A site with one node. Waits until the shim knows the node's slots.
    pub(crate) fn start(pools: Pools) -> Self {
        Self::start_with(pools, &[])
    }

    /// As [`Site::start`], with options for the shim.
    pub(crate) fn start_with(pools: Pools, options: &[&str]) -> Self {
        Self::start_in(pools, options, &[])
    }

    /// As [`Site::start_with`], with environment variables.
    pub(crate) fn start_in(pools: Pools, options: &[&str], variables: &[(&str, &str)]) -> Self {
        // The shim finds the node in Nomad's first answer.
        let cluster = Cluster::new();
        let node = cluster.node(Options::default(), pools);
        let site = Self::over(cluster, vec![node], options, variables);
        site.wait_nodes(1, 0);
        let client = site.shim.client();
        for (provider, count) in pools {
            client.wait_idle(provider, u32::try_from(*count).expect("there are few"));
        }
        site
    }

    /// A site without nodes.
    pub(crate) fn empty(options: &[&str]) -> Self {
        Self::over(Cluster::new(), Vec::new(), options, &[])
    }

    fn over(
        cluster: Cluster,
        nodes: Vec<FakeNode>,
        options: &[&str],
        variables: &[(&str, &str)],
    ) -> Self {
        Self {
            shim: Shim::serve_in(&cluster.nomad.address, options, variables),
            nodes,
            cluster,
        }
    }

    /// Another shim over the same nodes.
    pub(crate) fn another_shim(&self, options: &[&str]) -> Shim {
        Shim::serve_in(&self.cluster.nomad.address, options, &[])
    }

    /// Adds a node, and waits until the shim follows it.
    pub(crate) fn add_node(&mut self, options: Options, pools: Pools) {
        self.nodes.push(self.cluster.node(options, pools));
        self.wait_nodes(self.nodes.len(), 0);
    }

    pub(crate) fn nomad(&self) -> &FakeNomad {
        &self.cluster.nomad
    }

    /// The only node.
    pub(crate) fn node(&self) -> &FakeNode {
        &self.nodes[0]
    }

    /// Waits until so many nodes are connected to the shim, and so many are unreachable.
    #[track_caller]
    pub(crate) fn wait_nodes(&self, connected: usize, unreachable: usize) {
        let client = self.shim.client();
        wait_until("the nodes", LIMIT, || {
            let pools = pools(&client);
            let (there, away) = (pools.nodes_connected, pools.nodes_unreachable);
            if (there as usize, away as usize) == (connected, unreachable) {
                Ok(())
            } else {
                Err(format!("{there} are connected and {away} are not"))
            }
        });
    }

    /// Waits until a node has received a certain request.
    #[track_caller]
    pub(crate) fn wait_asked<T>(&self, node: usize, what: impl Fn(Asked) -> Option<T>) -> T {
        wait_until("a node's question", LIMIT, || {
            let asked = self.nodes[node].asked();
            let words = format!("{asked:?}");
            what(asked).ok_or(words)
        })
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        self.shim.process.end(Signal::SIGKILL);
    }
}

/// All pools, as the shim lists them.
pub(crate) fn pools(client: &Client) -> ListPoolsResponse {
    let listed = client.call(async |mut shim| shim.list_pools(ListPoolsRequest {}).await);
    listed.expect("the shim lists its pools")
}

/// A run for `anthropic` whose arguments are steps of the simulated node.
pub(crate) fn steps(words: &[&str]) -> RunStart {
    argv("anthropic", words)
}

/// Changes a run so that it does not wait for a slot.
pub(crate) fn at_once(start: RunStart) -> RunStart {
    RunStart {
        queue_timeout: Some(prost_types::Duration::default()),
        ..start
    }
}

pub(crate) fn seconds(seconds: i64) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds, nanos: 0 })
}

/// The `reason` of an error.
pub(crate) fn reason(status: &Status) -> String {
    let details = status.get_error_details();
    let info = details.error_info();
    let info = info.unwrap_or_else(|| panic!("{status} has no reason"));
    assert_eq!(info.domain, "polydev.runtime.v1");
    info.reason.clone()
}

/// The field that an error names.
pub(crate) fn field(status: &Status) -> String {
    let details = status.get_error_details();
    let bad = details.bad_request();
    let bad = bad.unwrap_or_else(|| panic!("{status} names no field"));
    bad.field_violations[0].field.clone()
}

/// The caller's name that the shim has for these tests at its unix socket.
pub(crate) fn myself() -> String {
    format!("uid:{}", getuid())
}

/// A port that no other test gets.
pub(crate) fn port() -> u16 {
    let [port] = polydev_tests::free_ports();
    port
}
