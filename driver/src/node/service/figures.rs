//! The node's resources, and how much of them is in use.

use polydev_proto::node::{Amount, GetNodeResponse};

use crate::{headroom, life::State, node::Node};

pub(super) fn of(node: &Node) -> GetNodeResponse {
    let slots = node.slots.book.all();
    let slots = slots.iter().filter(|slot| slot.end().is_none());
    let lives: Vec<_> = slots.map(|slot| slot.life()).collect();
    let count = |is_it: fn(&State) -> bool| {
        let counted = lives.iter().filter(|life| is_it(life.state())).count();
        u32::try_from(counted).unwrap_or(u32::MAX)
    };
    let amount = |amount: headroom::Amount| Amount {
        cpu_mhz: amount.cpu_mhz,
        memory_mb: amount.memory_mb,
    };
    GetNodeResponse {
        version: env!("CARGO_PKG_VERSION").into(),
        slots: count(|_| true),
        idle: count(|state| matches!(state, State::Idle)),
        claimed: count(|state| matches!(state, State::Claimed { .. })),
        runs: u32::try_from(node.runs.going()).unwrap_or(u32::MAX),
        run: Some(amount(headroom::Amount::from(&node.site.config.run))),
        headroom: node.slots.headroom.given.map(amount),
        headroom_left: node.slots.headroom.left().map(amount),
    }
}
