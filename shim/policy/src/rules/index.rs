//! Rules that forbid, of which only those are asked that may apply. Cedar asks them all, at about 1 µs
//! each.
//!
//! A rule is left out only if Cedar would not come further than a comparison that is not true, and that
//! cannot fail: of the principal in its scope, or the first one in its `when`, of a text that the schema
//! promises. So what is decided is the same, with the same reasons.

use std::collections::HashMap;

use cedar_policy::{Authorizer, EntityUid, Policy, PolicyId, PolicySet, PrincipalConstraint};
use serde_json::Value;

use super::facts::Question;

/// Attributes of `context` and `resource` that the schema promises wherever a rule may name them without
/// `has`, and that are texts.
const TEXTS: [(&str, &str); 10] = [
    ("context", "user"),
    ("context", "program"),
    ("context", "model"),
    ("context", "tools"),
    ("context", "credential"),
    ("context", "target"),
    ("context", "integrity"),
    ("resource", "tool"),
    ("resource", "action"),
    ("resource", "risk"),
];

/// What a rule compares first.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Key {
    Principal,
    Text(&'static str, &'static str),
}

/// Rules that forbid.
#[derive(Debug, Clone, Default)]
pub(super) struct Index {
    /// Those that are always asked.
    others: PolicySet,
    /// By what they compare first, and with what.
    keyed: HashMap<Key, HashMap<String, PolicySet>>,
}

impl Index {
    /// Adds a rule. False if there is one with its id.
    pub(super) fn add(&mut self, policy: Policy) -> bool {
        let set = match first_comparison(&policy) {
            Some((key, value)) => self.keyed.entry(key).or_default().entry(value).or_default(),
            None => &mut self.others,
        };
        set.add(policy).is_ok()
    }

    /// The rules that apply.
    ///
    /// # Errors
    /// What a rule fails with.
    pub(super) fn applying(&self, question: &Question) -> Result<Vec<PolicyId>, String> {
        let mut applying = matched(&self.others, question)?;
        for (key, groups) in &self.keyed {
            match question.text(key) {
                Some(value) => {
                    if let Some(group) = groups.get(value) {
                        applying.extend(matched(group, question)?);
                    }
                }
                // No rule should name it then; whatever it is, Cedar decides.
                None => {
                    for group in groups.values() {
                        applying.extend(matched(group, question)?);
                    }
                }
            }
        }
        Ok(applying)
    }
}

/// The rules of a set that apply, all of one effect.
///
/// # Errors
/// What a rule fails with: Cedar leaves it out, and a `forbid` would forbid nothing.
pub(super) fn matched(set: &PolicySet, question: &Question) -> Result<Vec<PolicyId>, String> {
    let Question {
        request, entities, ..
    } = question;
    let response = Authorizer::new().is_authorized(request, set, entities);
    match response.diagnostics().errors().next() {
        Some(error) => Err(error.to_string()),
        None => Ok(response.diagnostics().reason().cloned().collect()),
    }
}

fn first_comparison(policy: &Policy) -> Option<(Key, String)> {
    if let PrincipalConstraint::Eq(principal) = policy.principal_constraint() {
        return Some((Key::Principal, name(&principal)));
    }
    let json = policy.to_json().ok()?;
    let mut first = json.get("conditions")?.get(0)?;
    if first.get("kind")? != "when" {
        return None;
    }
    first = first.get("body")?;
    while let Some(and) = first.get("&&") {
        first = and.get("left")?;
    }
    let equal = first.get("==")?;
    let (left, right) = (equal.get("left")?, equal.get("right")?);
    let (of, value) = match (attribute(left), attribute(right)) {
        (Some(of), None) => (of, right),
        (None, Some(of)) => (of, left),
        _ => return None,
    };
    let value = value.get("Value")?.as_str()?;
    Some((Key::Text(of.0, of.1), value.to_owned()))
}

/// One of [`TEXTS`], as Cedar's JSON says it.
fn attribute(expression: &Value) -> Option<(&'static str, &'static str)> {
    let dot = expression.get(".")?;
    let (of, name) = (dot.get("left")?.get("Var")?, dot.get("attr")?);
    let mut texts = TEXTS.into_iter();
    texts.find(|(variable, attribute)| of == variable && name == attribute)
}

/// The text that a principal is found by.
pub(super) fn name(principal: &EntityUid) -> String {
    principal.id().unescaped().to_owned()
}

#[cfg(test)]
mod tests;
