//! The tools that a model may ask for: what each does, what it may act on, and the program that it
//! is. A file in TOML has them.

use std::{collections::BTreeMap, time::Duration};

use polydev_policy::{
    boundary::command,
    capability::{Capability, Grant, Grants},
    sink::{Limits, Risk, Sink, Sinks},
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// How long a tool may run if its entry does not say.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest time that an entry may allow.
pub const MAX_TIMEOUT: Duration = Duration::from_secs(3600);
/// The argument that names the action of a tool with several.
const ACTION: &str = "action";

/// All tools, by name and action.
#[derive(Debug)]
pub struct Registry {
    tools: BTreeMap<(String, String), Tool>,
    pub sinks: Sinks,
    pub grants: Grants,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    tool: Vec<Tool>,
}

/// An entry of the file.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Tool {
    pub name: String,
    #[serde(default = "run")]
    pub action: String,
    /// The program and its arguments. `{NAME}` is an argument of the call, `{NAME:words}` the words
    /// of one.
    pub argv: Vec<String>,
    /// The argument that the tool acts on.
    pub target: String,
    /// Arguments of the call that the program has on its stdin only, in JSON.
    #[serde(default)]
    pub arguments: Vec<String>,
    /// Patterns of targets that the tool may act on.
    pub allow: Vec<String>,
    #[serde(default)]
    pub deny: Vec<String>,
    /// What follows is for tools beside the six common ones, and required then.
    #[serde(default)]
    pub risk: Option<Risk>,
    #[serde(default)]
    pub capability: Option<Capability>,
    #[serde(default)]
    pub rationale: String,
    #[serde(default)]
    pub untrusted: Untrusted,
    #[serde(default)]
    pub egress: bool,
    #[serde(default)]
    pub limits: Option<Limits>,
    /// For example `10s`.
    #[serde(default)]
    pub timeout: Option<String>,
}

/// What holds for calls that somebody outside may have shaped.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Untrusted {
    /// The risk decides.
    #[default]
    ByRisk,
    Allow,
}

fn run() -> String {
    "run".into()
}

/// Why a registry is refused.
#[derive(Debug, thiserror::Error)]
pub enum Wrong {
    #[error("the registry is not understood")]
    Toml(#[from] toml::de::Error),
    #[error("tool `{tool}`: {what}")]
    Tool { tool: String, what: String },
}

/// Why a call is not one of a tool here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoCall {
    #[error("Unknown tool call: {0}")]
    Unknown(String),
    #[error("the tool call has no name")]
    NoName,
    #[error("argument `{0}` is not one of the tool's: {1}")]
    Undeclared(String, String),
    #[error("argument `{0}`, which the tool acts on, is missing or not a text")]
    NoTarget(String),
    #[error("argument `{0}` is missing, or not a text, number or boolean")]
    NotText(String),
    #[error("argument `{0}` begins with `-`: it would be an option of the program")]
    Option(String),
    #[error("argument `{0}`: {1}")]
    Words(String, command::NotPlain),
    #[error("argument `{0}` has a NUL character")]
    Nul(String),
}

/// A call that a tool here can take.
#[derive(Debug, Clone, PartialEq)]
pub struct Resolved {
    pub tool: String,
    pub action: String,
    pub target: String,
    pub argv: Vec<String>,
    pub timeout: Duration,
}

impl Registry {
    /// Reads a file. The six common sinks are known beside it; a tool needs an entry all the same.
    ///
    /// # Errors
    /// [`Wrong`]
    pub fn read(text: &str) -> Result<Self, Wrong> {
        let file: File = toml::from_str(text)?;
        let mut registry = Self {
            tools: BTreeMap::new(),
            sinks: Sinks::common(),
            grants: Grants::default(),
        };
        for tool in file.tool {
            let name = format!("{}.{}", tool.name, tool.action);
            registry
                .add(tool)
                .map_err(|what| Wrong::Tool { tool: name, what })?;
        }
        Ok(registry)
    }

    fn add(&mut self, tool: Tool) -> Result<(), String> {
        if tool.name.is_empty() || tool.argv.first().is_none_or(String::is_empty) {
            return Err("`name` and the first of `argv` must not be empty".into());
        }
        if Slot::of(&tool.argv[0]).is_some_and(|slot| !slot.is_words) {
            return Err(
                "the program, the first of `argv`, must not be an argument of the call".into(),
            );
        }
        let is_whole = |part: &String| Slot::of(part).is_some() || !part.contains(['{', '}']);
        if let Some(part) = tool.argv.iter().find(|part| !is_whole(part)) {
            return Err(format!(
                "`{part}` of `argv`: a place for an argument must be all of it"
            ));
        }
        let key = (tool.name.clone(), tool.action.clone());
        if self.tools.contains_key(&key) {
            return Err("there are two entries".into());
        }
        timeout(&tool)?;
        let common = self.sinks.get(&tool.name, &tool.action);
        let sink = match (common, tool.risk, tool.capability) {
            (Some(common), None, None) if tool.has_no_sink() => common.clone(),
            (Some(_), ..) => {
                let fixed = "`risk`, `capability`, `rationale`, `untrusted`, `egress` and `limits` \
                             of a common sink are fixed";
                return Err(fixed.into());
            }
            (None, Some(risk), Some(capability)) => Sink {
                tool: tool.name.clone(),
                action: tool.action.clone(),
                risk,
                rationale: tool.rationale.clone(),
                require_capability: Some(capability),
                block_untrusted_integrity: tool.untrusted == Untrusted::ByRisk,
                block_confidential_egress: tool.egress,
                metadata: tool.limits.clone().unwrap_or_default(),
            },
            (None, ..) => return Err("`risk` and `capability` are required".into()),
        };
        let capability = sink
            .require_capability
            .ok_or("a sink must require a capability")?;
        // What is checked as a command must be what is executed.
        let has_words = tool
            .argv
            .iter()
            .filter_map(|part| Slot::of(part))
            .any(|slot| slot.is_words);
        let is_command = |part: &String| {
            Slot::of(part).is_none_or(|slot| !slot.is_words || slot.name == tool.target)
        };
        if !tool.argv.iter().all(is_command) {
            return Err("`{NAME:words}` must name the argument of `target`".into());
        }
        if has_words && sink.metadata.allowed_commands.is_none() {
            return Err("`{NAME:words}` needs `limits.allowed_commands`".into());
        }
        self.grants.add(
            &tool.name,
            &tool.action,
            Grant {
                capability,
                allow: tool.allow.clone(),
                deny: tool.deny.clone(),
            },
        );
        self.sinks.add(sink);
        self.tools.insert(key, tool);
        Ok(())
    }

    /// All entries, for the policy's hash.
    #[must_use]
    pub fn entries(&self) -> Vec<&Tool> {
        self.tools.values().collect()
    }

    /// The tool of a call, with the arguments in their places.
    ///
    /// # Errors
    /// [`NoCall`]
    pub fn resolve(&self, name: Option<&str>, arguments: &Value) -> Result<Resolved, NoCall> {
        let name = name.ok_or(NoCall::NoName)?;
        let none = Map::new();
        let arguments = arguments.as_object().unwrap_or(&none);
        let action = match arguments.get(ACTION) {
            None => "run",
            Some(action) => action
                .as_str()
                .ok_or_else(|| NoCall::NotText(ACTION.into()))?,
        };
        let tool = self.tools.get(&(name.into(), action.into()));
        let tool = tool.ok_or_else(|| {
            NoCall::Unknown(match self.tools.keys().any(|(known, _)| known == name) {
                true => format!("{name}.{action}"),
                false => name.into(),
            })
        })?;
        let declared = tool.declared();
        if let Some(other) = arguments
            .keys()
            .find(|key| !declared.contains(&key.as_str()))
        {
            return Err(NoCall::Undeclared(other.clone(), declared.join(", ")));
        }
        let target = arguments.get(&tool.target).and_then(Value::as_str);
        let target = target.ok_or_else(|| NoCall::NoTarget(tool.target.clone()))?;
        let mut argv = Vec::new();
        for (index, part) in tool.argv.iter().enumerate() {
            match Slot::of(part) {
                None => argv.push(part.clone()),
                Some(slot) => {
                    argv.extend(slot.fill(arguments, index > 0 && tool.argv[index - 1] == "--")?)
                }
            }
        }
        Ok(Resolved {
            tool: tool.name.clone(),
            action: tool.action.clone(),
            target: target.into(),
            argv,
            timeout: timeout(tool).unwrap_or(DEFAULT_TIMEOUT),
        })
    }
}

impl Tool {
    /// Whether it says nothing of its sink.
    fn has_no_sink(&self) -> bool {
        let is_silent = self.rationale.is_empty() && self.limits.is_none() && !self.egress;
        is_silent && self.untrusted == Untrusted::ByRisk
    }

    /// Names of the arguments that a call may have.
    fn declared(&self) -> Vec<&str> {
        let slots = self
            .argv
            .iter()
            .filter_map(|part| Some(Slot::of(part)?.name));
        let mut names = vec![ACTION, self.target.as_str()];
        names.extend(slots.chain(self.arguments.iter().map(String::as_str)));
        names.sort_unstable();
        names.dedup();
        names
    }
}

/// A part of `argv` that stands for an argument of the call.
struct Slot<'a> {
    name: &'a str,
    is_words: bool,
}

impl<'a> Slot<'a> {
    fn of(part: &'a str) -> Option<Self> {
        let name = part.strip_prefix('{')?.strip_suffix('}')?;
        Some(match name.strip_suffix(":words") {
            Some(name) => Self {
                name,
                is_words: true,
            },
            None => Self {
                name,
                is_words: false,
            },
        })
    }

    fn fill(
        &self,
        arguments: &Map<String, Value>,
        may_be_option: bool,
    ) -> Result<Vec<String>, NoCall> {
        let name = || self.name.to_owned();
        let text = match arguments.get(self.name) {
            Some(Value::String(text)) => text.clone(),
            Some(value @ (Value::Number(_) | Value::Bool(_))) => value.to_string(),
            _ => return Err(NoCall::NotText(name())),
        };
        if text.contains('\0') {
            return Err(NoCall::Nul(name()));
        }
        if self.is_words {
            return command::words(&text).map_err(|why| NoCall::Words(name(), why));
        }
        if text.starts_with('-') && !may_be_option {
            return Err(NoCall::Option(name()));
        }
        Ok(vec![text])
    }
}

fn timeout(tool: &Tool) -> Result<Duration, String> {
    let Some(text) = &tool.timeout else {
        return Ok(DEFAULT_TIMEOUT);
    };
    let parsed = humantime::parse_duration(text).ok();
    let allowed = parsed.filter(|timeout| !timeout.is_zero() && *timeout <= MAX_TIMEOUT);
    allowed.ok_or_else(|| {
        format!("`timeout` is `{text}`; allowed is a time such as `10s`, at most 1h")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const FILE: &str = r#"
        [[tool]]
        name = "report"
        argv = ["/usr/bin/head", "-n", "{lines}", "--", "{path}"]
        target = "path"
        allow = ["/reports/*"]
        risk = "low"
        capability = "filesystem_read"
        timeout = "10s"

        [[tool]]
        name = "bash"
        action = "exec"
        argv = ["{command:words}"]
        target = "command"
        allow = ["*"]
    "#;

    #[test]
    fn arguments_take_their_places_and_nothing_else_is_taken() {
        let registry = Registry::read(FILE).unwrap();
        let report = |arguments: Value| registry.resolve(Some("report"), &arguments);
        let resolved = report(json!({ "path": "/reports/a b", "lines": 5 })).unwrap();
        assert_eq!(
            resolved.argv,
            ["/usr/bin/head", "-n", "5", "--", "/reports/a b"]
        );
        assert_eq!(
            (resolved.target.as_str(), resolved.timeout),
            ("/reports/a b", Duration::from_secs(10))
        );
        for (arguments, refused) in [
            (
                json!({ "path": "/reports/a", "lines": 1, "command": "x" }),
                NoCall::Undeclared("command".into(), "action, lines, path".into()),
            ),
            (json!({ "lines": 1 }), NoCall::NoTarget("path".into())),
            (
                json!({ "path": ["/reports/a"], "lines": 1 }),
                NoCall::NoTarget("path".into()),
            ),
            (
                json!({ "path": "/reports/a" }),
                NoCall::NotText("lines".into()),
            ),
            (
                json!({ "path": "/reports/a", "lines": "-5" }),
                NoCall::Option("lines".into()),
            ),
            (
                json!({ "path": "/reports/a\0", "lines": 1 }),
                NoCall::Nul("path".into()),
            ),
            (
                json!({ "path": "/reports/a", "lines": 1, "action": "write" }),
                NoCall::Unknown("report.write".into()),
            ),
        ] {
            assert_eq!(report(arguments), Err(refused));
        }
        let after_dashes = report(json!({ "path": "-a", "lines": 1 })).unwrap();
        assert_eq!(after_dashes.argv[4], "-a");
        assert_eq!(
            registry.resolve(Some("x"), &json!({})),
            Err(NoCall::Unknown("x".into()))
        );
        assert_eq!(registry.resolve(None, &json!({})), Err(NoCall::NoName));
    }

    #[test]
    fn a_command_is_its_words() {
        let registry = Registry::read(FILE).unwrap();
        let bash = |command: &str| {
            registry.resolve(
                Some("bash"),
                &json!({ "action": "exec", "command": command }),
            )
        };
        assert_eq!(bash("ls -la '/a b'").unwrap().argv, ["ls", "-la", "/a b"]);
        assert!(matches!(bash("ls; id"), Err(NoCall::Words(..))));
    }

    #[test]
    fn an_entry_that_could_not_hold_is_refused() {
        for (change, words) in [
            (
                ("risk = \"low\"\n", ""),
                "`risk` and `capability` are required",
            ),
            (
                ("name = \"report\"", "name = \"bash\"\naction = \"exec\""),
                "of a common sink are fixed",
            ),
            (("timeout = \"10s\"", "timeout = \"2h\""), "at most 1h"),
            (
                ("\"/usr/bin/head\"", "\"{path}\""),
                "must not be an argument",
            ),
            (
                ("\"{path}\"", "\"{path:words}\""),
                "needs `limits.allowed_commands`",
            ),
            (("name = \"report\"", ""), "not understood"),
            (
                ("target = \"path\"", "target = \"path\"\nshell = true"),
                "not understood",
            ),
        ] {
            let error = Registry::read(&FILE.replacen(change.0, change.1, 1))
                .unwrap_err()
                .to_string();
            assert!(error.contains(words), "{error}");
        }
        let twice = format!("{FILE}{FILE}");
        assert!(
            Registry::read(&twice)
                .unwrap_err()
                .to_string()
                .contains("two entries")
        );
    }
}
