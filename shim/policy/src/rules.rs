//! Rules in Cedar. A `permit` allows, a `forbid` blocks, and a `forbid` with `@outcome("step_up")`
//! needs somebody's approval. What no rule permits is blocked, and so is what a rule fails on.
//!
//! Rules may have a name (`@id`), a reason for whoever is refused (`@reason`, in which `{risk}` and
//! `{integrity}` stand for the call's), and a text for the trace (`@trace`).

mod facts;
mod index;

use std::{collections::HashMap, fmt::Write as _, str::FromStr, sync::LazyLock};

use cedar_policy::{Effect, Policy, PolicyId, PolicySet, Schema, ValidationMode, Validator};

use facts::Question;
use index::Index;
use miette::Diagnostic;

pub use facts::{AgentFacts, Kind, RunFacts, ToolFacts};

use crate::{canonical, decision::Outcome};

/// Longest text of rules, in bytes.
pub const MAX_RULES_TEXT: usize = 1 << 20;

const BUILTIN: &str = include_str!("rules/builtin.cedar");
/// The schema that rules are checked with, in Cedar's form.
pub const SCHEMA: &str = include_str!("rules/schema.cedarschema");

static THE_SCHEMA: LazyLock<Schema> = LazyLock::new(|| {
    let schema = Schema::from_cedarschema_str(SCHEMA);
    schema.expect("a test reads it").0
});

/// Rules that were checked against the schema.
#[derive(Debug, Clone)]
pub struct Rules {
    /// Those that allow.
    permits: PolicySet,
    /// Those that block.
    blocks: Index,
    /// Those that need an approval.
    approvals: Index,
    /// All, with their places in the files.
    all: HashMap<PolicyId, (usize, Policy)>,
    hash: String,
}

/// What rules say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    pub outcome: Outcome,
    pub reason: String,
    /// Those that decided, in the order of the file; the first one gave the reason.
    pub rules: Vec<String>,
    pub trace: Option<String>,
}

/// Why rules are refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("the rules have {0} bytes, at most {MAX_RULES_TEXT} are allowed")]
    TooLong(usize),
    #[error("the rules are not Cedar: {0}")]
    Syntax(String),
    #[error("the rules do not fit the schema: {0}")]
    Schema(String),
    #[error(
        "the rule `{rule}` has `@outcome(\"{given}\")`; allowed are `block` and `step_up`, for a `forbid`"
    )]
    Outcome { rule: String, given: String },
    #[error("two rules are named `{0}`")]
    SameName(String),
    #[error("the rule `{0}` is a template, which no rule fills in")]
    Template(String),
}

impl Rules {
    /// The rules that always hold alone.
    #[must_use]
    pub fn builtin() -> Self {
        Self::read("").expect("a test reads them")
    }

    /// The rules of an operator, with those that always hold.
    ///
    /// # Errors
    /// [`Error`]
    pub fn read(text: &str) -> Result<Self, Error> {
        if text.len() > MAX_RULES_TEXT {
            return Err(Error::TooLong(text.len()));
        }
        let hash = canonical::sha256(format!("{BUILTIN}\n{text}").as_bytes());
        let (mut blocks, mut approvals) = (Index::default(), Index::default());
        let (mut permits, mut checked) = (PolicySet::new(), PolicySet::new());
        let mut all = HashMap::new();
        for policy in named(BUILTIN)?.into_iter().chain(named(text)?) {
            let rule = policy.id().to_string();
            let is_new = match (policy.effect(), policy.annotation("outcome")) {
                (Effect::Permit, None) => permits.add(policy.clone()).is_ok(),
                (Effect::Forbid, None | Some("block")) => blocks.add(policy.clone()),
                (Effect::Forbid, Some("step_up")) => approvals.add(policy.clone()),
                (_, Some(given)) => {
                    let given = given.to_owned();
                    return Err(Error::Outcome { rule, given });
                }
            };
            if !is_new || checked.add(policy.clone()).is_err() {
                return Err(Error::SameName(rule));
            }
            all.insert(policy.id().clone(), (all.len(), policy));
        }
        let checked = Validator::new(THE_SCHEMA.clone()).validate(&checked, ValidationMode::Strict);
        if !checked.validation_passed() {
            let errors = checked.validation_errors().map(ToString::to_string);
            return Err(Error::Schema(errors.collect::<Vec<_>>().join("; ")));
        }
        Ok(Self {
            permits,
            blocks,
            approvals,
            all,
            hash,
        })
    }

    /// SHA-256 of the text of all rules, in hexadecimal digits.
    #[must_use]
    pub fn hash(&self) -> &str {
        &self.hash
    }

    /// Whether a call of a tool may be made.
    #[must_use]
    pub fn tool(&self, facts: &ToolFacts) -> Verdict {
        self.decide(facts.question(), &|reason| {
            let reason = reason.replace("{risk}", facts.risk.name());
            reason.replace("{integrity}", facts.label.integrity.name())
        })
    }

    /// Whether a run may start.
    #[must_use]
    pub fn run(&self, facts: &RunFacts) -> Verdict {
        self.decide(facts.question(), &str::to_owned)
    }

    fn decide(&self, question: Result<Question, String>, fill: &dyn Fn(&str) -> String) -> Verdict {
        let asked = question.map_err(|error| format!("the request could not be read: {error}"));
        let asked = asked.and_then(|question| {
            Ok((
                self.blocks.applying(&question)?,
                self.approvals.applying(&question)?,
                index::matched(&self.permits, &question)?,
            ))
        });
        let (blocks, approvals, permits) = match asked {
            Ok(applying) => applying,
            Err(error) => return Verdict::failed(&error),
        };
        let (outcome, applying) = if !blocks.is_empty() || permits.is_empty() {
            (Outcome::Block, blocks)
        } else if !approvals.is_empty() {
            (Outcome::StepUp, approvals)
        } else {
            (Outcome::Allow, permits)
        };
        let mut decided: Vec<_> = applying.iter().filter_map(|id| self.all.get(id)).collect();
        decided.sort_by_key(|(place, _)| *place);
        let Some((_, first)) = decided.first() else {
            return Verdict {
                outcome,
                reason: "no rule permits this".into(),
                rules: Vec::new(),
                trace: None,
            };
        };
        let reason = match first.annotation("reason") {
            Some(reason) => fill(reason),
            None => format!("rule `{}`", first.id()),
        };
        Verdict {
            outcome,
            reason,
            trace: first.annotation("trace").map(Into::into),
            rules: decided
                .iter()
                .map(|(_, policy)| policy.id().to_string())
                .collect(),
        }
    }
}

impl Verdict {
    fn failed(why: &str) -> Self {
        Self {
            outcome: Outcome::Block,
            reason: format!("the policy could not be evaluated: {why}"),
            rules: Vec::new(),
            trace: None,
        }
    }
}

/// The rules of a text, each with its name for its id: that of `@id`, or `rule` with its number.
fn named(text: &str) -> Result<Vec<Policy>, Error> {
    let parsed = PolicySet::from_str(text).map_err(|error| Error::Syntax(told(text, &error)))?;
    if let Some(template) = parsed.templates().next() {
        return Err(Error::Template(template.id().to_string()));
    }
    // Cedar's ids have the places in the text: `policy7`.
    let place = |policy: &Policy| {
        let id = policy.id().to_string();
        id.trim_start_matches("policy")
            .parse::<usize>()
            .unwrap_or(usize::MAX)
    };
    let mut policies: Vec<_> = parsed.policies().cloned().collect();
    policies.sort_by_key(place);
    let names = policies.into_iter().enumerate().map(|(index, policy)| {
        let name = match policy.annotation("id") {
            Some(name) => name.to_owned(),
            None => format!("rule{}", index + 1),
        };
        policy.new_id(PolicyId::new(name))
    });
    Ok(names.collect())
}

/// All that is wrong, with the lines.
fn told(text: &str, errors: &cedar_policy::ParseErrors) -> String {
    let mut told = String::new();
    for error in errors.iter() {
        let separator = if told.is_empty() { "" } else { "; " };
        let place = error.labels().and_then(|mut labels| labels.next());
        let before = place.and_then(|place| text.get(..place.offset()));
        let written = match before {
            Some(before) => {
                let line = before.matches('\n').count() + 1;
                write!(told, "{separator}line {line}: {error}")
            }
            None => write!(told, "{separator}{error}"),
        };
        written.expect("a string takes everything");
    }
    told
}

#[cfg(test)]
mod tests;
