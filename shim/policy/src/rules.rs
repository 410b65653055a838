//! Rules in Cedar. A `permit` allows, a `forbid` blocks, and a `forbid` with `@outcome("step_up")`
//! needs somebody's approval. What no rule permits is blocked, and so is what a rule fails on.
//!
//! Rules may have a name (`@id`), a reason for whoever is refused (`@reason`, in which `{risk}` and
//! `{integrity}` stand for the call's), and a text for the trace (`@trace`).

mod facts;

use std::{fmt::Write as _, str::FromStr, sync::LazyLock};

use cedar_policy::{
    Authorizer, Decision, Effect, Policy, PolicyId, PolicySet, Response, Schema, ValidationMode,
    Validator,
};

use facts::Question;
pub use facts::{Kind, RunFacts, ToolFacts};

use crate::{canonical, decision::Outcome};

/// Longest text of rules, in bytes.
pub const MAX_RULES_TEXT: usize = 1 << 20;

const BUILTIN: &str = include_str!("rules/builtin.cedar");
const SCHEMA: &str = include_str!("rules/schema.cedarschema");

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
        let all = format!("{BUILTIN}\n{text}");
        let hash = canonical::sha256(all.as_bytes());
        let parsed = PolicySet::from_str(&all).map_err(|error| Error::Syntax(told(&error)))?;
        if let Some(template) = parsed.templates().next() {
            return Err(Error::Template(template.id().to_string()));
        }
        let checked = Validator::new(THE_SCHEMA.clone()).validate(&parsed, ValidationMode::Strict);
        if !checked.validation_passed() {
            let errors: Vec<_> = checked
                .validation_errors()
                .map(ToString::to_string)
                .collect();
            return Err(Error::Schema(errors.join("; ")));
        }
        let (mut hard, mut soft) = (PolicySet::new(), PolicySet::new());
        let mut names = std::collections::BTreeSet::new();
        for policy in parsed.policies() {
            let name = name_of(policy);
            if !names.insert(name.clone()) {
                return Err(Error::SameName(name));
            }
            let set = match (policy.effect(), policy.annotation("outcome")) {
                (_, None) | (Effect::Forbid, Some("block")) => &mut hard,
                (Effect::Forbid, Some("step_up")) => &mut soft,
                (_, Some(given)) => {
                    let given = given.to_owned();
                    return Err(Error::Outcome { rule: name, given });
                }
            };
            set.add(policy.clone())
                .expect("their ids differ, and none is a template");
        }
        Ok(Self { hard, soft, hash })
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
        let decided = decided(set, &response);
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
            None => format!("rule `{}`", name_of(first)),
        };
        Verdict {
            outcome,
            reason,
            trace: first.annotation("trace").map(Into::into),
            rules: decided.into_iter().map(name_of).collect(),
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

/// The rules that decided, in the order of the file.
fn decided<'a>(set: &'a PolicySet, response: &Response) -> Vec<&'a Policy> {
    let mut policies: Vec<_> = response
        .diagnostics()
        .reason()
        .filter_map(|id| set.policy(id))
        .collect();
    policies.sort_by_key(|policy| place(policy.id()));
    policies
}

/// The place in the file, of which Cedar makes the id: `policy7`.
fn place(id: &PolicyId) -> usize {
    let text: &str = id.as_ref();
    text.trim_start_matches(|c: char| !c.is_ascii_digit())
        .parse()
        .unwrap_or(usize::MAX)
}

fn name_of(policy: &Policy) -> String {
    match policy.annotation("id") {
        Some(name) => name.into(),
        None => policy.id().to_string(),
    }
}

/// All that is wrong, with the lines.
fn told(errors: &cedar_policy::ParseErrors) -> String {
    let mut told = String::new();
    for error in errors.iter() {
        let separator = if told.is_empty() { "" } else { "; " };
        write!(told, "{separator}{error}").expect("a string takes everything");
    }
    told
}

#[cfg(test)]
mod tests;
