//! The broker from outside: [`requests`] to models, what [`policy`] holds for them, [`egress`] to
//! other servers, and the [`process`] that the driver starts. [`node`] is a broker before an [`api`].

mod api;
mod egress;
mod node;
mod policy;
mod process;
mod requests;
