//! `polydev-broker`: what the model requests of a node's containers go through, one process
//! a node beside the driver. It knows a container by the socket on which its requests come,
//! replaces whatever credential they carry by the key of the run that has the container, and
//! passes them to the provider's API.
//!
//! A request, in the order in which it happens: [`serve`] accepts its connection, [`request`]
//! checks it against the [`api`], [`container`] says which [`grant`] it has, [`forward`]
//! sends it through the connections of [`upstream`] and passes the answer back ([`answer`]),
//! both at the speed of [`rate`]. [`websocket`] is the same for a WebSocket. [`control`]
//! is the driver's connection, [`broker`] is what the driver may ask for, [`events`] is what
//! it is told, and [`seed`] is what it keeps for the next broker.

mod answer;
mod api;
pub mod broker;
mod container;
pub mod control;
mod events;
mod forward;
mod grant;
mod rate;
pub mod request;
pub mod seed;
mod serve;
pub mod upstream;
mod websocket;
