//! Agents, with a program in the place of a CLI: it speaks Claude Code's lines, and has faults
//! that the CLI does not have on demand.

use std::{fs, os::unix::fs::PermissionsExt, time::Duration};

use polydev_proto::init::{
    self, Exited, Form, Park, Prompt, Start, agent::State, exited, from_init, hello, to_init,
};

use crate::init::{Init, Link, shell};

/// Answers as Claude Code does. `$FAULT` is what it does when it is asked.
const CLI: &str = r#"#!/bin/bash
say() { printf '%s\n' "$1"; }
answer() { say "{\"type\":\"control_response\",\"response\":{\"subtype\":\"success\",\"request_id\":\"$1\",\"response\":{}}}"; }
while IFS= read -r line; do
    case $line in
        *'"initialize"'*) answer initialize ;;
        *'"side_question"'*)
            case $FAULT in
                never-ready) echo 'the model is not there' >&2; exit 4 ;;
                deaf) answer rehearse; exec sleep 60 ;;
                *) answer rehearse ;;
            esac ;;
        *'"mcp_status"'*) answer check ;;
        *'"user"'*)
            case $FAULT in
                dies) exit 5 ;;
                killed) kill -KILL $$ ;;
                silent) exit 0 ;;
                garbage) say 'no JSON {'; say '{"type":"unknown","x":[]}'; say '[1]' ;;
                asks) say '{"type":"control_request","request_id":"r","request":{"subtype":"can_use_tool"}}'
                    IFS= read -r line; echo "$line" >&2 ;;
                uses) say '{"type":"control_request","request_id":"q","request":{"subtype":"hook_callback","tool_use_id":"t1","input":{"tool_name":"Bash","tool_input":{"command":"touch x"}}}}'
                    IFS= read -r answered
                    said=${answered#*'"permissionDecision":"'}; said=${said%%'"'*}
                    say "{\"type\":\"result\",\"is_error\":false,\"result\":\"$said\"}"; continue ;;
                unasked) say '{"type":"user","message":{"content":[{"type":"tool_result","tool_use_id":"t1","content":"made"}]},"parent_tool_use_id":null}' ;;
                endless) while :; do printf '%01048576d' 0; done ;;
                waits) trap 'exit 0' TERM; sleep 60 & wait ;;
            esac
            text=${line#*'"content":"'}; text=${text%%'"'*}
            say "{\"type\":\"result\",\"is_error\":false,\"result\":\"heard $text, ${#line} bytes\"}" ;;
    esac
done
"#;

/// An init whose agent has said that it waits, or that it is gone.
fn parked(fault: &str) -> (Init, Link, init::Agent) {
    parked_in(fault, false)
}

/// The same in a pool in which tools may wait for answers.
pub(crate) fn parked_in(fault: &str, asks: bool) -> (Init, Link, init::Agent) {
    let init = Init::start_with(|command, folder| {
        let program = folder.join("claude");
        fs::write(&program, CLI).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let path = std::env::var("PATH").unwrap();
        command.env("PATH", format!("{}:{path}", folder.display()));
        command.env("FAULT", fault);
    });
    let (mut link, state) = init.connect();
    assert!(matches!(
        state,
        hello::State::Waiting(init::Waiting { agent: None })
    ));
    link.send(to_init::Message::Park(Park {
        provider: "anthropic".into(),
        work_dir: folder(&init).into(),
        imports: vec![],
        asks,
    }));
    let agent = loop {
        match link.next() {
            from_init::Message::Agent(agent) if agent.state() == State::Starting => {}
            from_init::Message::Agent(agent) => break agent,
            other => panic!("{other:?}"),
        }
    };
    (init, link, agent)
}

fn folder(init: &Init) -> &str {
    init.folder.path().to_str().unwrap()
}

pub(crate) fn prompt(text: &str) -> Start {
    Start {
        prompt: Some(Prompt {
            text: text.into(),
            ..Prompt::default()
        }),
        ..shell("echo cold")
    }
}

/// Runs it to its end: its form, its stdout, and how it ended.
fn run(link: &mut Link, start: Start) -> (Option<Form>, String, Exited) {
    link.send(to_init::Message::Start(start.into()));
    let form = loop {
        match link.next() {
            from_init::Message::Started(started) => break started.form,
            // It was on its way.
            from_init::Message::Agent(_) => {}
            other => panic!("{other:?}"),
        }
    };
    let mut stdout = Vec::new();
    let exited = link.finish(&mut stdout);
    (form, String::from_utf8(stdout).unwrap(), exited)
}

#[track_caller]
fn is_parked(form: Option<Form>) {
    let parked = Form {
        parked: true,
        reason: String::new(),
    };
    assert_eq!(form, Some(parked));
}

pub(crate) fn code(code: i32) -> Option<exited::Status> {
    Some(exited::Status::Code(code))
}

#[test]
fn an_agent_that_waits_has_the_prompt_and_the_argv_is_not_started() {
    let (_init, mut link, agent) = parked("");
    assert_eq!(agent.state(), State::Ready, "{agent:?}");
    let (form, stdout, exited) = run(&mut link, prompt("hello"));
    is_parked(form);
    assert!(stdout.starts_with("heard hello, "), "{stdout}");
    assert!(stdout.ends_with(" bytes\n"), "{stdout}");
    assert_eq!(exited.status, code(0));
}

#[test]
fn while_it_waits_the_cli_is_stopped() {
    let (init, _link, _) = parked("");
    let is_stopped = || {
        let processes = fs::read_dir("/proc").unwrap().filter_map(Result::ok);
        let mut states = processes.filter_map(|process| {
            let environment = fs::read(process.path().join("environ")).ok()?;
            let ours = format!("PATH={}:", folder(&init));
            let command = fs::read_to_string(process.path().join("cmdline")).ok()?;
            let status = fs::read_to_string(process.path().join("status")).ok()?;
            let is_it = String::from_utf8_lossy(&environment).contains(&ours)
                && command.contains("/claude\0");
            is_it.then(|| status.contains("State:\tT"))
        });
        states.any(|is_stopped| is_stopped)
    };
    let end = std::time::Instant::now() + Duration::from_secs(10);
    while !is_stopped() {
        assert!(std::time::Instant::now() < end, "it is not stopped");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_prompt_too_long_for_an_argument_comes_as_stdin() {
    let (_init, mut link, _) = parked("");
    let text = "x".repeat(100_000);
    let mut start = Start {
        stdin: true,
        ..prompt("")
    };
    start.prompt.as_mut().unwrap().stdin_bytes = 100_000;
    link.send(to_init::Message::Start(start.into()));
    for (number, piece) in text.as_bytes().chunks(50_000).enumerate() {
        link.send(to_init::Message::Stdin(init::Stdin {
            offset: number as u64 * 50_000,
            data: bytes::Bytes::copy_from_slice(piece),
            close: number == 1,
        }));
    }
    let mut stdout = Vec::new();
    let exited = link.finish(&mut stdout);
    assert_eq!(exited.status, code(0));
    assert!(
        stdout.starts_with(format!("heard {text}, ").as_bytes()),
        "{} bytes",
        stdout.len()
    );
}

#[test]
fn a_conversation_has_its_prompts_as_lines_of_stdin() {
    let (_init, mut link, _) = parked("");
    let mut start = Start {
        stdin: true,
        ..prompt("one")
    };
    start.prompt.as_mut().unwrap().conversation = true;
    link.send(to_init::Message::Start(start.into()));
    let said = "{\"prompt\":{\"text\":\"two\"}}\n{}\n{\"prompt\":{\"text\":\"three\"}}\n";
    for (number, piece) in said.as_bytes().chunks(50).enumerate() {
        link.send(to_init::Message::Stdin(init::Stdin {
            offset: number as u64 * 50,
            data: bytes::Bytes::copy_from_slice(piece),
            close: (number + 1) * 50 >= said.len(),
        }));
    }
    let mut stdout = Vec::new();
    let exited = link.finish(&mut stdout);
    assert_eq!(exited.status, code(0));
    let stdout = String::from_utf8(stdout).unwrap();
    let heard: Vec<&str> = stdout
        .lines()
        .filter_map(|line| line.split(',').next())
        .collect();
    assert_eq!(heard, ["heard one", "heard two", "heard three"]);
}

#[test]
fn a_conversation_that_no_agent_can_have_is_not_started() {
    let (_init, mut link, agent) = parked("never-ready");
    assert_eq!(agent.state(), State::Gone);
    let mut start = prompt("one");
    start.prompt.as_mut().unwrap().conversation = true;
    link.send(to_init::Message::Start(start.into()));
    match link.next() {
        from_init::Message::NotStarted(refused) => {
            let why = "a conversation needs an agent: the CLI exited with status 4";
            assert!(refused.message.starts_with(why), "{refused:?}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_argv_ends_the_agent_and_so_does_a_prompt_that_is_not_for_it() {
    let (_init, mut link, _) = parked("");
    let (form, stdout, _) = run(
        &mut link,
        shell("pgrep -P $PPID -f '[a]gent anthropic' || echo gone"),
    );
    assert_eq!((form, &*stdout), (None, "gone\n"));

    let (_init, mut link, _) = parked("");
    let mut start = prompt("hello");
    start.prompt.as_mut().unwrap().cold_reason = "the run has files".into();
    let (form, stdout, _) = run(&mut link, start);
    let cold = Form {
        parked: false,
        reason: "the run has files".into(),
    };
    assert_eq!((form, &*stdout), (Some(cold), "cold\n"));
}

#[test]
fn an_agent_that_cannot_wait_says_why_and_the_prompt_starts_cold() {
    let (_init, mut link, agent) = parked("never-ready");
    assert_eq!(agent.state(), State::Gone);
    let reason = "the CLI exited with status 4; it said: the model is not there";
    assert_eq!(agent.reason, reason);
    let (form, stdout, exited) = run(&mut link, prompt("hello"));
    assert_eq!(form.unwrap().reason, reason);
    assert_eq!((&*stdout, exited.status), ("cold\n", code(0)));
}

#[test]
fn a_cli_that_does_not_answer_when_it_goes_on_is_not_used() {
    let (_init, mut link, agent) = parked("deaf");
    assert_eq!(agent.state(), State::Ready);
    let (form, stdout, _) = run(&mut link, prompt("hello"));
    let form = form.unwrap();
    assert!(
        !form.parked && form.reason.contains("does not answer"),
        "{form:?}"
    );
    assert_eq!(stdout, "cold\n");
}

#[test]
fn a_cli_that_fails_in_the_middle_has_its_own_status() {
    for (fault, status) in [
        ("dies", code(5)),
        ("killed", Some(exited::Status::Signal(9))),
        // It has given no answer, which is no success.
        ("silent", code(1)),
        ("endless", code(1)),
    ] {
        let (_init, mut link, _) = parked(fault);
        let (form, stdout, exited) = run(&mut link, prompt("hello"));
        is_parked(form);
        assert_eq!((&*stdout, exited.status), ("", status), "{fault}");
    }
}

#[test]
fn lines_that_mean_nothing_are_passed_over_and_questions_refused() {
    for fault in ["garbage", "asks"] {
        let (_init, mut link, _) = parked(fault);
        let (form, stdout, exited) = run(&mut link, prompt("hello"));
        is_parked(form);
        assert_eq!(exited.status, code(0), "{fault}");
        assert!(stdout.starts_with("heard "), "{stdout}");
    }
}

#[test]
fn a_prompt_that_is_ended_is_no_success_though_its_cli_exits_with_0() {
    let (_init, mut link, _) = parked("waits");
    let start = Start {
        timeout_ms: 300,
        ..prompt("hello")
    };
    let (form, _, exited) = run(&mut link, start);
    is_parked(form);
    assert!(exited.deadline_exceeded);
    assert_eq!(exited.status, Some(exited::Status::Signal(15)));
}

#[test]
fn a_driver_that_comes_back_hears_of_the_agent_and_of_the_form() {
    let (init, link, _) = parked("waits");
    drop(link);
    let (mut link, state) = init.connect();
    let hello::State::Waiting(waiting) = state else {
        panic!("{state:?}");
    };
    assert_eq!(waiting.agent.unwrap().state(), State::Ready);
    link.send(to_init::Message::Start(prompt("hello").into()));
    assert!(matches!(link.next(), from_init::Message::Started(_)));
    drop(link);
    let (_link, state) = init.connect();
    let hello::State::Running(running) = state else {
        panic!("{state:?}");
    };
    is_parked(running.form);
}
