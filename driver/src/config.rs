//! The plugin's and the tasks' options: their schemas, which Nomad checks jobspecs
//! and agent configuration against, and the values parsed from what it sends.

mod allow;
mod mount;
mod plugin;
pub mod schema;
mod shims;
mod slot;
mod task;
mod telemetry;
mod value;

pub use allow::Capabilities;
pub use mount::{Device, Mount, MountKind, Volume};
pub use plugin::{Auth, EXTRA_LABELS, Endpoint, Gc, Plugin, Tls};
pub use shims::Shims;
pub use slot::Slot;
pub use task::{Auth as TaskAuth, Bandwidth, Logging, Task, Ulimit};
pub use telemetry::Telemetry;

/// The providers there are: API, jobs, labels and metrics use these words.
pub const PROVIDERS: [&str; 3] = ["openai", "anthropic", "google"];

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the configuration cannot be read at `{field}`")]
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
        "`image` is `{given}`: image name required for a plain task, such as `busybox:1.36`; a warm slot has a `slot` block instead"
    )]
    NoImage { given: String },
    #[error(
        "`{field}` stands beside `slot`: a warm slot has no options but those of its `slot` block"
    )]
    BesideSlot { field: String },
}

/// What a task is.
#[derive(Debug, Clone, PartialEq)]
pub enum Config {
    Slot(Slot),
    Plain(Box<Task>),
}

impl Plugin {
    /// Parses what `SetConfig` brings, which is empty without a `config` block.
    ///
    /// # Errors
    /// [`Error`] with the option's name.
    pub fn parse(msgpack: &[u8]) -> Result<Self, Error> {
        let raw = if msgpack.is_empty() {
            plugin::Raw::default()
        } else {
            value::decode(msgpack)?
        };
        raw.check()
    }
}

impl Config {
    /// Parses a task's `config`, without asking what the plugin allows.
    ///
    /// # Errors
    /// [`Error`] with the option's name.
    pub fn parse(msgpack: &[u8]) -> Result<Self, Error> {
        let mut raw: task::Raw = value::decode(msgpack)?;
        let Some(slot) = raw.slot.take() else {
            return raw.check().map(Box::new).map(Self::Plain);
        };
        // What else is set would be without effect; most likely it was meant otherwise.
        match value::set_options(msgpack)?.find(|field| field != "slot") {
            Some(field) => Err(Error::BesideSlot { field }),
            None => slot.check().map(Self::Slot),
        }
    }

    /// Checks what the plugin's options gate.
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
pub(crate) mod tests;
