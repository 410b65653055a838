//! Calls of tools that wait for an answer.

use polydev_proto::init::{
    Prompt, Start, ToolAnswer, ToolCall, from_init, hello, not_started::Reason, to_init,
};

use crate::{
    agent::{code, parked_in, prompt},
    init::{Link, shell},
};

/// The call of the CLI.
fn called(link: &mut Link) -> ToolCall {
    loop {
        match link.next() {
            from_init::Message::ToolCall(call) => return call,
            from_init::Message::Started(_)
            | from_init::Message::Agent(_)
            | from_init::Message::StdinAck(_) => {}
            other => panic!("{other:?}"),
        }
    }
}

fn answer(link: &mut Link, number: u64, allowed: bool) {
    link.send(to_init::Message::ToolAnswer(ToolAnswer {
        number,
        allowed,
        reason: "because".into(),
        ..ToolAnswer::default()
    }));
}

#[test]
fn a_call_waits_for_its_answer_over_a_connection_that_breaks() {
    for (allowed, said) in [(true, "allow\n"), (false, "deny\n")] {
        let (init, mut link, _) = parked_in("uses", true);
        link.send(to_init::Message::Start(prompt("hello").into()));
        let call = called(&mut link);
        assert_eq!((call.number, &*call.name), (1, "Bash"));
        assert_eq!(call.arguments, "{\"command\":\"touch x\"}");
        assert!(call.entered.is_empty());
        drop(link);
        let (mut link, state) = init.connect();
        assert!(matches!(state, hello::State::Running(_)));
        assert_eq!(called(&mut link), call);
        // No such call.
        answer(&mut link, 7, !allowed);
        answer(&mut link, 1, allowed);
        let mut stdout = Vec::new();
        link.finish(&mut stdout);
        assert_eq!(String::from_utf8(stdout).unwrap(), said);
    }
}

#[test]
fn only_an_agent_has_the_run() {
    let refused = |start: Start, why: &str| {
        let (_init, mut link, _) = parked_in("", true);
        link.send(to_init::Message::Start(start.into()));
        let refused = loop {
            match link.next() {
                from_init::Message::NotStarted(refused) => break refused,
                from_init::Message::Agent(_) => {}
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(refused.reason(), Reason::Invalid);
        assert!(refused.message.contains(why), "{}", refused.message);
    };
    refused(shell("true"), "runs prompts alone");
    let cold = Prompt {
        text: "hello".into(),
        cold_reason: "the run has a `terminal`".into(),
        ..Prompt::default()
    };
    let start = Start {
        prompt: Some(cold),
        ..shell("echo cold")
    };
    refused(start, "needs an agent: the run has a `terminal`");
}

#[test]
fn a_cli_that_has_used_a_tool_unasked_is_ended() {
    for (asks, status) in [(true, 1), (false, 0)] {
        let (_init, mut link, _) = parked_in("unasked", asks);
        link.send(to_init::Message::Start(prompt("hello").into()));
        let exited = link.finish(&mut Vec::new());
        assert_eq!(exited.status, code(status), "{asks}");
    }
}
