//! `polydev-broker`: what the model requests of a node's containers go through, one process
//! a node beside the driver. It knows a container by the socket on which its requests come,
//! replaces whatever credential they carry by the key of the run that has the container, and
//! passes them to the provider's API.
//!
//! A request, in the order in which it happens: [`serve`] accepts its connection, [`request`]
//! checks it against the [`api`], [`container`] says which [`grant`] it has, [`forward`]
//! sends it through the connections of [`upstream`] and passes the answer back ([`answer`]),
//! both at the speed of [`rate`]. [`websocket`] is the same for a WebSocket. [`meter`] finds the
//! tokens ([`usage`]) and the overload ([`failure`]) that an answer states ([`scanner`]), and
//! [`seen`] counts them and the errors of each run, and holds it to its budget. [`frames`] reads the messages of a WebSocket. Before a run,
//! an agent that waits gets its answers from [`rehearsal`].
//!
//! In a pool with a list of what its containers may reach ([`egress`]), [`proxy`] connects them
//! to it, through a [`tunnel`]. Each [`attempt`] is in the record, which is [`reached`].
//!
//! [`control`] is the driver's connection, [`broker`] is what the driver may ask for,
//! [`changes`] is what it hears of, and [`seed`] is what it keeps for the next broker.

mod answer;
mod api;
mod attempt;
pub mod broker;
mod changes;
mod container;
pub mod control;
mod egress;
mod failure;
mod forward;
pub mod frames;
mod grant;
mod meter;
mod proxy;
mod rate;
mod reached;
mod rehearsal;
pub mod request;
pub mod scanner;
pub mod seed;
mod seen;
mod serve;
mod tunnel;
pub mod upstream;
mod usage;
mod websocket;
