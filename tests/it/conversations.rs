//! Conversations: several prompts to one session of a CLI.

use std::{
    collections::VecDeque,
    io::{BufRead, BufReader, Write},
    process::Stdio,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use polydev_proto::runtime::{
    CloseStdin, ExitReason, Exited, GetPoolRequest, InputFile, Prompt, RunStart, Slot, TurnEnded,
    agent_event, input_file, run_event::Event, run_input::Input, run_start::Command,
};
use polydev_stand_in::Text;
use polydev_tests::{
    broker::brokers,
    client::{Client, Run},
    fresh_key,
    host::Local,
    nomad::Nomad,
    shim::Shim,
    wait_until,
};
use serde_json::json;
use tonic::Code;

use crate::{
    agent_site::{Site, asks},
    survive,
};

const PROVIDERS: [&str; 3] = ["anthropic", "openai", "google"];

/// A conversation whose first prompt this is.
fn talks(provider: &str, text: &str) -> RunStart {
    RunStart {
        stdin: true,
        command: Some(Command::Prompt(Prompt {
            text: text.into(),
            conversation: true,
            ..Prompt::default()
        })),
        ..asks(provider, "-")
    }
}

struct Talk<'a> {
    site: &'a Site,
    run: Run,
    stdout: Vec<u8>,
    /// Told, and not looked at.
    told: VecDeque<agent_event::Event>,
}

impl<'a> Talk<'a> {
    fn start(site: &'a Site, start: RunStart) -> Self {
        site.client.wait_idle(&start.provider, 1);
        Self {
            run: site.client.start(start).expect("it is accepted"),
            site,
            stdout: Vec::new(),
            told: VecDeque::new(),
        }
    }

    fn say(&self, line: &serde_json::Value) {
        self.say_at_once(std::slice::from_ref(line));
    }

    /// The agent has all of them when it reads the first one.
    fn say_at_once(&self, lines: &[serde_json::Value]) {
        let lines: String = lines.iter().map(|line| format!("{line}\n")).collect();
        self.site.client.send(&self.run, Input::Stdin(lines.into()));
    }

    fn ask(&self, text: &str) {
        self.say(&json!({ "prompt": { "text": text } }));
    }

    fn next(&mut self) -> Event {
        let event = self.site.client.next(&mut self.run).expect("an event");
        let event = event.expect("the last event is `exited`");
        if let Event::Stdout(output) = &event {
            self.stdout.extend_from_slice(&output.data);
        }
        event
    }

    /// Waits for the end of the turn. Returns it, and what the agent has told meanwhile.
    fn turn(&mut self) -> (TurnEnded, Vec<agent_event::Event>) {
        let mut told = Vec::new();
        loop {
            match self.told.pop_front() {
                Some(agent_event::Event::TurnEnded(ended)) => return (ended, told),
                Some(other) => told.push(other),
                None => match self.next() {
                    Event::AgentEvents(events) => {
                        let events = events.events.into_iter();
                        self.told.extend(events.filter_map(|event| event.event));
                    }
                    Event::Exited(exited) => panic!("{exited:?}, after {told:?}"),
                    _ => {}
                },
            }
        }
    }

    fn end(&mut self) -> Exited {
        loop {
            if let Event::Exited(exited) = self.next() {
                return exited;
            }
        }
    }

    fn code(&mut self) -> i32 {
        self.turn().0.exit_code
    }
}

#[test]
fn a_further_prompt_remembers_and_a_cancelled_turn_leaves_a_usable_session() {
    for provider in PROVIDERS {
        let site = Site::start(provider);
        let texts: Vec<String> = (0..3)
            .map(|_| format!("What is {}?", fresh_key()))
            .collect();
        let mut talk = Talk::start(&site, talks(provider, &texts[0]));
        let (first, _) = talk.turn();
        assert_eq!((first.exit_code, first.cancelled), (0, false), "{provider}");
        talk.ask(&texts[1]);
        let (second, told) = talk.turn();
        assert_eq!(second.exit_code, 0, "{provider}: {told:?}");
        let asked = site.asked(&texts[1]).last().unwrap().to_string();
        let answer = format!("sha256 {}", Text::of(&texts[0]).sha256);
        for remembered in [&texts[0], &answer] {
            assert!(asked.contains(remembered), "{provider}: {asked}");
        }

        talk.ask("Please wait.");
        site.wait_asked("Please wait.");
        talk.say(&json!({ "cancel_turn": {} }));
        let (cancelled, told) = talk.turn();
        assert!(cancelled.cancelled, "{provider}: {cancelled:?}, {told:?}");
        assert_eq!(cancelled.exit_code, 130, "{provider}");

        talk.say(&json!({ "promt": {} }));
        let (wrong, told) = talk.turn();
        assert_eq!(wrong.exit_code, 2);
        let is_said = |event: &agent_event::Event| matches!(event, agent_event::Event::Error(error) if error.contains("unknown variant `promt`"));
        assert!(told.iter().any(is_said), "{told:?}");

        talk.say_at_once(&[
            json!({ "prompt": { "text": texts[2] } }),
            json!({ "prompt": { "text": "It is cancelled before its turn." } }),
            json!({ "cancel_turn": {} }),
        ]);
        assert_eq!(talk.code(), 0, "{provider}");
        assert_eq!(talk.code(), 130, "{provider}");
        let asked = site.asked(&texts[2]).last().unwrap().to_string();
        assert!(asked.contains(&texts[0]), "{provider}: {asked}");
        assert!(site.asked("It is cancelled before its turn.").is_empty());

        talk.ask(&texts[0]);
        site.client
            .send(&talk.run, Input::CloseStdin(CloseStdin {}));
        let (last, _) = talk.turn();
        let exited = talk.end();
        assert_eq!(
            exited.reason(),
            ExitReason::Exited,
            "{provider}: {exited:?}"
        );
        assert_eq!(exited.exit_code, 0, "{provider}");
        assert_eq!(last.stdout_bytes, exited.stdout_bytes, "{provider}");
        let stdout = String::from_utf8(talk.stdout).unwrap();
        let begin = usize::try_from(first.stdout_bytes).unwrap();
        assert!(stdout[..begin].contains(&answer), "{provider}: {stdout}");
    }
}

#[test]
fn what_no_agent_can_have_is_no_conversation() {
    let site = Site::start("anthropic");
    site.client.wait_idle("anthropic", 1);
    let with = |change: &dyn Fn(&mut RunStart)| {
        let mut start = talks("anthropic", "hello");
        change(&mut start);
        start
    };
    for (start, why) in [
        (with(&|start| start.stdin = false), "`stdin` is `false`"),
        (
            with(&|start| start.work_dir = "/tmp".into()),
            "`prompt.conversation` is `true`; must be false, because an agent cannot have the run: the run has a `work_dir` of its own",
        ),
        (
            with(&|start| start.credential = None),
            "the run has no key at the broker",
        ),
        (
            with(&|start| {
                start.credential_mode = polydev_proto::runtime::CredentialMode::Inject.into();
            }),
            "the run has no key at the broker",
        ),
        (
            talks("anthropic", &"x".repeat(200_000)),
            "`prompt.text` is `longer than 131007 bytes`",
        ),
    ] {
        let refused = site
            .client
            .start(start)
            .map(|run| run.accepted)
            .unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
        assert!(refused.message().contains(why), "{refused}");
    }
    // The slot may have no agent, which only its node knows.
    let site = Site::start_with("anthropic", &["--egress=anthropic="]);
    site.client.wait_idle("anthropic", 1);
    let outcome = site.client.run(talks("anthropic", "hello")).unwrap();
    assert_eq!(outcome.exited.reason(), ExitReason::NotStarted);
    let message = &outcome.exited.message;
    assert!(
        message.contains("a conversation needs an agent: the slot has none"),
        "{message}"
    );
}

#[test]
fn what_a_cli_reads_when_it_starts_is_in_a_conversation_too() {
    for (provider, file) in [
        ("anthropic", "CLAUDE.md"),
        ("openai", "AGENTS.md"),
        ("google", "GEMINI.md"),
    ] {
        let site = Site::start(provider);
        let mut start = talks(provider, "What is one?");
        start.files = vec![InputFile {
            path: file.into(),
            source: Some(input_file::Source::Content(
                "The marker is swordfish.".into(),
            )),
            ..InputFile::default()
        }];
        let Some(Command::Prompt(prompt)) = &mut start.command else {
            panic!("{start:?}");
        };
        prompt.system = "The \"other\" marker is marlin.".into();
        let mut talk = Talk::start(&site, start);
        assert_eq!(talk.code(), 0, "{provider}");
        talk.ask("What is two?");
        assert_eq!(talk.code(), 0, "{provider}");
        let asked = site.asked("What is two?").last().unwrap().to_string();
        for known in ["What is one?", "swordfish", "marlin"] {
            assert!(asked.contains(known), "{provider}: {asked}");
        }
    }
}

#[test]
fn a_conversation_goes_on_for_a_caller_that_attaches_within_a_prompt() {
    let site = Site::start("anthropic");
    let mut talk = Talk::start(&site, talks("anthropic", ""));
    talk.ask("What is one?");
    let (first, _) = talk.turn();
    assert_eq!(first.exit_code, 0);
    let (run_id, read) = (talk.run.accepted.run_id.clone(), talk.stdout.len());
    // Its caller is gone in the middle of a prompt.
    let whole = format!("{}\n", json!({ "prompt": { "text": "What is two?" } }));
    let (begin, rest) = whole.split_at(20);
    site.client
        .send(&talk.run, Input::Stdin(begin.to_owned().into()));
    let taken = wait_until("the beginning", Duration::from_secs(5), || {
        let run = site
            .client
            .attach(&run_id, [read, 0])
            .map_err(|error| error.to_string())?;
        let known = run.accepted.stdin_offset;
        let said = format!("{}\n", json!({ "prompt": { "text": "What is one?" } })).len();
        (known == (said + begin.len()) as u64)
            .then_some(run)
            .ok_or(known.to_string())
    });
    let mut talk = Talk {
        run: taken,
        site: &site,
        stdout: Vec::new(),
        told: VecDeque::new(),
    };
    site.client
        .send(&talk.run, Input::Stdin(rest.to_owned().into()));
    let told = loop {
        let (ended, _) = talk.turn();
        // The first one is told again.
        if ended.stdout_bytes > first.stdout_bytes {
            break ended;
        }
    };
    assert_eq!(told.exit_code, 0);
    let asked = site.asked("What is two?").last().unwrap().to_string();
    assert!(asked.contains("What is one?"), "{asked}");
}

#[test]
fn a_conversation_outlives_its_driver_and_its_broker() {
    let nomad = Nomad::start();
    let shim = Shim::serve(&nomad.address);
    let model = Local::start();
    let url = format!("base_url={}", model.url);
    let variables = ["count=1", "agent=true", "egress=[]", &url];
    let variables = variables.iter().flat_map(|variable| ["-var", *variable]);
    let mut job = vec!["job", "run", "-detach"];
    job.extend(variables);
    job.push("jobspecs/pool-anthropic.nomad.hcl");
    nomad.run(&job);
    let client = shim.client();
    client.wait_idle("anthropic", 1);
    let idle = slot(&client);
    assert!(idle.agent && idle.agent_reason.is_empty(), "{idle:?}");

    let site = Site {
        client,
        shim,
        model,
    };
    let mut talk = Talk::start(&site, talks("anthropic", "What is one?"));
    assert_eq!(talk.code(), 0);
    talk.ask("Please wait.");
    site.wait_asked("Please wait.");
    survive::kill_driver(&nomad);
    talk.say(&json!({ "cancel_turn": {} }));
    assert_eq!(talk.code(), 130);
    talk.ask("What is two?");
    assert_eq!(talk.code(), 0);
    for broker in brokers(&nomad.state_dir()) {
        kill(broker, Signal::SIGKILL).unwrap();
    }
    talk.ask("What is three?");
    assert_eq!(talk.code(), 0);
    let asked = site.asked("What is three?").last().unwrap().to_string();
    for remembered in ["What is one?", "What is two?"] {
        assert!(asked.contains(remembered), "{asked}");
    }
    site.client
        .send(&talk.run, Input::CloseStdin(CloseStdin {}));
    let exited = talk.end();
    assert_eq!(exited.exit_code, 0, "{exited:?}");
    // The slot is filled again, with an agent.
    site.client.wait_idle("anthropic", 1);
    assert!(slot(&site.client).agent);
}

/// The only slot of the pool.
fn slot(client: &Client) -> Slot {
    let request = GetPoolRequest {
        provider: "anthropic".into(),
    };
    let pool = client.call(async |mut shim| shim.get_pool(request).await);
    let pool = pool.expect("the shim answers");
    assert_eq!(pool.slots.len(), 1, "{:?}", pool.slots);
    pool.slots.into_iter().next().expect("a slot")
}

#[test]
fn each_line_at_the_command_line_is_a_prompt_and_an_interrupt_ends_its_answer() {
    let site = Site::start("anthropic");
    site.client.wait_idle("anthropic", 1);
    let mut command = site.shim.command(&["run", "anthropic", "--conversation"]);
    command.env("ANTHROPIC_API_KEY", fresh_key());
    let mut talk = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut stdin, stdout) = (talk.stdin.take().unwrap(), talk.stdout.take().unwrap());
    let mut lines = BufReader::new(stdout).lines().map(Result::unwrap);
    let answer = |text| {
        format!(
            "The stand-in read {} bytes, sha256 {}.",
            Text::of(text).bytes,
            Text::of(text).sha256
        )
    };
    writeln!(stdin, "first").unwrap();
    assert_eq!(lines.next(), Some(answer("first")));
    writeln!(stdin, "Please wait.").unwrap();
    site.wait_asked("Please wait.");
    let pid = Pid::from_raw(talk.id().cast_signed());
    kill(pid, Signal::SIGINT).unwrap();
    writeln!(stdin, "second").unwrap();
    assert_eq!(lines.next(), Some(answer("second")));
    drop(stdin);
    assert_eq!(lines.next(), None);
    assert_eq!(talk.wait().unwrap().code(), Some(0));
}
