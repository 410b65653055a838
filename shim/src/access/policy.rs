//! What a role says about the runs of its members, for the broker.

use std::collections::BTreeMap;

use polydev_proto::{
    broker::{self, Egress},
    budget::{Exhausted, Used, today},
    egress::{MAX_RULES, NotARule, Rule},
    id::UserId,
    provider::{Provider, Unknown},
    runtime::{self, RunStart, run_start::Command},
    workspace,
};
use polydev_transport::upstream::{self, Unreadable, Upstream};
use serde::Deserialize;

/// The part of a `[[role]]` that is about its members' runs.
#[derive(Debug, Default)]
pub struct Policy {
    budget: Option<Budget>,
    /// Rules. `None` if the pool alone decides.
    egress: Option<Vec<String>>,
    upstreams: Vec<broker::Upstream>,
    tools: Option<Tools>,
    has_prompts_alone: bool,
}

/// What a role says, as it is written.
#[derive(Debug)]
pub(super) struct Says {
    /// Whether it allows credentials in containers.
    pub(super) inject: Option<bool>,
    pub(super) budget: Option<Budget>,
    pub(super) egress: Option<Vec<String>>,
    pub(super) upstream: BTreeMap<String, Upstream>,
    pub(super) tools: Option<Tools>,
    /// Whether it allows prompts, and no commands.
    pub(super) has_prompts_alone: bool,
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
}

/// What each user may use in a day (UTC), over all providers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Budget {
    requests: Option<u64>,
    tokens: Option<u64>,
}

/// The user has used up a budget.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("user `{user_id}`: {exhausted}; the next day begins at 00:00 UTC")]
pub struct OverBudget {
    pub user_id: UserId,
    exhausted: Exhausted,
}

/// What is wrong in a role.
#[derive(Debug, thiserror::Error)]
pub enum Invalid {
    #[error("`{0}` needs `inject = false`: nothing would hold it for a key that is in a container")]
    NeedsBroker(&'static str),
    #[error("`budget.{0}` is 0; must be 1 or more, or absent for no limit")]
    NoBudget(&'static str),
    #[error("`budget` must have `requests`, `tokens` or both")]
    EmptyBudget,
    #[error("`egress` has `{rule}`")]
    Rule { rule: String, source: NotARule },
    #[error("`egress` has {0} rules; must have at most {MAX_RULES}")]
    TooManyRules(usize),
    #[error("a name under `upstream`")]
    Provider(#[from] Unknown),
    #[error("`upstream` names {0} twice")]
    Twice(Provider),
    #[error("`upstream.{provider}`")]
    Upstream {
        provider: Provider,
        source: upstream::Invalid,
    },
    #[error("`upstream.{provider}`")]
    Unreadable {
        provider: Provider,
        source: Unreadable,
    },
}

/// What a run asks for, as far as `tools` of a role limits it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asked {
    /// Of a prompt; `None` for a command.
    pub tools: Option<runtime::Tools>,
    /// Whether the run brings what could make its CLI start something by itself.
    has_settings: bool,
}

impl Asked {
    #[must_use]
    pub fn of(start: &RunStart) -> Self {
        let is_hidden = |path: &str| path.split('/').any(|name| name.starts_with('.'));
        Self {
            tools: match &start.command {
                Some(Command::Prompt(prompt)) => Some(prompt.tools()),
                Some(Command::Argv(_)) | None => None,
            },
            has_settings: !start.env.is_empty()
                || !["", workspace::PATH].contains(&&*start.work_dir)
                || start.files.iter().any(|file| is_hidden(&file.path)),
        }
    }
}

impl Policy {
    /// Checks what a role says about runs.
    ///
    /// # Errors
    /// [`Invalid`]
    pub(super) fn check(says: Says) -> Result<Self, Invalid> {
        let Says {
            inject,
            budget,
            egress,
            upstream,
            tools,
            has_prompts_alone,
        } = says;
        if inject != Some(false) && budget.is_some() {
            return Err(Invalid::NeedsBroker("budget"));
        }
        if inject != Some(false) && !upstream.is_empty() {
            return Err(Invalid::NeedsBroker("upstream"));
        }
        if let Some(Budget { requests, tokens }) = budget {
            for (name, most) in [("requests", requests), ("tokens", tokens)] {
                if most == Some(0) {
                    return Err(Invalid::NoBudget(name));
                }
            }
            if requests.is_none() && tokens.is_none() {
                return Err(Invalid::EmptyBudget);
            }
        }
        let rules = egress.as_deref().unwrap_or_default();
        if rules.len() > MAX_RULES {
            return Err(Invalid::TooManyRules(rules.len()));
        }
        for rule in rules {
            rule.parse::<Rule>().map_err(|source| Invalid::Rule {
                rule: rule.clone(),
                source,
            })?;
        }
        let read = |(provider, upstream): (String, Upstream)| {
            let provider: Provider = provider.parse()?;
            let checked = upstream.check();
            let checked = checked.map_err(|source| Invalid::Upstream { provider, source })?;
            let read = checked.read(provider);
            let read = read.map_err(|source| Invalid::Unreadable { provider, source })?;
            Ok::<_, Invalid>((provider, read))
        };
        let mut upstreams: Vec<broker::Upstream> = Vec::new();
        for named in upstream {
            let (provider, upstream) = read(named)?;
            // One has several names.
            if upstreams
                .iter()
                .any(|known| known.provider == upstream.provider)
            {
                return Err(Invalid::Twice(provider));
            }
            upstreams.push(upstream);
        }
        Ok(Self {
            budget,
            egress,
            upstreams,
            tools,
            has_prompts_alone,
        })
    }

    /// Gives a prompt that says nothing of tools those of the role. Returns what the run asks for.
    ///
    /// # Errors
    /// [`TooMuch`]
    pub fn limit(&self, start: &mut RunStart) -> Result<Asked, TooMuch> {
        let most = self.most_tools();
        if let Some(Command::Prompt(prompt)) = &mut start.command
            && prompt.tools == 0
            && most < Tools::All
        {
            prompt.set_tools(most.given());
        }
        let asked = Asked::of(start);
        self.allows(asked).map(|()| asked)
    }

    /// # Errors
    /// [`TooMuch`]
    pub fn allows(&self, asked: Asked) -> Result<(), TooMuch> {
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

    /// Whether anything of it must be told to the broker.
    #[must_use]
    pub fn says_anything(&self) -> bool {
        self.budget.is_some() || self.egress.is_some() || !self.upstreams.is_empty()
    }

    /// Whether runs may not reach all that their pools allow.
    #[must_use]
    pub fn restricts_egress(&self) -> bool {
        self.egress.is_some()
    }

    /// What the broker is told about a run of a user who has used so much. `None` if the role says
    /// nothing.
    ///
    /// # Errors
    /// [`OverBudget`]
    pub fn of_run(
        &self,
        user_id: &UserId,
        used: impl FnOnce() -> Used,
    ) -> Result<Option<broker::Policy>, OverBudget> {
        let budget = self.budget.map(|Budget { requests, tokens }| {
            let used = used();
            let budget = broker::Budget {
                requests: requests.unwrap_or_default(),
                tokens: tokens.unwrap_or_default(),
                used_requests: used.requests,
                used_tokens: used.tokens,
                day: today(),
            };
            let checked = budget.check(Used::default());
            checked.map(|()| budget).map_err(|exhausted| OverBudget {
                user_id: user_id.clone(),
                exhausted,
            })
        });
        let policy = broker::Policy {
            budget: budget.transpose()?,
            egress: self.egress.clone().map(|allow| Egress { allow }),
            upstreams: self.upstreams.clone(),
        };
        Ok((policy != broker::Policy::default()).then_some(policy))
    }
}
