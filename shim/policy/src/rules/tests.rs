use super::*;
use crate::{
    lattice::{Confidentiality, Integrity, Label},
    sink::Risk,
};

const OPERATOR: &str = r#"
    @id("everybody")
    permit (principal, action, resource is Polydev::Provider);

    @id("no_root")
    @reason("commands of root are not for agents")
    forbid (principal, action == Polydev::Action::"command", resource)
    when { context.words.contains("sudo") };

    @id("long_prompts")
    @outcome("step_up")
    forbid (principal, action == Polydev::Action::"prompt", resource == Polydev::Provider::"openai")
    when { context.text_bytes > 10 };

    @id("alice_only")
    forbid (principal, action, resource == Polydev::Provider::"google")
    unless { principal has user && principal.user == "alice" && context.user == "alice" };
"#;

fn tool(risk: Risk, integrity: Integrity, confidentiality: Confidentiality) -> ToolFacts {
    ToolFacts {
        caller: "cn:a".into(),
        tool: "tool".into(),
        action: "run".into(),
        target: "x".into(),
        risk,
        blocks_untrusted: true,
        blocks_egress: true,
        label: Label {
            integrity,
            confidentiality,
        },
        tags: Vec::new(),
        agent: None,
    }
}

fn run(kind: Kind, provider: &str) -> RunFacts {
    RunFacts {
        caller: "cn:a".into(),
        caller_user: None,
        user: "alice".into(),
        provider: provider.into(),
        kind,
        argv: Vec::new(),
        prompt: String::new(),
        system: String::new(),
        model: String::new(),
        tools: String::new(),
        trusts_files: false,
        conversation: false,
        stdin: false,
        terminal: false,
        env: Vec::new(),
        work_dir: String::new(),
        files: Vec::new(),
        file_bytes: 0,
        timeout_seconds: 600,
        credential: "none".into(),
        egress_listed: false,
        egress: Vec::new(),
    }
}

#[test]
fn the_rules_that_always_hold_decide_by_risk_and_label() {
    use Confidentiality::{Public, Secret, Sensitive};
    use Integrity::{Trusted, Unknown, Untrusted};
    let rules = Rules::builtin();
    for (risk, integrity, confidentiality, outcome, reason) in [
        (
            Risk::Low,
            Untrusted,
            Public,
            Outcome::Allow,
            "Low-risk sink with acceptable provenance",
        ),
        (
            Risk::Medium,
            Trusted,
            Public,
            Outcome::Allow,
            "Medium-risk sink with TRUSTED integrity",
        ),
        (
            Risk::High,
            Trusted,
            Public,
            Outcome::Allow,
            "High-risk sink with TRUSTED integrity",
        ),
        (
            Risk::Critical,
            Trusted,
            Public,
            Outcome::StepUp,
            "CRITICAL risk sink requires explicit user confirmation",
        ),
        (
            Risk::High,
            Unknown,
            Public,
            Outcome::StepUp,
            "high risk + unknown integrity = STEP_UP for safety",
        ),
        (
            Risk::Medium,
            Untrusted,
            Public,
            Outcome::StepUp,
            "UNTRUSTED integrity → medium risk sink = STEP_UP required",
        ),
        (
            Risk::High,
            Untrusted,
            Public,
            Outcome::Block,
            "UNTRUSTED integrity → high risk sink = BLOCK",
        ),
        (
            Risk::Critical,
            Untrusted,
            Public,
            Outcome::Block,
            "UNTRUSTED integrity → critical risk sink = BLOCK",
        ),
        (
            Risk::Low,
            Trusted,
            Sensitive,
            Outcome::StepUp,
            "SENSITIVE confidentiality → egress sink = STEP_UP required",
        ),
        (
            Risk::Low,
            Trusted,
            Secret,
            Outcome::Block,
            "SECRET confidentiality → egress sink = BLOCK",
        ),
        // The stricter one decides, whatever came first.
        (
            Risk::Medium,
            Untrusted,
            Secret,
            Outcome::Block,
            "SECRET confidentiality → egress sink = BLOCK",
        ),
    ] {
        let verdict = rules.tool(&tool(risk, integrity, confidentiality));
        assert_eq!(
            (verdict.outcome, verdict.reason.as_str()),
            (outcome, reason)
        );
    }
}

#[test]
fn rules_of_an_operator_forbid_more_and_allow_nothing_that_is_forbidden() {
    let all = "permit (principal, action, resource);";
    let rules = Rules::read(all).unwrap();
    let untrusted = tool(
        Risk::Critical,
        Integrity::Untrusted,
        Confidentiality::Public,
    );
    assert_eq!(rules.tool(&untrusted).outcome, Outcome::Block);
    let rules = Rules::read("@id(\"none\") forbid (principal, action, resource);").unwrap();
    let verdict = rules.tool(&tool(
        Risk::Low,
        Integrity::Trusted,
        Confidentiality::Public,
    ));
    assert_eq!(
        (verdict.outcome, verdict.rules),
        (Outcome::Block, vec!["none".into()])
    );
}

#[test]
fn a_run_needs_a_rule_that_permits_it() {
    let verdict = Rules::builtin().run(&run(Kind::Prompt, "openai"));
    assert_eq!(
        (verdict.outcome, verdict.reason.as_str()),
        (Outcome::Block, "no rule permits this")
    );
}

#[test]
fn rules_see_callers_commands_and_prompts() {
    let rules = Rules::read(OPERATOR).unwrap();
    let verdict = |change: &dyn Fn(&mut RunFacts), kind, provider| {
        let mut facts = run(kind, provider);
        change(&mut facts);
        let verdict = rules.run(&facts);
        (verdict.outcome, verdict.reason)
    };
    let nothing = |_: &mut RunFacts| {};
    assert_eq!(verdict(&nothing, Kind::Command, "openai").0, Outcome::Allow);
    let sudo = |facts: &mut RunFacts| facts.argv = vec!["sudo".into(), "id".into()];
    let blocked = (Outcome::Block, "commands of root are not for agents".into());
    assert_eq!(verdict(&sudo, Kind::Command, "openai"), blocked);
    let long = |facts: &mut RunFacts| facts.prompt = "x".repeat(11);
    let waits = (Outcome::StepUp, "rule `long_prompts`".into());
    assert_eq!(verdict(&long, Kind::Prompt, "openai"), waits);
    assert_eq!(verdict(&long, Kind::Prompt, "anthropic").0, Outcome::Allow);
    assert_eq!(verdict(&nothing, Kind::Prompt, "google").0, Outcome::Block);
    let alice = |facts: &mut RunFacts| facts.caller_user = Some("alice".into());
    assert_eq!(verdict(&alice, Kind::Prompt, "google").0, Outcome::Allow);
}

#[test]
fn a_rule_that_fails_blocks() {
    let text = "permit (principal, action, resource is Polydev::Provider);
        @id(\"sums\") forbid (principal, action, resource is Polydev::Provider)
        when { context.file_bytes + context.timeout_seconds < 0 };";
    let mut facts = run(Kind::Prompt, "openai");
    let rules = Rules::read(text).unwrap();
    assert_eq!(rules.run(&facts).outcome, Outcome::Allow);
    facts.file_bytes = u64::MAX;
    let verdict = rules.run(&facts);
    assert_eq!(verdict.outcome, Outcome::Block);
    assert!(verdict.reason.contains("overflow"), "{}", verdict.reason);
}

#[test]
fn rules_that_are_not_understood_are_refused() {
    for (text, words) in [
        ("\n\npermit (principal, action);", "are not Cedar: line 3: "),
        (
            "permit (principal, action, resource) when { context.usr == \"a\" };",
            "do not fit the schema: for policy `rule1`",
        ),
        (
            "permit (principal, action == Polydev::Action::\"fly\", resource);",
            "do not fit the schema",
        ),
        (
            "@outcome(\"step_up\") permit (principal, action, resource);",
            "allowed are `block` and `step_up`",
        ),
        (
            "@outcome(\"ask\") forbid (principal, action, resource);",
            "`@outcome(\"ask\")`",
        ),
        (
            "@id(\"low_risk\") forbid (principal, action, resource);",
            "two rules are named `low_risk`",
        ),
        (
            "forbid (principal, action, resource == Polydev::Provider::\"claude\");",
            "do not fit the schema",
        ),
        (
            "permit (principal == ?principal, action, resource);",
            "is a template",
        ),
    ] {
        let refused = Rules::read(text).unwrap_err().to_string();
        assert!(refused.contains(words), "{text}: {refused}");
    }
    let long = "/".repeat(MAX_RULES_TEXT + 1);
    assert_eq!(
        Rules::read(&long).unwrap_err(),
        Error::TooLong(MAX_RULES_TEXT + 1)
    );
}

#[test]
fn the_hash_is_of_the_text() {
    assert_eq!(Rules::builtin().hash(), Rules::read("").unwrap().hash());
    assert_ne!(
        Rules::builtin().hash(),
        Rules::read(OPERATOR).unwrap().hash()
    );
}
