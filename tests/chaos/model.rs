//! The model of each node: the stand-in on the loopback of the node's namespace, where its broker
//! reaches it without TLS. It knows which prompts were asked on its node.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use anyhow::anyhow;
use polydev_stand_in::Text;
use polydev_tests::{
    cluster::{Cluster, NODES},
    folder::Folder,
    host::received,
    process::Process,
    program, wait_until,
};

use crate::caller::Call;

/// Where the pools with agents send their model requests.
pub(crate) const URL: &str = "http://127.0.0.1:9555";

/// Dropping the models ends them.
pub(crate) struct Models {
    _processes: [Process; NODES],
    _folder: Folder,
}

impl Models {
    /// # Panics
    /// If a model does not answer.
    pub(crate) fn start(cluster: &Cluster) -> Self {
        let folder = Folder::new("pdtest-");
        let processes = std::array::from_fn(|node| {
            let mut command = cluster.engines[node].namespace().inside();
            command
                .arg(program("stand-in"))
                .arg(&URL["http://".len()..]);
            let log = folder.path().join(format!("model{node}"));
            Process::start(&mut command, &log)
        });
        for node in 0..NODES {
            wait_until("a node's model", Duration::from_secs(10), || {
                asked(cluster, node)
            });
        }
        Self {
            _processes: processes,
            _folder: folder,
        }
    }

    /// On how many nodes each of these prompts was asked, by run. A CLI may ask its model again,
    /// as after the end of a broker, but it does so on its own node: a prompt that ran twice on one
    /// node is not told from that.
    pub(crate) fn entries(
        &self,
        cluster: &Cluster,
        calls: &[Call],
    ) -> anyhow::Result<HashMap<String, u32>> {
        let mut entries = HashMap::new();
        for node in 0..NODES {
            let asked = asked(cluster, node).map_err(|error| anyhow!("a node's model: {error}"))?;
            let prompts = calls.iter().filter_map(|call| {
                let text = call.spec.prompt()?;
                Some((&call.spec.run_id, Text::of(&text).sha256))
            });
            for (run_id, _) in prompts.filter(|(_, hash)| asked.contains(hash)) {
                *entries.entry(run_id.clone()).or_default() += 1;
            }
        }
        Ok(entries)
    }
}

/// The hashes of what was asked.
fn asked(cluster: &Cluster, node: usize) -> Result<HashSet<String>, String> {
    let mut command = cluster.engines[node].namespace().inside();
    let requests = received(command.arg("curl"), URL)?;
    let texts = requests.into_iter().flat_map(|request| request.texts);
    Ok(texts.map(|text| text.sha256).collect())
}
