//! The state folder: what outlives this process, and the lock that ensures one driver per
//! folder.

pub mod files;
pub mod lock;
pub mod records;
