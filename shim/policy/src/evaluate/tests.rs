use super::*;
use crate::{
    capability::{Capability, Grant},
    provenance::Source,
};

fn gate() -> Gate {
    let mut grants = Grants::default();
    let grant = |capability, allow: &[&str]| Grant {
        capability,
        allow: allow.iter().map(ToString::to_string).collect(),
        deny: Vec::new(),
    };
    grants.add("bash", "exec", grant(Capability::ProcessExec, &["*"]));
    grants.add(
        "filesystem",
        "read",
        grant(Capability::FilesystemRead, &["/tmp/*"]),
    );
    grants.add("memory", "write", grant(Capability::Ipc, &["*"]));
    grants.add("http", "post", grant(Capability::NetworkEgress, &["*"]));
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

fn decide(
    gate: &Gate,
    source: Source,
    tool: &str,
    action: &str,
    target: &str,
    arguments: Value,
) -> Decision {
    let mut graph = Graph::default();
    let node = graph.enter(source, "content").unwrap();
    let call = Call {
        caller: "gate",
        tool,
        action,
        target,
        arguments: &arguments,
        node: &node,
    };
    gate.decide(&graph, &call)
}

#[test]
fn the_first_step_that_refuses_gives_the_reason() {
    let gate = gate();
    for (source, tool, action, target, outcome, reason) in [
        (
            Source::User,
            "x",
            "y",
            "z",
            Outcome::Block,
            "Unknown sink: x.y (not registered)",
        ),
        (
            Source::User,
            "bash",
            "exec",
            "ls; id",
            Outcome::Block,
            "Strict boundary denied target: the command has `;`, which a shell does not take as it is",
        ),
        (
            Source::User,
            "http",
            "post",
            "http://10.0.0.1/",
            Outcome::Block,
            "Strict boundary denied target: the address 10.0.0.1 is not public",
        ),
        (
            Source::User,
            "filesystem",
            "read",
            "/etc/passwd",
            Outcome::Block,
            "Capability denied: filesystem lacks filesystem_read for /etc/passwd",
        ),
        (
            Source::User,
            "credential_vault",
            "access",
            "a",
            Outcome::Block,
            "Capability denied: credential_vault lacks credential_access for a",
        ),
        (
            Source::Web,
            "bash",
            "exec",
            "cat /tmp/a",
            Outcome::Block,
            "UNTRUSTED integrity → critical risk sink = BLOCK",
        ),
        (
            Source::User,
            "bash",
            "exec",
            "cat /tmp/a",
            Outcome::StepUp,
            "CRITICAL risk sink requires explicit user confirmation",
        ),
        (
            Source::Web,
            "filesystem",
            "read",
            "/tmp/a",
            Outcome::Allow,
            "Low-risk sink with acceptable provenance",
        ),
        (
            Source::User,
            "http",
            "post",
            "https://example.com/",
            Outcome::Allow,
            "Medium-risk sink with TRUSTED integrity",
        ),
        (
            Source::Credential,
            "http",
            "post",
            "https://example.com/",
            Outcome::Block,
            "SECRET confidentiality → egress sink = BLOCK",
        ),
    ] {
        let decision = decide(&gate, source, tool, action, target, json!({}));
        assert_eq!(
            (decision.outcome, decision.reason.as_str()),
            (outcome, reason)
        );
        let trace = &decision.evaluation_trace;
        assert_eq!(trace[0], format!("policy_hash: {}", gate.policy_hash()));
        assert_eq!(
            *trace.last().unwrap(),
            format!("final_decision: {}", outcome.name())
        );
    }
}

#[test]
fn data_that_nobody_knows_is_blocked() {
    let (gate, node) = (gate(), NodeId("0".repeat(32)));
    let call = Call {
        caller: "gate",
        tool: "filesystem",
        action: "read",
        target: "/tmp/a",
        arguments: &Value::Null,
        node: &node,
    };
    let decision = gate.decide(&Graph::default(), &call);
    assert_eq!(decision.outcome, Outcome::Block);
    assert_eq!(
        decision.reason,
        format!("Provenance node not found: {}", node.0)
    );
    assert_eq!(decision.provenance.label, None);
}

#[test]
fn sensitive_data_is_not_written_to_memory_that_more_people_see() {
    let gate = gate();
    let write = |source, arguments| decide(&gate, source, "memory", "write", "a", arguments);
    let widened = write(Source::Credential, json!({ "scope": "org" }));
    let claimed = write(
        Source::Credential,
        json!({ "scope": "org", "source_scope": "org" }),
    );
    assert_eq!(claimed.outcome, Outcome::Block);
    assert_eq!(
        widened.reason,
        "Declassify token required for sensitive cross-scope memory write"
    );
    assert_eq!(
        write(Source::User, json!({ "scope": "org" })).outcome,
        Outcome::Allow
    );
    assert_eq!(write(Source::Credential, json!({})).outcome, Outcome::Allow);
    for wrong in [json!({ "scope": "all" }), json!({ "scope": 1 })] {
        assert!(
            write(Source::User, wrong)
                .reason
                .starts_with("Invalid memory scope")
        );
    }
}

#[test]
fn the_policys_hash_is_over_all_that_decides() {
    let base = gate();
    let changed: [fn(&mut Gate); 4] = [
        |gate| gate.settings.others = json!({ "ttl": 1 }),
        |gate| {
            gate.grants.add(
                "bash",
                "exec",
                Grant {
                    capability: Capability::Ipc,
                    allow: vec!["*".into()],
                    deny: Vec::new(),
                },
            );
        },
        |gate| gate.rules = Rules::read("permit (principal, action, resource);").unwrap(),
        |gate| {
            let sink = gate.sinks.get("bash", "exec").unwrap().clone();
            gate.sinks.add(Sink {
                risk: Risk::Low,
                ..sink
            });
        },
    ];
    for change in changed {
        let mut gate = gate();
        change(&mut gate);
        assert_ne!(gate.policy_hash(), base.policy_hash());
    }
}

#[test]
fn a_policy_that_is_not_the_expected_one_blocks_everything() {
    let mut gate = gate();
    gate.settings.expected_policy_hash = Some(gate.policy_hash());
    let read = |gate: &Gate| {
        decide(
            gate,
            Source::User,
            "filesystem",
            "read",
            "/tmp/a",
            json!({}),
        )
    };
    assert_eq!(read(&gate).outcome, Outcome::Allow);
    gate.settings.expected_policy_hash = Some("0".repeat(64));
    let blocked = read(&gate);
    assert_eq!(blocked.outcome, Outcome::Block);
    assert!(
        blocked
            .reason
            .starts_with("Startup policy verification failed:")
    );
}
