//! The same is decided as if Cedar were asked about all rules.

use proptest::prelude::*;

use super::*;
use crate::rules::{Kind, Rules, RunFacts};

/// A condition, some of which say first what a rule is found by, and some of which can fail.
fn condition() -> impl Strategy<Value = String> {
    let name = || prop::sample::select(vec!["a", "b", "c"]);
    let attribute = prop::sample::select(vec!["user", "program", "model", "tools"]);
    let comparison =
        (attribute, name(), any::<bool>()).prop_map(|(attribute, value, is_left)| match is_left {
            true => format!("context.{attribute} == \"{value}\""),
            false => format!("\"{value}\" == context.{attribute}"),
        });
    let word = name().prop_map(|word| format!("context.words.contains(\"{word}\")"));
    let sum = (0..3_i64)
        .prop_map(|number| format!("context.file_bytes * 9000000000000000000 > {number}"));
    let one = prop_oneof![4 => comparison, 2 => word, 1 => sum].boxed();
    let two = (one.clone(), one.clone());
    prop_oneof![
        2 => one,
        2 => two.clone().prop_map(|(left, right)| format!("{left} && {right}")),
        1 => two.clone().prop_map(|(left, right)| format!("{left} || {right}")),
        1 => two.prop_map(|(left, right)| format!("!({left}) && {right}")),
    ]
}

fn rule() -> impl Strategy<Value = String> {
    let head = prop::sample::select(vec![
        "permit",
        "forbid",
        "forbid",
        "@outcome(\"step_up\") forbid",
    ]);
    let principal = prop_oneof![
        3 => Just("principal".to_owned()),
        1 => prop::sample::select(vec!["cn:a", "cn:b"])
            .prop_map(|name| format!("principal == Polydev::Caller::\"{name}\"")),
    ];
    let action = prop::sample::select(vec![
        r#"action == Polydev::Action::"command""#,
        r#"action in [Polydev::Action::"command", Polydev::Action::"prompt"]"#,
    ]);
    let word = prop::sample::select(vec!["when", "when", "unless"]);
    (head, principal, action, word, condition()).prop_map(
        |(head, principal, action, word, condition)| {
            format!("{head} ({principal}, {action}, resource) {word} {{ {condition} }};\n")
        },
    )
}

prop_compose! {
    fn facts()(
        caller in prop::sample::select(vec!["cn:a", "cn:b", "cn:c"]),
        user in "[a-d]", model in "[a-d]", tools in "[a-d]",
        argv in prop::collection::vec("[a-d]", 1..3),
        is_prompt in any::<bool>(), file_bytes in 0..3_u64,
    ) -> RunFacts {
        let kind = if is_prompt { Kind::Prompt } else { Kind::Command };
        let mut facts: RunFacts = serde_json::from_value(serde_json::json!({
            "caller": caller, "user": user, "provider": "openai", "kind": kind, "model": model,
            "tools": tools, "file_bytes": file_bytes,
        })).unwrap();
        if kind == Kind::Command {
            facts.argv = argv;
        }
        facts
    }
}

/// Which rules apply, by Cedar alone.
fn plain(policies: &[Policy], question: &Question) -> Result<Vec<String>, ()> {
    let set = PolicySet::from_policies(policies.iter().cloned()).unwrap();
    sorted(matched(&set, question))
}

fn sorted(applying: Result<Vec<PolicyId>, String>) -> Result<Vec<String>, ()> {
    let applying = applying.map_err(|_| ())?;
    let mut names: Vec<_> = applying.iter().map(ToString::to_string).collect();
    names.sort();
    Ok(names)
}

proptest! {
    #[test]
    fn rules_that_are_left_out_would_not_apply(
        texts in prop::collection::vec(rule(), 1..12),
        facts in prop::collection::vec(facts(), 1..6),
    ) {
        let rules = Rules::read(&texts.concat()).unwrap();
        let of = |effect, outcome| {
            let all = rules.all.values().map(|(_, policy)| policy.clone());
            let own = all.filter(|policy| {
                policy.effect() == effect && policy.annotation("outcome") == outcome
            });
            own.collect::<Vec<_>>()
        };
        for facts in facts {
            let question = facts.question().unwrap();
            for (index, outcome) in [(&rules.blocks, None), (&rules.approvals, Some("step_up"))] {
                let all = of(cedar_policy::Effect::Forbid, outcome);
                prop_assert_eq!(sorted(index.applying(&question)), plain(&all, &question));
            }
        }
    }
}

#[test]
fn rules_are_found_by_what_they_compare_first() {
    let rule = |text: &str| {
        let rules = Rules::read(&format!("@id(\"it\") {text}")).unwrap();
        let (_, policy) = rules
            .all
            .values()
            .find(|(_, policy)| policy.id().to_string() == "it")
            .unwrap();
        first_comparison(policy)
    };
    let found = |of, name, value: &str| Some((Key::Text(of, name), value.to_owned()));
    let command = "forbid (principal, action == Polydev::Action::\"command\", resource)";
    assert_eq!(
        rule("forbid (principal == Polydev::Caller::\"cn:a\", action, resource);"),
        Some((Key::Principal, "cn:a".to_owned()))
    );
    assert_eq!(
        rule(&format!(
            "{command} when {{ context.user == \"a\" && context.stdin }};"
        )),
        found("context", "user", "a")
    );
    assert_eq!(
        rule(
            "forbid (principal, action == Polydev::Action::\"tool\", resource) when { resource.tool == \"shell\" };"
        ),
        found("resource", "tool", "shell")
    );
    for other in [
        "when { context.user != \"a\" }",
        "unless { context.user == \"a\" }",
        "when { context.user == \"a\" || context.stdin }",
        "when { context.work_dir == \"/a\" }",
        "when { context.user == context.program }",
    ] {
        assert_eq!(rule(&format!("{command} {other};")), None, "{other}");
    }
}
