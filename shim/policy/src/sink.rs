//! What tool calls lead to: for each tool and action a *sink* says how much harm it can do and what
//! a call needs.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{canonical, capability::Capability};

/// How much harm a call can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Risk {
    Low,
    Medium,
    High,
    Critical,
}

impl Risk {
    /// The name in rules, tokens and records.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Low => "low",
            Self::Medium => "medium",
            Self::High => "high",
            Self::Critical => "critical",
        }
    }
}

/// What is known of a tool's action.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sink {
    pub tool: String,
    pub action: String,
    pub risk: Risk,
    #[serde(default)]
    pub rationale: String,
    #[serde(default)]
    pub require_capability: Option<Capability>,
    #[serde(default = "yes")]
    pub block_untrusted_integrity: bool,
    #[serde(default)]
    pub block_confidential_egress: bool,
    #[serde(default)]
    pub metadata: Limits,
}

/// Limits of what a call may contain. Existing programs keep them under `metadata`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// First words of commands. With this the target is a command, and nothing else is allowed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allowed_commands: Option<Vec<String>>,
    /// Most words of a command.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_args: Option<usize>,
    /// Variables that no command may set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub denied_env_vars: Option<Vec<String>>,
    /// Hosts, or `*.` and a suffix. With this the target is a URL; an empty list allows every
    /// public host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allowed_domains: Option<Vec<String>>,
    /// Where memory may be written to, from the narrowest to the widest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allowed_scopes: Option<Vec<String>>,
}

fn yes() -> bool {
    true
}

/// All sinks. What is not among them is unknown, and blocked.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sinks(BTreeMap<(String, String), Sink>);

impl Sinks {
    /// The six sinks that programs of this kind begin with (MVAR 1.5.3, Apache-2.0). Their texts
    /// are part of what is hashed.
    #[must_use]
    pub fn common() -> Self {
        let list = |items: &[&str]| Some(items.iter().map(ToString::to_string).collect());
        let sink = |name: (&str, &str), risk, rationale: &str, capability| Sink {
            tool: name.0.into(),
            action: name.1.into(),
            risk,
            rationale: rationale.into(),
            require_capability: Some(capability),
            block_untrusted_integrity: true,
            block_confidential_egress: false,
            metadata: Limits::default(),
        };
        let mut sinks = Self::default();
        sinks.add(Sink {
            metadata: Limits {
                allowed_commands: list(&["ls", "pwd", "echo", "cat", "head", "tail", "grep"]),
                max_args: Some(16),
                denied_env_vars: list(&["LD_PRELOAD", "PROMPT_COMMAND", "BASH_ENV", "PYTHONPATH"]),
                ..Limits::default()
            },
            ..sink(
                ("bash", "exec"),
                Risk::Critical,
                "Arbitrary code execution",
                Capability::ProcessExec,
            )
        });
        sinks.add(sink(
            ("filesystem", "write"),
            Risk::High,
            "Data modification",
            Capability::FilesystemWrite,
        ));
        sinks.add(Sink {
            metadata: Limits {
                allowed_scopes: list(&["session", "user", "org"]),
                ..Limits::default()
            },
            ..sink(
                ("memory", "write"),
                Risk::Medium,
                "Persistent memory write (scope-controlled)",
                Capability::Ipc,
            )
        });
        sinks.add(Sink {
            block_untrusted_integrity: false,
            block_confidential_egress: true,
            metadata: Limits {
                allowed_domains: list(&[]),
                ..Limits::default()
            },
            ..sink(
                ("http", "post"),
                Risk::Medium,
                "Data exfiltration potential",
                Capability::NetworkEgress,
            )
        });
        sinks.add(Sink {
            block_untrusted_integrity: false,
            ..sink(
                ("filesystem", "read"),
                Risk::Low,
                "Read-only, limited blast radius",
                Capability::FilesystemRead,
            )
        });
        sinks.add(sink(
            ("credential_vault", "access"),
            Risk::Critical,
            "Credential exposure",
            Capability::CredentialAccess,
        ));
        sinks
    }

    /// Adds a sink, or replaces the one for the same tool and action.
    pub fn add(&mut self, sink: Sink) {
        self.0
            .insert((sink.tool.clone(), sink.action.clone()), sink);
    }

    #[must_use]
    pub fn get(&self, tool: &str, action: &str) -> Option<&Sink> {
        self.0.get(&(tool.to_owned(), action.to_owned()))
    }

    /// The hash of existing programs over their sinks, where internal errors block: 64 hexadecimal
    /// digits. It covers neither
    /// capabilities nor rules; [`Gate::policy_hash`](crate::evaluate::Gate::policy_hash) does.
    #[must_use]
    pub fn hash(&self) -> String {
        canonical::hash(&json!({
            "fail_closed": true,
            "sinks": self.0.values().collect::<Vec<_>>(),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_common_sinks_have_the_hash_of_existing_programs() {
        let mut sinks = Sinks::common();
        assert_eq!(
            sinks.hash(),
            "225555ee62405755bdf0f5fbd566032c251c8d97e1295349918b17903a410d7f"
        );
        sinks.add(Sink {
            tool: "demo_tool".into(),
            action: "run".into(),
            risk: Risk::Low,
            rationale: "Safe status read".into(),
            require_capability: Some(Capability::ProcessExec),
            block_untrusted_integrity: false,
            block_confidential_egress: false,
            metadata: Limits::default(),
        });
        assert_eq!(
            sinks.hash(),
            "4df67e654e13aa77ecb683a337031b0c3b8b693f346f9ec221fccc1aa0e8df66"
        );
    }
}
