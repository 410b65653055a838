//! What a role says about the runs that its members may start.

use std::time::Duration;

use polydev_proto::{
    provider::Provider,
    runtime::{self, RunStart, run_start::Command},
    workspace,
};
use serde::{Deserialize, Deserializer, de};
use wildmatch::WildMatch;

/// The timeout of a run whose caller gives none.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10 * 60);
/// The same for a script, as the systems before this one had it.
const DEFAULT_SCRIPT_TIMEOUT: Duration = Duration::from_secs(60);

/// The timeout of a run that says nothing of it.
#[must_use]
pub fn default_timeout(provider: Provider) -> Duration {
    match provider {
        Provider::Cli(_) => DEFAULT_TIMEOUT,
        Provider::Python => DEFAULT_SCRIPT_TIMEOUT,
    }
}

/// The part of a `[[role]]` that limits what its members may start.
#[derive(Debug, Default, Clone)]
pub(super) struct Limits {
    /// The right `run` is not in the role.
    pub(super) has_prompts_alone: bool,
    pub(super) tools: Option<Tools>,
    pub(super) max_timeout: Option<MaxTimeout>,
    /// Patterns for the first word of commands. `None` allows all.
    pub(super) commands: Option<Vec<Glob>>,
    /// Patterns for the names of variables. `None` allows all, and none if there are `commands`: a
    /// `PATH` of the caller's could lead to another program.
    pub(super) env: Option<Vec<Glob>>,
}

/// `*` stands for any characters, `?` for one character.
#[derive(Debug, Clone, Deserialize)]
#[serde(from = "String")]
pub(super) struct Glob(WildMatch);

impl From<String> for Glob {
    fn from(pattern: String) -> Self {
        Self(WildMatch::new(&pattern))
    }
}

/// The most that models may use. Commands are for roles that say nothing or `all`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Tools {
    None,
    Read,
    All,
}

impl Tools {
    fn given(self) -> runtime::Tools {
        match self {
            Self::None => runtime::Tools::None,
            Self::Read => runtime::Tools::Read,
            Self::All => runtime::Tools::All,
        }
    }
}

/// Like `30m`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MaxTimeout(Duration);

impl<'de> Deserialize<'de> for MaxTimeout {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let given = String::deserialize(deserializer)?;
        let time = humantime::parse_duration(&given).ok();
        let time = time.filter(|time| !time.is_zero());
        time.map(Self).ok_or_else(|| {
            let words = format!("`max_timeout` is `{given}`; must be a time such as `30m` or `2h`");
            de::Error::custom(words)
        })
    }
}

/// An unknown provider is refused elsewhere.
fn default_of(start: &RunStart) -> Duration {
    start
        .provider
        .parse()
        .map_or(DEFAULT_TIMEOUT, default_timeout)
}

/// A role does not allow a run to do so much.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum TooMuch {
    #[error("start commands: their role allows prompts alone, or has `tools`")]
    Command,
    #[error("give a model more tools than `tools` of their role")]
    Tools,
    #[error(
        "start prompts with `env`, a `work_dir`, or files below a name that begins with a dot: their role allows prompts alone, or has `tools`, and these could start programs"
    )]
    Settings,
    #[error("start runs with a `timeout` above {}, `max_timeout` of their role", humantime::format_duration(*.0))]
    Timeout(Duration),
    #[error("start `{0}`: `commands` of their role does not have it")]
    Program(String),
    #[error("set the variable `{0}`: `env` of their role does not have it")]
    Variable(String),
}

/// What a run asks for, as far as roles limit it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// Of a prompt; `None` for a command.
    pub tools: Option<runtime::Tools>,
    /// Whether the run brings what could make its CLI start something by itself.
    has_settings: bool,
    timeout: Duration,
    /// The first word of a command.
    program: Option<String>,
    variables: Vec<String>,
}

impl Asked {
    #[must_use]
    pub fn of(start: &RunStart) -> Self {
        let is_hidden = |path: &str| path.split('/').any(|name| name.starts_with('.'));
        let (tools, program) = match &start.command {
            Some(Command::Prompt(prompt)) => (Some(prompt.tools()), None),
            Some(Command::Argv(argv)) => {
                let word = argv.args.first().map(|word| String::from_utf8_lossy(word));
                let program = word.map(String::from).or(argv.text.first().cloned());
                (None, program)
            }
            None => (None, None),
        };
        // One that is not valid is refused elsewhere.
        let timeout = start.timeout.and_then(|given| given.try_into().ok());
        Self {
            tools,
            has_settings: !start.env.is_empty()
                || !["", workspace::PATH].contains(&&*start.work_dir)
                || start.files.iter().any(|file| is_hidden(&file.path)),
            timeout: timeout.unwrap_or_else(|| default_of(start)),
            program,
            variables: start.env.keys().cloned().collect(),
        }
    }
}

impl Limits {
    /// Gives a run that says nothing of tools or its timeout those of the role. Returns what the
    /// run asks for.
    ///
    /// # Errors
    /// [`TooMuch`]
    pub(super) fn limit(&self, start: &mut RunStart) -> Result<Asked, TooMuch> {
        let most = self.most_tools();
        if let Some(Command::Prompt(prompt)) = &mut start.command
            && prompt.tools == 0
            && most < Tools::All
        {
            prompt.set_tools(most.given());
        }
        if let Some(MaxTimeout(most)) = self.max_timeout
            && start.timeout.is_none()
            && most < default_of(start)
        {
            start.timeout = most.try_into().ok();
        }
        let asked = Asked::of(start);
        self.allows(&asked).map(|()| asked)
    }

    /// # Errors
    /// [`TooMuch`]
    pub(super) fn allows(&self, asked: &Asked) -> Result<(), TooMuch> {
        self.allows_tools(asked)?;
        if let Some(MaxTimeout(most)) = self.max_timeout
            && asked.timeout > most
        {
            return Err(TooMuch::Timeout(most));
        }
        let has = |patterns: &[Glob], word: &str| {
            patterns.iter().any(|Glob(pattern)| pattern.matches(word))
        };
        // A way back up would lead out of a folder that a pattern names.
        let leads_up = |program: &str| program.split('/').any(|part| part == "..");
        if let (Some(commands), Some(program)) = (&self.commands, &asked.program)
            && (leads_up(program) || !has(commands, program))
        {
            return Err(TooMuch::Program(program.clone()));
        }
        let mut variables = asked.variables.iter();
        let refused = match (&self.env, &self.commands) {
            (None, None) => None,
            (None, Some(_)) => variables.next(),
            (Some(env), _) => variables.find(|name| !has(env, name)),
        };
        refused.map_or(Ok(()), |name| Err(TooMuch::Variable(name.clone())))
    }

    fn allows_tools(&self, asked: &Asked) -> Result<(), TooMuch> {
        let most = self.most_tools();
        match asked.tools {
            _ if most == Tools::All && !self.has_prompts_alone => Ok(()),
            None => Err(TooMuch::Command),
            Some(_) if asked.has_settings => Err(TooMuch::Settings),
            Some(_) if most == Tools::All => Ok(()),
            Some(runtime::Tools::None) => Ok(()),
            Some(runtime::Tools::Read) if most == Tools::Read => Ok(()),
            // A value that nobody knows is refused elsewhere.
            Some(_) => Err(TooMuch::Tools),
        }
    }

    fn most_tools(&self) -> Tools {
        self.tools.unwrap_or(Tools::All)
    }
}
