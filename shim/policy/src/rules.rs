//! Rules in Cedar. A `permit` allows, a `forbid` blocks, and a `forbid` with `@outcome("step_up")`
//! needs somebody's approval. What no rule permits is blocked, and so is what a rule fails on.
//!
//! Rules may have a name (`@id`), a reason for whoever is refused (`@reason`, in which `{risk}` and
//! `{integrity}` stand for the call's), and a text for the trace (`@trace`).

mod facts;

use std::{collections::HashMap, fmt::Write as _, str::FromStr, sync::LazyLock};

use cedar_policy::{
    Authorizer, Decision, Effect, Policy, PolicyId, PolicySet, Response, Schema, ValidationMode,
    Validator,
};

use facts::Question;
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
    /// Those that allow and block.
    hard: PolicySet,
    /// Those that need an approval.
    soft: PolicySet,
    /// The places of their names in the files.
    order: HashMap<String, usize>,
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
        let (mut hard, mut soft) = (PolicySet::new(), PolicySet::new());
        let mut all = PolicySet::new();
        let mut order = HashMap::new();
        for policy in named(BUILTIN)?.into_iter().chain(named(text)?) {
            let name = policy.id().to_string();
            let set = match (policy.effect(), policy.annotation("outcome")) {
                (_, None) | (Effect::Forbid, Some("block")) => &mut hard,
                (Effect::Forbid, Some("step_up")) => &mut soft,
                (_, Some(given)) => {
                    let given = given.to_owned();
                    return Err(Error::Outcome { rule: name, given });
                }
            };
            if set.add(policy.clone()).is_err() || all.add(policy).is_err() {
                return Err(Error::SameName(name));
            }
            order.insert(name, order.len());
        }
        let checked = Validator::new(THE_SCHEMA.clone()).validate(&all, ValidationMode::Strict);
        if !checked.validation_passed() {
            let errors = checked.validation_errors().map(ToString::to_string);
            return Err(Error::Schema(errors.collect::<Vec<_>>().join("; ")));
        }
        Ok(Self {
            hard,
            soft,
            order,
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
        let Question { request, entities } = match question {
            Ok(question) => question,
            Err(error) => {
                return Verdict::failed(&format!("the request could not be read: {error}"));
            }
        };
        let authorizer = Authorizer::new();
        let hard = authorizer.is_authorized(&request, &self.hard, &entities);
        let soft = authorizer.is_authorized(&request, &self.soft, &entities);
        // A rule that fails is left out by Cedar: a `forbid` would forbid nothing.
        for response in [&hard, &soft] {
            if let Some(error) = response.diagnostics().errors().next() {
                return Verdict::failed(&error.to_string());
            }
        }
        let (outcome, set, response) = match hard.decision() {
            Decision::Deny => (Outcome::Block, &self.hard, hard),
            Decision::Allow if soft.diagnostics().reason().next().is_some() => {
                (Outcome::StepUp, &self.soft, soft)
            }
            Decision::Allow => (Outcome::Allow, &self.hard, hard),
        };
        let decided = self.decided(set, &response);
        let Some(first) = decided.first() else {
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
                .map(|policy| policy.id().to_string())
                .collect(),
        }
    }
}

impl Rules {
    /// The rules that decided, in the order of the files.
    fn decided<'a>(&self, set: &'a PolicySet, response: &Response) -> Vec<&'a Policy> {
        let ids = response.diagnostics().reason();
        let mut policies: Vec<_> = ids.filter_map(|id| set.policy(id)).collect();
        policies.sort_by_key(|policy| self.order.get(&policy.id().to_string()));
        policies
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
