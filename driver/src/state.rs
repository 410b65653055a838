//! The state folder: what outlives this process, and the lock that gives it to one driver.

pub mod files;
pub mod lock;
pub mod records;
