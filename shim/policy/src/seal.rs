//! A signature over all of a decision: who changes one field of it, or of the data that it names,
//! needs the secret.

use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{
    canonical,
    decision::Decision,
    secrets::{ALGORITHM, Secrets},
};

/// What keeps decisions and tokens apart: the text of one is never the text of the other.
const CONTEXT: &str = "polydev decision v1\n";

/// A decision's signature.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Seal {
    pub algorithm: String,
    pub key_id: String,
    /// Hexadecimal digits.
    pub signature: String,
}

impl Seal {
    #[must_use]
    pub fn of(decision: &Decision, secrets: &Secrets) -> Self {
        Self {
            algorithm: ALGORITHM.into(),
            key_id: secrets.key_id().into(),
            signature: secrets.sign(&text(decision)),
        }
    }

    /// Whether the decision is the one that was sealed.
    #[must_use]
    pub fn fits(&self, decision: &Decision, secrets: &Secrets) -> bool {
        self.algorithm == ALGORITHM
            && secrets.verify(&text(decision), &self.signature, Some(&self.key_id))
    }
}

fn text(decision: &Decision) -> String {
    format!("{CONTEXT}{}", canonical::text(&json!(decision)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        decision::{DecidedData, DecidedSink, Outcome},
        lattice::Label,
        sink::Risk,
    };
    use serde_json::Value;

    fn decision() -> Decision {
        Decision {
            outcome: Outcome::Block,
            reason: "reason".into(),
            evaluation_trace: vec!["step".into()],
            rules: vec!["rule".into()],
            policy_hash: "1".into(),
            target_hash: "2".into(),
            arguments_hash: "3".into(),
            sink: DecidedSink {
                tool: "bash".into(),
                action: "exec".into(),
                risk: Risk::Critical,
            },
            provenance: DecidedData {
                node_id: "4".into(),
                label: Some(Label::EXTERNAL),
            },
        }
    }

    #[test]
    fn a_decision_that_was_changed_does_not_fit_its_seal() {
        let secrets = Secrets::read("a secret of this test").unwrap();
        let seal = Seal::of(&decision(), &secrets);
        assert!(seal.fits(&decision(), &secrets));
        let value = json!(decision());
        let changes = [
            ("/outcome", json!("allow")),
            ("/reason", json!("other")),
            ("/evaluation_trace", json!([])),
            ("/rules", json!(["other"])),
            ("/policy_hash", json!("0")),
            ("/target_hash", json!("0")),
            ("/arguments_hash", json!("0")),
            ("/sink/tool", json!("other")),
            ("/sink/action", json!("other")),
            ("/sink/risk", json!("low")),
            ("/provenance/node_id", json!("0")),
            ("/provenance/integrity", json!("trusted")),
            ("/provenance/confidentiality", json!("secret")),
        ];
        for (place, other) in changes {
            let mut value: Value = value.clone();
            *value
                .pointer_mut(place)
                .unwrap_or_else(|| panic!("{place}")) = other;
            let changed: Decision = serde_json::from_value(value).unwrap();
            assert!(!seal.fits(&changed, &secrets), "{place}");
        }
        let other = Secrets::read("another secret of this test").unwrap();
        assert!(!seal.fits(&decision(), &other));
    }
}
