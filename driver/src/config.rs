//! Options of the plugin and of tasks. Nomad checks the agent configuration and jobspecs
//! against the schemas; this module parses and checks the values that Nomad sends.

mod allow;
mod auth;
mod boost;
mod broker;
mod class;
mod egress;
pub mod from_docker;
mod gc;
mod mount;
mod network;
mod plugin;
pub mod schema;
mod shims;
mod slot;
mod task;
mod telemetry;
mod upstream;
mod value;

pub use allow::Capabilities;
pub use auth::Auth as TaskAuth;
pub use boost::Boost;
pub use broker::Broker;
pub use egress::Egress;
pub use gc::Gc;
pub use mount::{Device, Mount, MountKind, Volume};
pub use plugin::{Auth, EXTRA_LABELS, Endpoint, LogPath, Plugin, Tls};
pub use shims::Shims;
pub use slot::Slot;
pub use task::{Bandwidth, Logging, Task, Ulimit};
pub use telemetry::Telemetry;

/// Why a configuration is rejected.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read the configuration at `{field}`")]
    Decode {
        field: String,
        source: rmp_serde::decode::Error,
    },
    #[error("`{field}` is `{given}`: {allowed}")]
    Value {
        field: String,
        given: String,
        allowed: String,
    },
    #[error(
        "`image` is `{given}`: image name required for a plain task, such as `busybox:1.36`; a warm slot requires a `slot` block instead"
    )]
    NoImage { given: String },
    #[error(
        "`{field}` is set next to `slot`: a warm slot accepts only the options of its `slot` block"
    )]
    BesideSlot { field: String },
}

/// A task of either kind.
#[derive(Debug, Clone, PartialEq)]
pub enum Config {
    Slot(Slot),
    Plain(Box<Task>),
}

impl Plugin {
    /// Parses the options that `SetConfig` brings. They are empty if the agent has no
    /// `config` block.
    ///
    /// # Errors
    /// [`Error`] with the option's name.
    pub fn parse(msgpack: &[u8]) -> Result<Self, Error> {
        if msgpack.is_empty() {
            return plugin::Raw::default().check();
        }
        from_docker::PLUGIN.check(msgpack)?;
        value::decode::<plugin::Raw>(msgpack)?.check()
    }
}

impl Config {
    /// Parses a task's `config`. [`Config::check_allowed`] checks what the plugin allows.
    ///
    /// # Errors
    /// [`Error`] with the option's name.
    pub fn parse(msgpack: &[u8]) -> Result<Self, Error> {
        from_docker::TASK.check(msgpack)?;
        let mut raw: task::Raw = value::decode(msgpack)?;
        let Some(slot) = raw.slot.take() else {
            return raw.check().map(Box::new).map(Self::Plain);
        };
        // Another option would have no effect, so setting one is most likely a mistake.
        match value::set_options(msgpack)?.find(|field| field != "slot") {
            Some(field) => Err(Error::BesideSlot { field }),
            None => slot.check().map(Self::Slot),
        }
    }

    /// Checks the options that the plugin's options restrict.
    ///
    /// # Errors
    /// [`Error::Value`] with the option that is not allowed.
    pub fn check_allowed(&self, plugin: &Plugin) -> Result<(), Error> {
        match self {
            Self::Slot(slot) => allow::check_image("slot.image", &slot.image, plugin),
            Self::Plain(task) => task.check_allowed(plugin),
        }
    }
}

#[cfg(test)]
mod pages;
#[cfg(test)]
pub(crate) mod tests;
