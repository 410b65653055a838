//! The warm slots of all nodes, as their drivers report them, from which claims are chosen; and
//! the sizes of the pools.

pub mod apply;
pub mod drained;
mod follow;
pub mod scale;
mod view;

pub use follow::{Heard, follow};
pub use view::{Candidate, Counts, Kept, POLICY_VERSION, View};
