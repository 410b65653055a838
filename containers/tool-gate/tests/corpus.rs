//! Fifty calls that an untrusted text could ask for. Every tool is granted everything here, so that
//! no call is blocked by a missing grant.

use polydev_policy::{
    capability::{Capability, Grant, Grants},
    decision::{Decision, Outcome},
    evaluate::{Call, Gate, Settings},
    provenance::{Graph, Source},
    rules::Rules,
    sink::Sinks,
};
use serde::Deserialize;
use serde_json::{Value, json};

const VECTORS: &str = include_str!("vectors.toml");

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Vectors {
    vector: Vec<Vector>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Vector {
    category: String,
    /// Tool, action and target.
    call: [String; 3],
    /// Whether the call is blocked whoever asks for it.
    #[serde(default)]
    always: bool,
    /// Of an untrusted text.
    #[serde(default = "block")]
    outcome: Outcome,
}

fn block() -> Outcome {
    Outcome::Block
}

fn gate() -> Gate {
    let mut grants = Grants::default();
    for (tool, action, capability) in [
        ("bash", "exec", Capability::ProcessExec),
        ("filesystem", "write", Capability::FilesystemWrite),
        ("memory", "write", Capability::Ipc),
        ("http", "post", Capability::NetworkEgress),
        ("credential_vault", "access", Capability::CredentialAccess),
    ] {
        let allow = vec!["*".into()];
        let deny = Vec::new();
        grants.add(
            tool,
            action,
            Grant {
                capability,
                allow,
                deny,
            },
        );
    }
    Gate {
        sinks: Sinks::common(),
        grants,
        rules: Rules::builtin(),
        settings: Settings {
            expected_policy_hash: None,
            others: Value::Null,
        },
    }
}

fn decide(gate: &Gate, source: Source, vector: &Vector) -> Decision {
    let mut graph = Graph::default();
    let node = graph.enter(source, "what it says").expect("there is room");
    let [tool, action, target] = &vector.call;
    let call = Call {
        caller: "corpus",
        tool,
        action,
        target,
        arguments: &json!({ "target": target }),
        node: &node,
    };
    gate.decide(&graph, &call)
}

#[test]
fn what_an_untrusted_text_asks_for_is_refused_by_the_policy_and_not_by_a_missing_grant() {
    let Vectors { vector: vectors } = toml::from_str(VECTORS).expect("it has vectors");
    let gate = gate();
    let (mut refused, mut by_capability) = (0, 0);
    for vector in &vectors {
        let name = format!("{}: {:?}", vector.category, vector.call);
        let decision = decide(&gate, Source::Web, vector);
        assert_eq!(
            decision.outcome, vector.outcome,
            "{name}: {}",
            decision.reason
        );
        refused += usize::from(decision.outcome != Outcome::Allow);
        by_capability += usize::from(decision.reason.starts_with("Capability denied"));
        let trusted = decide(&gate, Source::User, vector);
        assert_eq!(
            trusted.outcome == Outcome::Block,
            vector.always,
            "{name}: {}",
            trusted.reason
        );
    }
    println!("vectors: {}", vectors.len());
    println!("refused: {refused}");
    println!("refused by a missing grant alone: {by_capability}");
    assert_eq!((vectors.len(), refused, by_capability), (50, 50, 0));
}
