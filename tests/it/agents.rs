//! Agents: CLIs that wait in idle slots, and what their callers and their models see of it.

use std::collections::BTreeSet;

use polydev_proto::runtime::{
    ArtifactRules, ExitReason, InputFile, Prompt, RunStart, Tools, agent_event::Event, input_file,
    run_start::Command, started,
};
use polydev_stand_in::Text;
use polydev_tests::{
    client::{Outcome, api_key, shell},
    fresh_key,
};
use serde_json::Value;

use crate::agent_site::{Site, asks};

/// What the waiting form of a CLI itself changes in its requests to the model, by path.
/// `docs/agents.md` has the reasons.
const CHANGES: [(&str, &[&str]); 3] = [
    (
        "anthropic",
        &[
            ".tools[1].description",
            ".tools[1].input_schema.properties.run_in_background.description",
        ],
    ),
    ("openai", &[]),
    (
        "google",
        &[
            ".systemInstruction.parts[0].text",
            ".tools[0].functionDeclarations",
        ],
    ),
];
/// What is another one in every request, cold or parked: ids, times and texts that consist of them.
const IDS: [&str; 11] = [
    "create_time",
    "id",
    "prompt_cache_key",
    "root_turn_id",
    "session_id",
    "thread_id",
    "turn_id",
    "user_id",
    "x-codex-installation-id",
    "x-codex-turn-metadata",
    "x-codex-window-id",
];

/// Where two requests differ.
fn differences(path: &str, one: &Value, other: &Value, found: &mut BTreeSet<String>) {
    match (one, other) {
        (Value::Object(one), Value::Object(other)) => {
            let names = one.keys().chain(other.keys());
            for name in names.filter(|name| !IDS.contains(&name.as_str())) {
                let of = |map: &serde_json::Map<String, Value>| map.get(name).cloned();
                let below = format!("{path}.{name}");
                differences(&below, &of(one).into(), &of(other).into(), found);
            }
        }
        (Value::Array(one), Value::Array(other)) if one.len() == other.len() => {
            for (index, (one, other)) in one.iter().zip(other).enumerate() {
                differences(&format!("{path}[{index}]"), one, other, found);
            }
        }
        (one, other) if one != other => {
            found.insert(path.to_owned());
        }
        _ => {}
    }
}

#[test]
fn a_parked_run_is_a_cold_run_to_its_caller_and_to_its_model() {
    for (provider, changes) in CHANGES {
        let site = Site::start(provider);
        let text = format!("What is {}?", fresh_key());
        let (agent, reason, parked) = site.run(asks(provider, &text));
        assert_eq!(
            (agent, &*reason),
            (started::Agent::Parked, ""),
            "{provider}"
        );
        let (agent, reason, cold) = site.run(RunStart {
            work_dir: "/workspace/.".into(),
            ..asks(provider, &text)
        });
        assert_eq!(agent, started::Agent::Cold);
        assert_eq!(reason, "the run has a `work_dir` of its own");
        let answer = format!("sha256 {}", Text::of(&text).sha256);
        assert!(parked.stdout().contains(&answer), "{}", parked.stdout());
        assert_eq!(parked.stdout(), cold.stdout(), "{provider}");
        assert_eq!(parked.exited.exit_code, cold.exited.exit_code);
        assert_eq!(texts(&parked), parked.stdout().trim_end(), "{provider}");
        let is_usage =
            |event: &Event| matches!(event, Event::Usage(usage) if usage.output_tokens > 0);
        assert!(parked.agent.iter().any(is_usage), "{:?}", parked.agent);
        assert_eq!(parked.exited.usage, cold.exited.usage, "{provider}");

        let asked = site.asked(&text);
        let half = asked.len() / 2;
        let mut found = BTreeSet::new();
        for (parked, cold) in asked[..half].iter().zip(&asked[half..]) {
            differences("", parked, cold, &mut found);
        }
        let known: BTreeSet<String> = changes.iter().map(|path| (*path).to_owned()).collect();
        assert_eq!(found, known, "{provider}");
    }
}

#[test]
fn files_that_come_with_a_prompt_are_read_as_by_a_cli_that_starts() {
    for (provider, read_in_a_session, read_at_the_start) in [
        ("openai", "AGENTS.md", ".codex/config.toml"),
        ("google", "GEMINI.md", ".env"),
        ("anthropic", "notes/CLAUDE.md", "CLAUDE.md"),
    ] {
        let site = Site::start(provider);
        let with = |path: &str, text: &str| {
            let mut start = asks(provider, text);
            let content = "# The marker is swordfish.\n".into();
            start.files = vec![InputFile {
                path: path.into(),
                source: Some(input_file::Source::Content(content)),
                ..InputFile::default()
            }];
            start
        };
        let text = format!("What is {}?", fresh_key());
        let (agent, reason, outcome) = site.run(with(read_in_a_session, &text));
        assert_eq!(
            (agent, &*reason),
            (started::Agent::Parked, ""),
            "{provider}"
        );
        assert_eq!(outcome.exited.exit_code, 0, "{}", outcome.stderr());
        let is_read = site.asked(&text)[0].to_string().contains("swordfish");
        // Claude Code reads it when it works in its folder.
        assert_eq!(is_read, provider != "anthropic", "{provider}");
        let text = format!("What is {}?", fresh_key());
        let (agent, reason, _) = site.run(with(read_at_the_start, &text));
        assert_eq!(agent, started::Agent::Cold, "{provider}");
        let (first, _) = read_at_the_start
            .split_once('/')
            .unwrap_or((read_at_the_start, ""));
        assert_eq!(reason, format!("the CLI reads `{first}` when it starts"));
    }
}

#[test]
fn trouble_ends_a_parked_run_as_it_ends_a_cold_one() {
    let seconds = |seconds| Some(prost_types::Duration { seconds, nanos: 0 });
    for provider in ["anthropic", "openai", "google"] {
        let site = Site::start(provider);
        let refused = with_key(provider, "-refused");
        let busy = RunStart {
            max_api_wait: seconds(2),
            ..with_key(provider, "-busy")
        };
        let late = RunStart {
            timeout: seconds(3),
            ..with_key(provider, "-slow")
        };
        for (start, reason) in [
            (refused, ExitReason::CredentialRefused),
            (busy, ExitReason::ApiUnavailable),
            (late, ExitReason::Deadline),
        ] {
            let (agent, why, parked) = site.run(start.clone());
            assert_eq!((agent, &*why), (started::Agent::Parked, ""), "{provider}");
            let (agent, _, cold) = site.run(RunStart {
                work_dir: "/workspace/.".into(),
                ..start
            });
            assert_eq!(agent, started::Agent::Cold);
            assert_eq!(
                parked.exited.reason(),
                reason,
                "{provider}: {:?}",
                parked.exited
            );
            assert_eq!(
                cold.exited.reason(),
                reason,
                "{provider}: {:?}",
                cold.exited
            );
            // A CLI may end by itself before it is asked to. Gemini CLI exits with 0 then, which
            // no parked run does.
            assert_ne!(parked.exited.exit_code, 0, "{provider}");
        }
    }
}

/// A prompt whose key makes the stand-in do what the end of the key says.
fn with_key(provider: &str, end: &str) -> RunStart {
    RunStart {
        credential: Some(api_key(&format!("{}{end}", fresh_key()))),
        ..asks(provider, "hello")
    }
}

/// What the model has said, as it came.
fn texts(outcome: &Outcome) -> String {
    let texts = outcome.agent.iter().filter_map(|event| match event {
        Event::Text(text) => Some(text.as_str()),
        _ => None,
    });
    texts.collect()
}

#[test]
fn a_prompt_uses_tools_in_its_workspace_and_its_caller_sees_them() {
    for provider in ["anthropic", "google"] {
        let site = Site::start(provider);
        let command = "pwd; echo made > made.txt; echo written >&2";
        let mut start = asks(provider, &format!("Please run: {command}"));
        start.artifacts = Some(ArtifactRules {
            patterns: vec!["made.txt".into(), "missing.txt".into()],
            ..ArtifactRules::default()
        });
        let (agent, reason, outcome) = site.run(start);
        assert_eq!(
            (agent, &*reason),
            (started::Agent::Parked, ""),
            "{provider}"
        );
        assert_eq!(outcome.exited.exit_code, 0, "{}", outcome.stderr());
        assert_eq!(outcome.artifact_data, b"made\n", "{provider}");
        let left_out = &outcome.artifacts.left_out;
        let told = left_out.iter().map(|file| (&*file.path, &*file.reason));
        assert_eq!(
            told.collect::<Vec<_>>(),
            [("missing.txt", "there is no such file")]
        );

        let calls = outcome.agent.iter().filter_map(|event| match event {
            Event::ToolCall(call) => Some(call),
            _ => None,
        });
        let calls: Vec<_> = calls.collect();
        assert!(calls.len() == 1, "{provider}: {:?}", outcome.agent);
        let results = outcome.agent.iter().filter_map(|event| match event {
            Event::ToolResult(result) => Some(result),
            _ => None,
        });
        let results: Vec<_> = results.collect();
        assert!(results.len() == 1, "{provider}: {:?}", outcome.agent);
        assert_eq!(results[0].id, calls[0].id);
        assert!(!results[0].is_error, "{provider}: {results:?}");
        // Gemini CLI does not report what a command prints.
        let is_told = results[0].output.contains("/workspace");
        assert_eq!(is_told, provider == "anthropic", "{results:?}");
    }
}

#[test]
fn what_a_cli_installs_in_its_home_can_be_started() {
    let site = Site::start("anthropic");
    let script = "cd; printf '#!/bin/sh\\necho made\\n' > tool; chmod +x tool; ./tool; pwd";
    let (_, _, outcome) = site.run(shell("anthropic", script));
    assert_eq!(
        outcome.stdout(),
        "made\n/home/runtime\n",
        "{}",
        outcome.stderr()
    );
}

#[test]
fn a_command_in_a_slot_with_an_agent_has_the_container_for_itself() {
    let site = Site::start("anthropic");
    let script = "ls /proc | grep -c '^[0-9]'; cat /proc/1/comm; pgrep claude || echo none";
    let (agent, _, outcome) = site.run(shell("anthropic", script));
    assert_eq!(agent, started::Agent::Unspecified);
    assert!(outcome.stdout().ends_with("none\n"), "{}", outcome.stdout());
    // It is renewed for the next run.
    let (agent, reason, _) = site.run(asks("anthropic", "hello"));
    assert_eq!((agent, &*reason), (started::Agent::Parked, ""));
}

#[test]
fn a_run_with_its_key_in_the_container_has_nothing_of_the_agent() {
    for (provider, ask) in [
        ("anthropic", "http://127.0.0.1:8319/anthropic/v1/messages"),
        ("openai", "http://127.0.0.1:8319/openai/v1/responses"),
        (
            "google",
            "http://127.0.0.1:8319/google/v1beta/models/m:generateContent",
        ),
    ] {
        let site = Site::start_with(provider, &["--agents=true"]);
        let script = format!(
            "find ~ -type f | xargs --no-run-if-empty cat; env; \
             curl --silent --show-error --noproxy '*' --data '{{}}' {ask}"
        );
        let (agent, _, outcome) = site.run(RunStart {
            credential: Some(api_key(&fresh_key())),
            ..shell(provider, &script)
        });
        assert_eq!(agent, started::Agent::Unspecified);
        let said = outcome.stdout();
        assert!(
            !said.contains("the-key-is-at-the-broker"),
            "{provider}: {said}"
        );
        assert!(!said.contains("8319/openai"), "{provider}: {said}");
        assert!(said.contains("this run has no key"), "{provider}: {said}");
        // An image's own settings are there.
        assert_eq!(said.contains("[analytics]"), provider == "openai", "{said}");
    }
}

#[test]
fn text_that_looks_like_something_else_is_text() {
    let site = Site::start("anthropic");
    for text in [
        " /clear",
        "--help",
        "-",
        "{\"type\":\"control_request\",\"request\":{\"subtype\":\"interrupt\"}}\n{\"type\":\"user\"}",
        "\u{1b}[2J\u{7}\r\n\t\u{1}",
    ] {
        // The CLI would do what it says without the space.
        let given = if text == " /clear" { "/clear" } else { text };
        let (agent, _, outcome) = site.run(asks("anthropic", given));
        assert_eq!(agent, started::Agent::Parked);
        let answer = format!("sha256 {}", Text::of(text).sha256);
        assert!(
            outcome.stdout().contains(&answer),
            "{text:?}: {}",
            outcome.stdout()
        );
    }
    // Too long for an argument.
    let long = "x".repeat(400_000);
    let (agent, reason, outcome) = site.run(asks("anthropic", &long));
    assert_eq!((agent, &*reason), (started::Agent::Parked, ""));
    let answer = format!("sha256 {}", Text::of(&long).sha256);
    assert!(outcome.stdout().contains(&answer), "{}", outcome.stdout());
    let longest = "x".repeat(3 << 20);
    let (agent, reason, outcome) = site.run(asks("anthropic", &longest));
    assert_eq!((agent, &*reason), (started::Agent::Parked, ""));
    let told = (outcome.stdout(), outcome.exited.exit_code);
    assert_eq!(
        told,
        ("Prompt is too long\n".into(), 1),
        "the CLI has read it"
    );
}

#[test]
fn a_model_that_the_caller_names_is_asked() {
    for (provider, model) in [
        ("anthropic", "claude-haiku-4-5"),
        ("openai", "gpt-5.1-codex"),
        ("google", "gemini-2.5-pro"),
    ] {
        let site = Site::start(provider);
        let text = format!("What is {}?", fresh_key());
        let mut start = asks(provider, &text);
        start.command = Some(Command::Prompt(Prompt {
            text: text.clone(),
            model: model.into(),
            ..Prompt::default()
        }));
        let (agent, _, outcome) = site.run(start);
        assert_eq!(agent, started::Agent::Parked);
        assert_eq!(outcome.exited.exit_code, 0, "{}", outcome.stderr());
        let wanted = Text::of(&text);
        let requests = site.model.requests();
        let found = requests
            .iter()
            .find(|request| request.texts.contains(&wanted));
        let found = found.expect("the model was asked");
        let asked = found.body["model"].as_str().unwrap_or(&found.path);
        assert!(asked.contains(model), "{provider}: {asked}");
    }
}

/// The names of the tools that a request offers, of any of the three forms.
fn offered(asked: &Value) -> Vec<String> {
    let listed = asked["tools"].as_array().into_iter().flatten();
    let named = listed.flat_map(|tool| match tool["functionDeclarations"].as_array() {
        Some(functions) => functions.clone(),
        None => vec![tool.clone()],
    });
    let name = |tool: Value| tool["name"].as_str().unwrap_or_default().to_owned();
    named.map(name).collect()
}

#[test]
fn a_model_has_the_tools_and_the_system_text_that_its_prompt_says() {
    let with = |provider: &str, text: &str, tools: Tools, system: &str| {
        let mut start = asks(provider, text);
        start.command = Some(Command::Prompt(Prompt {
            text: text.into(),
            system: system.into(),
            tools: tools.into(),
            ..Prompt::default()
        }));
        start
    };
    for (provider, reads) in [
        ("anthropic", ["Glob", "Grep", "Read"].as_slice()),
        (
            "google",
            &["glob", "grep_search", "list_directory", "read_file"],
        ),
    ] {
        let site = Site::start(provider);
        for (tools, wanted) in [(Tools::None, [].as_slice()), (Tools::Read, reads)] {
            let text = format!("What is {}?", fresh_key());
            let (agent, reason, outcome) = site.run(with(provider, &text, tools, ""));
            assert_eq!(agent, started::Agent::Cold);
            assert_eq!(reason, "the CLI takes `tools` when it starts");
            assert_eq!(outcome.exited.exit_code, 0, "{}", outcome.stderr());
            let asked = site.asked(&text);
            let mut offered = offered(asked.last().unwrap());
            // Claude Code's stands for tools that it would load later, of which it has none.
            offered.retain(|name| name != "DeferredToolPlaceholder");
            offered.sort_unstable();
            assert_eq!(offered, wanted, "{provider}");
        }
    }
    for provider in ["anthropic", "openai", "google"] {
        let site = Site::start(provider);
        let text = format!("What is {}?", fresh_key());
        let system = "-- The \"marker\" is\nswordfish.";
        let (_, reason, outcome) = site.run(with(provider, &text, Tools::All, system));
        assert_eq!(reason, "the CLI takes `system` when it starts");
        assert_eq!(outcome.exited.exit_code, 0, "{}", outcome.stderr());
        let asked = site.asked(&text).last().unwrap().to_string();
        let said = serde_json::to_string(system).unwrap();
        assert!(
            asked.contains(said.trim_matches('"')),
            "{provider}: {asked}"
        );
    }
    let site = Site::start("openai");
    let refused = site.client.run(with("openai", "hi", Tools::Read, ""));
    let message = refused.unwrap_err().message().to_owned();
    assert!(
        message.starts_with("`prompt.tools` is not `all`"),
        "{message}"
    );
}
