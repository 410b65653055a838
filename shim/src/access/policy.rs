//! What a role says about the runs of its members: for the broker, and before they start.

use std::collections::BTreeMap;

use polydev_proto::{
    broker::{self, Egress},
    budget::{Exhausted, Used, today},
    egress::{MAX_RULES, NotARule, Rule},
    id::UserId,
    provider::{NoVendor, Vendor},
    runtime::RunStart,
};
use polydev_transport::upstream::{self, Unreadable, Upstream};
use serde::Deserialize;

use super::limits::{Asked, Limits, TooMuch};

/// The part of a `[[role]]` that is about its members' runs.
#[derive(Debug, Default)]
pub struct Policy {
    budget: Option<Budget>,
    /// Rules. `None` if the pool alone decides.
    egress: Option<Vec<String>>,
    upstreams: Vec<broker::Upstream>,
    limits: Limits,
}

/// What a role says, as it is written.
#[derive(Debug)]
pub(super) struct Says {
    /// Whether it allows credentials in containers.
    pub(super) inject: Option<bool>,
    pub(super) budget: Option<Budget>,
    pub(super) egress: Option<Vec<String>>,
    pub(super) upstream: BTreeMap<String, Upstream>,
    pub(super) limits: Limits,
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
    Provider(#[from] NoVendor),
    #[error("`upstream` names {0} twice")]
    Twice(Vendor),
    #[error("`upstream.{provider}`")]
    Upstream {
        provider: Vendor,
        source: upstream::Invalid,
    },
    #[error("`upstream.{provider}`")]
    Unreadable {
        provider: Vendor,
        source: Unreadable,
    },
}

impl Policy {
    /// Rules of what runs may reach; `None` if the pool alone decides.
    #[must_use]
    pub fn egress(&self) -> Option<&[String]> {
        self.egress.as_deref()
    }

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
            limits,
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
            let provider: Vendor = provider.parse()?;
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
            limits,
        })
    }

    /// Gives a run that says nothing of tools or its timeout those of the role. Returns what the
    /// run asks for.
    ///
    /// # Errors
    /// [`TooMuch`]
    pub fn limit(&self, start: &mut RunStart) -> Result<Asked, TooMuch> {
        self.limits.limit(start)
    }

    /// # Errors
    /// [`TooMuch`]
    pub fn allows(&self, asked: &Asked) -> Result<(), TooMuch> {
        self.limits.allows(asked)
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
