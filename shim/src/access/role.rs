//! A role of the file: who has it, and what it allows.

use std::collections::BTreeMap;

use polydev_proto::provider::{Provider, Unknown};
use polydev_transport::{names::Pattern, upstream::Upstream};
use serde::{Deserialize, Deserializer};
use wildmatch::WildMatch;

use super::{
    Action, Caller, Need, What,
    limits::{Glob, Limits, MaxTimeout, Tools},
    policy::{Budget, Invalid, Policy, Says},
};

/// What a role allows its members to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Right {
    Run,
    /// Start prompts, and all calls about runs that exist.
    Prompt,
    Scale,
    Images,
    /// See, approve and deny what waits for an approval.
    Approve,
    Credentials,
}

/// One `[[role]]` of the file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Role {
    members: Vec<Pattern>,
    may: Vec<Right>,
    /// Users that the members may act for.
    #[serde(default = "all")]
    users: Vec<Users>,
    /// Any names of providers. An empty list means all providers.
    #[serde(default, deserialize_with = "providers")]
    providers: Vec<Provider>,
    /// Whether credentials of the members' runs may be in containers. Without a word, only what
    /// the members themselves bring in the clear.
    inject: Option<bool>,
    /// Whether records of earlier systems may be used.
    #[serde(default)]
    unbound: bool,
    budget: Option<Budget>,
    /// Rules for what the members' runs may reach beside their model.
    egress: Option<Vec<String>>,
    /// By the name of a provider.
    #[serde(default)]
    upstream: BTreeMap<String, Upstream>,
    /// What the models of the members' prompts may use.
    tools: Option<Tools>,
    max_timeout: Option<MaxTimeout>,
    /// Patterns for the first word of the members' commands.
    commands: Option<Vec<Glob>>,
    /// Patterns for the names of variables of the members' runs.
    env: Option<Vec<Glob>>,
}

/// Which users.
#[derive(Debug, Deserialize)]
#[serde(try_from = "String")]
enum Users {
    /// The caller alone.
    Caller,
    /// `*` stands for any characters, `?` for one character.
    Like(WildMatch),
}

/// What `users` says for the user that the caller is.
const CALLER: &str = "{caller}";

impl TryFrom<String> for Users {
    type Error = String;

    fn try_from(given: String) -> Result<Self, String> {
        match &*given {
            CALLER => Ok(Self::Caller),
            other if other.contains(['{', '}']) => Err(format!(
                "`users` has `{other}`; in braces only `{CALLER}` is allowed"
            )),
            glob => Ok(Self::Like(WildMatch::new(glob))),
        }
    }
}

fn all() -> Vec<Users> {
    vec![Users::Like(WildMatch::new("*"))]
}

fn providers<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Provider>, D::Error> {
    let named = Vec::<Named>::deserialize(deserializer)?;
    Ok(named.into_iter().map(|Named(provider)| provider).collect())
}

#[derive(Deserialize)]
#[serde(try_from = "String")]
struct Named(Provider);

impl TryFrom<String> for Named {
    type Error = Unknown;

    fn try_from(name: String) -> Result<Self, Unknown> {
        name.parse().map(Self)
    }
}

impl Role {
    pub(super) fn has(&self, caller: &Caller) -> bool {
        self.members
            .iter()
            .any(|pattern| pattern.matches(&caller.name))
    }

    /// Takes what the role says about runs.
    ///
    /// # Errors
    /// [`Invalid`]
    pub(super) fn policy(&mut self) -> Result<Policy, Invalid> {
        Policy::check(Says {
            inject: self.inject,
            budget: self.budget,
            egress: self.egress.take(),
            upstream: std::mem::take(&mut self.upstream),
            limits: Limits {
                has_prompts_alone: !self.may.contains(&Right::Run),
                tools: self.tools,
                max_timeout: self.max_timeout,
                commands: self.commands.take(),
                env: self.env.take(),
            },
        })
    }

    /// Whether the role may allow such a call for anybody.
    pub(super) fn may_ever(&self, need: Need) -> bool {
        let may = |right| self.may.contains(&right);
        match need {
            Need::Look => true,
            Need::Run => may(Right::Run) || may(Right::Prompt),
            Need::Scale => may(Right::Scale),
            Need::Images => may(Right::Images),
            Need::Approve => may(Right::Approve),
            Need::Credentials => may(Right::Credentials),
        }
    }

    pub(super) fn allows(&self, caller: &Caller, action: Action) -> bool {
        let may = |right| self.may.contains(&right);
        match action {
            Action::Look => true,
            Action::Run {
                what,
                user_id,
                provider,
            } => {
                let right = may(Right::Run) || (may(Right::Prompt) && what != What::Command);
                right && self.is_for(caller, user_id) && self.is_of(provider)
            }
            Action::Inject {
                what,
                user_id,
                provider,
                is_given,
            } => {
                let run = Action::Run {
                    what,
                    user_id: Some(user_id),
                    provider: Some(provider),
                };
                self.inject.unwrap_or(is_given) && self.allows(caller, run)
            }
            Action::Unbound { user_id, provider } => {
                let right = may(Right::Run) || may(Right::Prompt) || may(Right::Credentials);
                self.unbound
                    && right
                    && self.is_for(caller, Some(user_id))
                    && self.is_of(Some(provider))
            }
            Action::Scale { provider } => may(Right::Scale) && self.is_of(Some(provider)),
            Action::Images => may(Right::Images),
            Action::Approve { user_id, provider } => {
                may(Right::Approve) && self.is_for(caller, user_id) && self.is_of(provider)
            }
            Action::Credentials { user_id, provider } => {
                may(Right::Credentials) && self.is_for(caller, user_id) && self.is_of(provider)
            }
        }
    }

    /// A call without a user needs a role for all users.
    fn is_for(&self, caller: &Caller, user_id: Option<&str>) -> bool {
        self.users.iter().any(|users| match (users, user_id) {
            (Users::Caller, Some(user_id)) => caller.user.as_deref() == Some(user_id),
            (Users::Caller, None) => false,
            (Users::Like(glob), Some(user_id)) => glob.matches(user_id),
            (Users::Like(glob), None) => glob.pattern() == "*",
        })
    }

    /// A call without a provider needs a role for all providers.
    fn is_of(&self, provider: Option<Provider>) -> bool {
        match provider {
            Some(provider) => self.providers.is_empty() || self.providers.contains(&provider),
            None => {
                let has = |provider: &Provider| self.providers.contains(provider);
                self.providers.is_empty() || Provider::all().all(|provider| has(&provider))
            }
        }
    }
}
