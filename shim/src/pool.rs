//! The warm slots of all nodes, as their drivers tell them: what a claim is chosen from;
//! and their number.

pub mod apply;
pub mod drained;
mod follow;
pub mod scale;
mod view;

pub use follow::follow;
pub use view::{Candidate, Counts, Kept, View};
