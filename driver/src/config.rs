//! The plugin's and the tasks' options: their schemas, which Nomad checks jobspecs
//! and agent configuration against, and the values parsed from what it sends.

pub mod schema;

use std::path::PathBuf;

use serde::{Deserialize, Deserializer, de};

use crate::limits::Limits;

/// The providers there are: API, jobs, labels and metrics use these words.
pub const PROVIDERS: [&str; 3] = ["openai", "anthropic", "google"];

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the configuration cannot be read")]
    Decode(#[source] rmp_serde::decode::Error),
    #[error("`{field}` is `{given}`: {allowed}")]
    Value {
        field: &'static str,
        given: String,
        allowed: String,
    },
    #[error(
        "this job has no `slot` block: the driver runs warm slots only so far, \
         as in `config {{ slot {{ provider = \"anthropic\" }} }}`"
    )]
    NoSlot,
}

/// The plugin's options, complete and checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Plugin {
    /// Docker's address, `unix://` and a path.
    pub endpoint: String,
    /// Folder of the driver's own, for sockets, its lock and its identity.
    pub state_dir: PathBuf,
    /// The `polydev-init` program.
    pub init_path: PathBuf,
    /// What a run gets.
    pub run: Limits,
}

/// A slot as its job describes it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, Deserialize)]
pub struct Slot {
    /// One of [`PROVIDERS`].
    pub provider: String,
    /// Image reference.
    pub image: String,
}

#[derive(Deserialize)]
struct RawPlugin {
    endpoint: Option<String>,
    state_dir: Option<String>,
    init_path: Option<String>,
    run_class: Option<RawClass>,
}

#[derive(Deserialize)]
struct RawClass {
    cpu: Option<Number>,
    memory: Option<Number>,
    mbits: Option<Number>,
    pids: Option<Number>,
}

#[derive(Deserialize)]
struct RawTask {
    slot: Option<RawSlot>,
}

#[derive(Deserialize)]
struct RawSlot {
    provider: Option<String>,
    image: Option<String>,
}

impl Plugin {
    /// Parses what `SetConfig` brings, which is empty without a `config` block.
    ///
    /// # Errors
    /// [`Error`] with the option's name.
    pub fn parse(msgpack: &[u8]) -> Result<Self, Error> {
        let none = RawPlugin {
            endpoint: None,
            state_dir: None,
            init_path: None,
            run_class: None,
        };
        let raw = if msgpack.is_empty() {
            none
        } else {
            rmp_serde::from_slice(msgpack).map_err(Error::Decode)?
        };

        let endpoint = raw
            .endpoint
            .unwrap_or_else(|| "unix:///var/run/docker.sock".into());
        if !endpoint
            .strip_prefix("unix://")
            .is_some_and(|path| path.starts_with('/'))
        {
            let allowed = "`unix://` and an absolute path".into();
            return Err(Error::Value {
                field: "endpoint",
                given: endpoint,
                allowed,
            });
        }
        let state_dir = absolute(
            "state_dir",
            raw.state_dir.as_deref().unwrap_or("/var/lib/polydev"),
        )?;
        // A unix socket's path has at most 107 bytes; ours are up to 60 longer than the folder's.
        if state_dir.as_os_str().len() > 48 {
            let allowed = "at most 48 bytes, for the sockets below it".into();
            let given = state_dir.display().to_string();
            return Err(Error::Value {
                field: "state_dir",
                given,
                allowed,
            });
        }
        let init_path = match raw.init_path.filter(|path| !path.is_empty()) {
            Some(path) => absolute("init_path", &path)?,
            None => beside_this_program("polydev-init"),
        };
        let class = raw.run_class;
        let class = class.as_ref();
        let run = Limits {
            cpu_mhz: ranged(
                "run_class.cpu",
                class.and_then(|c| c.cpu),
                Limits::RUN.cpu_mhz,
                10,
                1_000_000,
            )?,
            memory_mb: ranged(
                "run_class.memory",
                class.and_then(|c| c.memory),
                Limits::RUN.memory_mb,
                16,
                4_194_304,
            )?,
            mbits: ranged(
                "run_class.mbits",
                class.and_then(|c| c.mbits),
                Limits::RUN.mbits,
                1,
                30_000,
            )?,
            pids: ranged(
                "run_class.pids",
                class.and_then(|c| c.pids),
                Limits::RUN.pids,
                8,
                4_194_304,
            )?,
        };
        Ok(Self {
            endpoint,
            state_dir,
            init_path,
            run,
        })
    }
}

impl Slot {
    /// Parses a task's `config`.
    ///
    /// # Errors
    /// [`Error`] with the option's name.
    pub fn parse(msgpack: &[u8]) -> Result<Self, Error> {
        let raw: RawTask = rmp_serde::from_slice(msgpack).map_err(Error::Decode)?;
        let raw = raw.slot.ok_or(Error::NoSlot)?;
        let provider = raw.provider.unwrap_or_default();
        if !PROVIDERS.contains(&provider.as_str()) {
            let allowed = format!("allowed are {}", PROVIDERS.join(", "));
            return Err(Error::Value {
                field: "slot.provider",
                given: provider,
                allowed,
            });
        }
        let image = raw.image.filter(|image| !image.is_empty());
        let image = image.unwrap_or_else(|| format!("polydev-{provider}-runtime:latest"));
        Ok(Self { provider, image })
    }
}

/// A number as Nomad sends it: any msgpack width, or a decimal string for what a
/// float cannot hold exactly. All our numbers are whole.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Number(f64);

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Form {
            Number(f64),
            Text(String),
        }
        match Form::deserialize(deserializer)? {
            Form::Number(number) => Ok(Self(number)),
            Form::Text(text) => text.parse().map(Self).map_err(de::Error::custom),
        }
    }
}

fn ranged(
    field: &'static str,
    given: Option<Number>,
    default: u32,
    least: u32,
    most: u32,
) -> Result<u32, Error> {
    let Some(Number(number)) = given else {
        return Ok(default);
    };
    if number.fract() == 0.0 && (f64::from(least)..=f64::from(most)).contains(&number) {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "whole and between two u32"
        )]
        return Ok(number as u32);
    }
    let allowed = format!("allowed are whole numbers from {least} to {most}");
    Err(Error::Value {
        field,
        given: number.to_string(),
        allowed,
    })
}

fn absolute(field: &'static str, given: &str) -> Result<PathBuf, Error> {
    let path = PathBuf::from(given);
    if path.is_absolute() {
        return Ok(path);
    }
    Err(Error::Value {
        field,
        given: given.to_owned(),
        allowed: "an absolute path".into(),
    })
}

fn beside_this_program(name: &str) -> PathBuf {
    let program = std::env::current_exe().unwrap_or_default();
    program.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn msgpack(value: &serde_json::Value) -> Vec<u8> {
        rmp_serde::to_vec_named(value).unwrap()
    }

    #[test]
    fn without_a_config_block_the_documented_defaults_hold() {
        let config = Plugin::parse(&[]).unwrap();
        assert_eq!(config.endpoint, "unix:///var/run/docker.sock");
        assert_eq!(config.state_dir, PathBuf::from("/var/lib/polydev"));
        assert_eq!(config.run, Limits::RUN);
    }

    /// The shapes in which go-cty sends numbers and absent values.
    #[test]
    fn nils_and_numbers_of_every_form_are_understood() {
        for cpu in ["cd01f4", "cb407f400000000000", "a3353030"] {
            let bytes = format!(
                "84a8656e64706f696e74c0a9696e69745f70617468c0a972756e5f636c617373\
                 84a3637075{cpu}a56d62697473c0a66d656d6f7279c0a470696473c0a973746174655f646972c0"
            );
            let config = Plugin::parse(&hex::decode(bytes).unwrap()).unwrap();
            assert_eq!(config.run.cpu_mhz, 500);
        }
    }

    #[test]
    fn values_out_of_range_are_refused_by_name() {
        let check = |config: serde_json::Value, field: &str| {
            let error = Plugin::parse(&msgpack(&config)).unwrap_err().to_string();
            assert!(error.contains(&format!("`{field}`")), "{error}");
        };
        check(serde_json::json!({"endpoint": "tcp://1.2.3.4"}), "endpoint");
        check(serde_json::json!({"state_dir": "relative"}), "state_dir");
        check(
            serde_json::json!({"state_dir": format!("/{}", "x".repeat(60))}),
            "state_dir",
        );
        check(serde_json::json!({"init_path": "init"}), "init_path");
        check(
            serde_json::json!({"run_class": {"cpu": 0}}),
            "run_class.cpu",
        );
        check(
            serde_json::json!({"run_class": {"memory": 1.5}}),
            "run_class.memory",
        );
    }

    #[test]
    fn a_task_must_be_a_slot_of_a_known_provider() {
        let parse = |value| Slot::parse(&msgpack(&value));
        let slot = parse(serde_json::json!({"slot": {"provider": "google", "image": null}}));
        assert_eq!(slot.unwrap().image, "polydev-google-runtime:latest");
        let error = parse(serde_json::json!({"slot": {"provider": "codex"}})).unwrap_err();
        assert!(
            error.to_string().contains("`slot.provider` is `codex`"),
            "{error}"
        );
        assert!(matches!(
            parse(serde_json::json!({"slot": null})),
            Err(Error::NoSlot)
        ));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _refused = (Plugin::parse(&bytes).is_err(), Slot::parse(&bytes).is_err());
        }
    }
}
