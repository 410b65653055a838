//! What an operator's rules say about runs, before they start, and about tools that agents use.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use polydev_policy::{
    agent,
    decision::Outcome,
    rules::{self, Rules, RunFacts, Verdict},
};
use polydev_transport::reload::Reloaded;
use serde::{Deserialize, Serialize};

/// The rules of `--policy`. Without it, roles alone decide.
#[derive(Debug, Default)]
pub struct RunPolicy(Option<Loaded>);

#[derive(Debug)]
struct Loaded {
    path: PathBuf,
    rules: Reloaded<Rules>,
    /// What is not allowed is recorded, and happens.
    is_shadow: bool,
}

/// What was decided about a run, for the audit log. It has neither the prompt nor the command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decided {
    pub outcome: Outcome,
    pub reason: String,
    /// The rules that decided, by their names: at most the first [`MAX_NAMED`].
    pub rules: Vec<String>,
    /// SHA-256 of the rules' text.
    pub policy_hash: String,
    /// SHA-256 of what they were asked about.
    pub facts_hash: String,
    /// Whether the run starts all the same.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub shadow: bool,
}

/// A record names so many rules.
const MAX_NAMED: usize = 16;
/// Longest reason and name of a rule in a record, in bytes.
const MAX_TEXT: usize = 1024;

fn cut(text: &str) -> String {
    text[..text.floor_char_boundary(MAX_TEXT)].to_owned()
}

/// Why the rules cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read the policy `{}`", path.display())]
    Unreadable {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("the policy `{}` is not valid", path.display())]
    Malformed { path: PathBuf, source: rules::Error },
}

/// The rules block a run, or a call of a tool.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the policy blocks this {what}: {reason}")]
pub struct Blocked {
    what: &'static str,
    reason: String,
}

/// What is left to do about something that is not blocked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leave {
    Given,
    /// Somebody must approve it first.
    NeedsApproval,
}

impl RunPolicy {
    /// Reads rules from a file of Cedar, and reads the file again when it changes. In shadow mode
    /// the rules decide nothing: what they would have decided is recorded.
    ///
    /// # Errors
    /// [`Error`]
    pub fn load(path: &Path, is_shadow: bool) -> Result<Self, Error> {
        let rules = Reloaded::new(vec![path.to_owned()], || read(path))?;
        Ok(Self(Some(Loaded {
            path: path.to_owned(),
            rules,
            is_shadow,
        })))
    }

    /// Whether there are rules.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// Decides about a run; `None` without rules.
    #[must_use]
    pub fn decide(&self, facts: &RunFacts) -> Option<Decided> {
        let loaded = self.0.as_ref()?;
        let rules = loaded.rules();
        let verdict = rules.run(facts);
        Some(loaded.decided(&rules, &verdict, facts.hash()))
    }

    /// Decides about a call that the model of an agent wants to make; `None` without rules. Returns the
    /// tool by the names of rules, and what its result brings into the conversation, too.
    #[must_use]
    pub fn decide_tool(
        &self,
        call: &agent::Call,
    ) -> Option<(Decided, String, Option<&'static str>)> {
        let loaded = self.0.as_ref()?;
        let rules = loaded.rules();
        let agent::Decided {
            verdict,
            tool,
            facts_hash,
            enters,
        } = agent::decide(&rules, call);
        Some((loaded.decided(&rules, &verdict, facts_hash), tool, enters))
    }
}

impl Loaded {
    fn rules(&self) -> Arc<Rules> {
        let (rules, refused) = self.rules.get(|| read(&self.path));
        if let Some(error) = refused {
            let error = crate::chain(&error);
            tracing::warn!(error, "cannot use the new policy, keeping the previous one");
        }
        rules
    }

    fn decided(&self, rules: &Rules, verdict: &Verdict, facts_hash: String) -> Decided {
        let named = verdict.rules.iter().take(MAX_NAMED);
        Decided {
            outcome: verdict.outcome,
            reason: cut(&verdict.reason),
            rules: named.map(|rule| cut(rule)).collect(),
            policy_hash: rules.hash().into(),
            facts_hash,
            shadow: self.is_shadow,
        }
    }
}

impl Decided {
    /// The hash of the policy, if it allows the run, or does so once somebody has approved it. In shadow
    /// mode a run may start that it does not allow.
    #[must_use]
    pub fn allowing(&self) -> Option<&str> {
        let allows = match self.outcome {
            Outcome::Allow => true,
            Outcome::StepUp => !self.shadow,
            Outcome::Block => false,
        };
        allows.then_some(self.policy_hash.as_str())
    }

    /// `what` is a run or a call.
    ///
    /// # Errors
    /// [`Blocked`], unless it is recorded alone.
    pub fn check(&self, what: &'static str) -> Result<Leave, Blocked> {
        match self.outcome {
            _ if self.shadow => Ok(Leave::Given),
            Outcome::Allow => Ok(Leave::Given),
            Outcome::StepUp => Ok(Leave::NeedsApproval),
            Outcome::Block => Err(Blocked {
                what,
                reason: self.reason.clone(),
            }),
        }
    }
}

impl fmt::Display for Decided {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shadow = if self.shadow { " (shadow)" } else { "" };
        write!(f, "{}{shadow}: {}", self.outcome.name(), self.reason)
    }
}

/// # Errors
/// [`Error`]
pub fn read(path: &Path) -> Result<Rules, Error> {
    let text = fs::read_to_string(path).map_err(|source| Error::Unreadable {
        path: path.into(),
        source,
    })?;
    Rules::read(&text).map_err(|source| Error::Malformed {
        path: path.into(),
        source,
    })
}
