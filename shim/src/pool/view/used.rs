//! What users have used of models today, for their budgets.

use std::collections::HashMap;

use polydev_proto::{
    budget::{Used, today},
    id::UserId,
    node::Spent,
};

use super::View;

/// By node and user, as the nodes last reported it; also of nodes that are no longer there.
#[derive(Debug, Default)]
pub(super) struct OnNodes {
    /// The day of the last report. Older figures are of no use to anybody.
    day: u64,
    nodes: HashMap<String, HashMap<UserId, Spent>>,
}

impl OnNodes {
    /// Applies a report of a node. A snapshot has all that the node knows.
    pub(super) fn apply(&mut self, node_id: &str, told: Vec<Spent>, is_snapshot: bool) {
        let day = today();
        if self.day != day {
            self.day = day;
            for users in self.nodes.values_mut() {
                users.retain(|_, spent| spent.day >= day);
            }
            self.nodes.retain(|_, users| !users.is_empty());
        }
        if is_snapshot {
            self.nodes.remove(node_id);
        }
        if !told.is_empty() {
            let users = self.nodes.entry(node_id.to_owned()).or_default();
            users.extend(
                told.into_iter()
                    .map(|spent| (spent.user_id.as_str().into(), spent)),
            );
        }
    }
}

impl View {
    /// What a user has used today on all nodes, as far as they have reported it.
    #[must_use]
    pub fn used(&self, user_id: &UserId) -> Used {
        let day = today();
        let nodes = &self.lock().used.nodes;
        let spent = nodes.values().filter_map(|users| users.get(user_id));
        let mut used = Used::default();
        for spent in spent.filter(|spent| spent.day == day) {
            used.add(Used {
                requests: spent.requests,
                tokens: spent.tokens,
            });
        }
        used
    }
}
