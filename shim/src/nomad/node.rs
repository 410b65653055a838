//! Nomad's nodes.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::{Error, Nomad};

/// A node as the list of nodes shows it.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Node {
    #[serde(rename = "ID")]
    pub id: String,
    #[serde(default)]
    pub name: String,
    pub status: String,
    #[serde(default)]
    pub scheduling_eligibility: String,
    #[serde(default)]
    pub last_drain: Option<Drain>,
    #[serde(default)]
    pub drivers: BTreeMap<String, Driver>,
}

/// The latest drain of a node.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Drain {
    /// `draining`, `complete` or `canceled`.
    pub status: String,
}

/// A driver on a node.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Driver {
    #[serde(default)]
    pub attributes: Option<BTreeMap<String, String>>,
}

impl Node {
    /// Whether the last drain is complete or has passed its deadline, and the node is ineligible.
    /// Nomad calls a drain complete when its deadline has passed, whatever is left. An old drain
    /// looks the same on a node that is ineligible for another reason, so only runs in slots that
    /// Nomad has stopped count as drained.
    #[must_use]
    pub fn is_drained(&self) -> bool {
        let complete = |drain: &Drain| drain.status == "complete";
        self.scheduling_eligibility == "ineligible"
            && self.last_drain.as_ref().is_some_and(complete)
    }
}

impl Nomad {
    /// All nodes, as soon as there is something newer than `index`, or after a minute. Also returns
    /// the index for the next query.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn nodes(&self, index: u64) -> Result<(u64, Vec<Node>), Error> {
        self.watch("/v1/nodes", index).await
    }
}
