use polydev_proto::{
    budget::Used,
    id::UserId,
    runtime::{Argv, InputFile, Prompt, RunStart, Tools, run_start::Command},
};

use polydev_proto::provider::Vendor;

use super::*;

const FILE: &str = r#"
    [[role]]
    members = ["spiffe://acme/controller", "uid:0"]
    may = ["run", "credentials"]
    inject = true

    [[role]]
    members = ["cn:team-?"]
    may = ["run"]
    users = ["team-*"]
    providers = ["openai"]

    [[role]]
    members = ["cn:admin"]
    may = ["scale"]
    providers = ["codex"]

    [[role]]
    members = ["cn:agents"]
    may = ["run"]
    inject = false
"#;

const COMMAND: Action = Action::Run {
    what: What::Command,
    user_id: Some("alice"),
    provider: None,
};

fn caller(name: &str) -> Caller {
    Caller {
        name: name.into(),
        user: None,
        origin: Origin::Process { uid: 0, pid: None },
    }
}

fn load(text: &str) -> Result<Access, Error> {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), text).unwrap();
    Access::load(file.path())
}

#[test]
fn callers_may_do_what_a_role_of_theirs_says_and_nothing_else() {
    let access = load(FILE).unwrap();
    let provider = |name: &str| name.parse::<Provider>().unwrap();
    let may = |name: &str, action| access.check(&caller(name), action).is_ok();
    let run = |user_id, name| Action::Run {
        what: What::Command,
        user_id: Some(user_id),
        provider: Some(provider(name)),
    };
    let everybodys = Action::Run {
        what: What::Command,
        user_id: None,
        provider: None,
    };
    let credentials = |user_id| Action::Credentials {
        user_id: Some(user_id),
        provider: None,
    };
    let of = |user_id| Action::Run {
        what: What::Command,
        user_id: Some(user_id),
        provider: None,
    };
    let scale = |name| Action::Scale {
        provider: provider(name),
    };
    for name in ["spiffe://acme/controller", "uid:0"] {
        assert!(may(name, run("alice", "google")) && may(name, everybodys));
        assert!(may(name, credentials("alice")) && may(name, Action::Look));
        assert!(!may(name, scale("openai")));
    }
    assert!(may("cn:team-a", run("team-alice", "openai")));
    assert!(!may("cn:team-a", run("team-alice", "google")));
    assert!(!may("cn:team-a", of("team-alice")), "of all providers");
    let providers = access.providers_of(&caller("cn:team-a"), "team-alice");
    assert_eq!(providers, [provider("openai")]);
    assert!(!may("cn:team-a", run("alice", "openai")));
    assert!(!may("cn:team-a", everybodys) && !may("cn:team-a", credentials("team-alice")));
    assert!(may("cn:admin", scale("openai")) && !may("cn:admin", scale("google")));
    assert!(may("cn:admin", Action::Look) && !may("cn:admin", run("alice", "openai")));
    for name in ["cn:team-", "cn:team-ab", "uid:00", "loopback", ""] {
        assert!(!may(name, Action::Look), "{name}");
    }
    assert!(
        Access::everything()
            .check(&caller("loopback"), everybodys)
            .is_ok()
    );
}

#[test]
fn a_role_can_keep_credentials_out_of_containers() {
    let access = load(FILE).unwrap();
    let may = |name: &str, is_given| {
        let inject = Action::Inject {
            what: What::Command,
            user_id: "team-alice",
            provider: Provider::Cli(Vendor::OpenAi),
            is_given,
        };
        access.check(&caller(name), inject).is_ok()
    };
    assert!(may("uid:0", true) && may("cn:team-a", true));
    assert!(!may("cn:agents", true) && !may("cn:admin", true));
    // Who has a stored one in a container can read it.
    assert!(!may("cn:team-a", false) && may("uid:0", false));
}

#[test]
fn the_first_role_that_allows_a_run_says_what_holds_for_it() {
    let access = load(
        r#"
        [[role]]
        members = ["cn:agents"]
        may = ["run"]
        providers = ["openai"]
        inject = false
        egress = ["github.com:443"]
        budget = { requests = 10, tokens = 1000 }
        upstream.openai = { base_url = "https://gateway.example/v1/", headers = { x-team = "a" } }

        [[role]]
        members = ["cn:*"]
        may = ["run"]
        "#,
    )
    .unwrap();
    let (alice, used) = (UserId::from("alice"), |requests, tokens| Used {
        requests,
        tokens,
    });
    let policy = |name: &str, provider| {
        let run = Action::Run {
            what: What::Command,
            user_id: Some("alice"),
            provider: Some(provider),
        };
        access.policy(&caller(name), run).unwrap()
    };
    let policy_of_run = policy("cn:agents", Provider::Cli(Vendor::OpenAi));
    let told = policy_of_run
        .of_run(&alice, || used(9, 999))
        .unwrap()
        .unwrap();
    assert_eq!(told.egress.unwrap().allow, ["github.com:443"]);
    assert_eq!(told.upstreams[0].base_url, "https://gateway.example/v1");
    let budget = told.budget.unwrap();
    assert_eq!((budget.requests, budget.used_tokens), (10, 999));
    for (used, words) in [
        (used(10, 0), "10 of 10 requests"),
        (used(0, 1234), "1234 of 1000 tokens"),
    ] {
        let refused = policy_of_run
            .of_run(&alice, || used)
            .unwrap_err()
            .to_string();
        let begin = "user `alice`: the user's budget for today (UTC) is used up: ";
        assert!(
            refused.starts_with(&format!("{begin}{words};")),
            "{refused}"
        );
    }
    let others = policy("cn:agents", Provider::Cli(Vendor::Google));
    assert_eq!(others.of_run(&alice, || used(99, 99999)), Ok(None));
}

#[test]
fn a_role_can_limit_the_tools_of_prompts_and_has_no_commands_then() {
    let roles = r#"
        [[role]]
        members = ["cn:readers"]
        may = ["run"]
        tools = "read"

        [[role]]
        members = ["cn:all"]
        may = ["run"]
    "#;
    let access = load(roles).unwrap();
    let limited_with = |name: &str, command, change: &dyn Fn(&mut RunStart)| {
        let policy = access.policy(&caller(name), COMMAND).unwrap();
        let mut start = RunStart {
            command: Some(command),
            ..RunStart::default()
        };
        change(&mut start);
        policy.limit(&mut start).map(|asked| asked.tools)
    };
    let limited = |caller, command| limited_with(caller, command, &|_| {});
    let prompt = |tools: Tools| {
        Command::Prompt(Prompt {
            tools: tools.into(),
            ..Prompt::default()
        })
    };
    let argv = || Command::Argv(Argv::default());
    for (caller, given, holds) in [
        ("cn:readers", Tools::Unspecified, Ok(Some(Tools::Read))),
        ("cn:readers", Tools::None, Ok(Some(Tools::None))),
        ("cn:readers", Tools::All, Err(TooMuch::Tools)),
        ("cn:all", Tools::Unspecified, Ok(Some(Tools::Unspecified))),
        ("cn:all", Tools::Read, Ok(Some(Tools::Read))),
    ] {
        assert_eq!(limited(caller, prompt(given)), holds, "{caller}: {given:?}");
    }
    assert_eq!(limited("cn:readers", argv()), Err(TooMuch::Command));
    assert_eq!(limited("cn:all", argv()), Ok(None));
    let file = |path: &str| InputFile {
        path: path.into(),
        ..InputFile::default()
    };
    let changes: [&dyn Fn(&mut RunStart); 4] = [
        &|start| drop(start.env.insert("PATH".into(), "/workspace".into())),
        &|start| start.work_dir = "/workspace/notes".into(),
        &|start| start.files = vec![file("notes/.claude/settings.json")],
        &|start| start.files = vec![file(".env")],
    ];
    for change in changes {
        let refused = limited_with("cn:readers", prompt(Tools::None), change);
        assert_eq!(refused, Err(TooMuch::Settings));
        limited_with("cn:all", prompt(Tools::None), change).unwrap();
    }
    let plain = |start: &mut RunStart| start.files = vec![file("CLAUDE.md")];
    limited_with("cn:readers", prompt(Tools::None), &plain).unwrap();
    assert!(load(&roles.replace("read\"", "reads\"")).is_err());
}

#[test]
fn a_role_limits_times_programs_and_variables() {
    let roles = r#"
        [[role]]
        members = ["cn:few"]
        may = ["run"]
        max_timeout = "5m"
        commands = ["python3", "/usr/bin/*"]
        env = ["LANG", "APP_*"]
    "#;
    let access = load(roles).unwrap();
    let policy = access.policy(&caller("cn:few"), COMMAND).unwrap();
    let start = |program: &str, variable: &str, timeout: Option<i64>| {
        let argv = Argv {
            text: vec![program.into(), "-c".into()],
            ..Argv::default()
        };
        let mut start = RunStart {
            command: Some(Command::Argv(argv)),
            timeout: timeout.map(|seconds| prost_types::Duration { seconds, nanos: 0 }),
            ..RunStart::default()
        };
        start.env.insert(variable.into(), "x".into());
        policy.limit(&mut start).map(|_| start.timeout)
    };
    let seconds = |seconds| Ok(Some(prost_types::Duration { seconds, nanos: 0 }));
    assert_eq!(start("python3", "APP_MODE", None), seconds(300));
    assert_eq!(start("/usr/bin/env", "LANG", Some(20)), seconds(20));
    let most = std::time::Duration::from_secs(300);
    for (program, variable, timeout, refused) in [
        ("python3", "LANG", Some(301), TooMuch::Timeout(most)),
        ("bash", "LANG", None, TooMuch::Program("bash".into())),
        (
            "/usr/bin/../../workspace/x",
            "LANG",
            None,
            TooMuch::Program("/usr/bin/../../workspace/x".into()),
        ),
        (
            "python3",
            "LD_PRELOAD",
            None,
            TooMuch::Variable("LD_PRELOAD".into()),
        ),
    ] {
        assert_eq!(start(program, variable, timeout), Err(refused));
    }
    assert!(
        TooMuch::Timeout(most)
            .to_string()
            .contains("above 5m, `max_timeout`"),
        "{}",
        TooMuch::Timeout(most)
    );
    // Without `env`, a role with `commands` allows no variables.
    let bare = roles.replace("env = ", "# ");
    let bare = load(&bare)
        .unwrap()
        .policy(&caller("cn:few"), COMMAND)
        .unwrap();
    let mut start = RunStart {
        command: Some(Command::Argv(Argv {
            args: vec!["python3".into()],
            ..Argv::default()
        })),
        ..RunStart::default()
    };
    bare.limit(&mut start).unwrap();
    start.env.insert("PATH".into(), "/workspace".into());
    assert_eq!(
        bare.limit(&mut start),
        Err(TooMuch::Variable("PATH".into()))
    );
    // Prompts have no program of their own.
    let mut prompt = RunStart {
        command: Some(Command::Prompt(Prompt::default())),
        ..RunStart::default()
    };
    policy.limit(&mut prompt).unwrap();
    for wrong in ["5", "0s", "long"] {
        let refused = load(&roles.replace("5m", wrong)).unwrap_err();
        assert!(
            crate::chain(&refused).contains("`max_timeout` is"),
            "{refused}"
        );
    }
}

#[test]
fn a_role_can_be_for_prompts_alone() {
    let access = load("[[role]]\nmembers = [\"cn:a\"]\nmay = [\"prompt\"]\n").unwrap();
    let policy = |what| {
        let run = Action::Run {
            what,
            user_id: Some("alice"),
            provider: None,
        };
        access.policy(&caller("cn:a"), run)
    };
    let denied = policy(What::Command).unwrap_err().to_string();
    assert!(
        denied.contains("start commands of user `alice`"),
        "{denied}"
    );
    policy(What::Existing).unwrap();
    let role = policy(What::Prompt).unwrap();
    let mut start = RunStart {
        command: Some(Command::Prompt(Prompt::default())),
        ..RunStart::default()
    };
    role.limit(&mut start).unwrap();
    // A folder of settings starts whatever it likes.
    start.work_dir = "/workspace/notes".into();
    assert_eq!(role.limit(&mut start), Err(TooMuch::Settings));
}

#[test]
fn a_role_can_be_for_the_user_that_the_caller_is() {
    let file = "[[role]]\nmembers = [\"sub:*\"]\nmay = [\"run\"]\nusers = [\"{caller}\"]\n";
    let access = load(file).unwrap();
    let may = |user: Option<&str>, user_id| {
        let caller = Caller {
            user: user.map(Into::into),
            ..caller("sub:x")
        };
        let run = Action::Run {
            what: What::Command,
            user_id,
            provider: None,
        };
        access.check(&caller, run).is_ok()
    };
    assert!(may(Some("alice"), Some("alice")));
    assert!(!may(Some("alice"), Some("bob")) && !may(Some("alice"), None));
    assert!(!may(None, Some("alice")) && !may(None, Some("{caller}")));
    // It is a name, and no pattern.
    assert!(!may(Some("*"), Some("alice")) && may(Some("*"), Some("*")));
    let error = load(&file.replace("{caller}", "{sub}")).unwrap_err();
    let words = "`users` has `{sub}`; in braces only `{caller}` is allowed";
    assert!(crate::chain(&error).contains(words), "{error}");
}

#[test]
fn a_connection_says_which_user_its_caller_is() {
    let (stream, _) = tokio::io::duplex(1);
    let mut connection = polydev_transport::connection::Connection::new(
        stream,
        String::new(),
        Origin::Process { uid: 0, pid: None },
    );
    for (name, user) in [
        ("cn:alice", Some(Some("alice"))),
        ("spiffe://acme/alice", Some(Some("spiffe://acme/alice"))),
        ("uid:7", Some(Some("uid:7"))),
        ("loopback", Some(None)),
        (NOBODY, None),
    ] {
        connection.known.caller.0 = name.into();
        let caller = Caller::of_connection(&connection.known);
        let known = caller.as_ref().map(|caller| caller.user.as_deref());
        assert_eq!(known, user, "{name}");
    }
}

#[test]
fn records_that_are_bound_to_nobody_need_a_role_that_says_so() {
    let file = "[[role]]\nmembers = [\"cn:a\"]\nmay = [\"run\"]\n";
    let may = |file: &str| {
        let unbound = Action::Unbound {
            user_id: "alice",
            provider: Provider::Cli(Vendor::OpenAi),
        };
        load(file).unwrap().check(&caller("cn:a"), unbound).is_ok()
    };
    assert!(!may(file) && may(&format!("{file}unbound = true\n")));
}

#[test]
fn what_no_role_of_a_caller_can_allow_is_known_before_its_request_is_read() {
    let access = load(FILE).unwrap();
    let may = |name: &str, need| access.may_ever(&caller(name), need).is_ok();
    assert!(may("cn:agents", Need::Run) && !may("cn:agents", Need::Scale));
    assert!(may("cn:admin", Need::Look) && !may("cn:admin", Need::Run));
    assert!(may("uid:0", Need::Credentials) && !may("loopback", Need::Look));
    let denied = access.may_ever(&caller("loopback"), Need::Run).unwrap_err();
    let words = "caller `loopback` has no role that allows them to start, see or end runs";
    assert_eq!(denied.to_string(), words);
    Access::everything()
        .may_ever(&caller("loopback"), Need::Run)
        .unwrap();
}

#[test]
fn a_role_that_could_not_hold_is_refused() {
    for (wrong, words) in [
        (
            "budget = { requests = 1 }",
            "`budget` needs `inject = false`",
        ),
        ("inject = false\nbudget = {}", "`budget` must have"),
        (
            "inject = false\nbudget = { tokens = 0 }",
            "`budget.tokens` is 0",
        ),
        ("egress = [\"a b\"]", "`egress` has `a b`"),
        (
            "upstream.openai = { base_url = \"https://a.example\" }",
            "`upstream` needs `inject = false`",
        ),
        (
            "inject = false\nupstream.openai = { base_url = \"http://a.example\" }",
            "`upstream.base_url` is `http://a.example`",
        ),
        (
            "inject = false\nupstream.open = { base_url = \"https://a.example\" }",
            "a name under `upstream`",
        ),
        (
            "inject = false\nupstream.openai = { base_url = \"https://a.example\" }\n\
             upstream.codex = { base_url = \"https://b.example\" }",
            "`upstream` names openai twice",
        ),
    ] {
        let file = format!("[[role]]\nmembers = [\"cn:a\"]\nmay = [\"run\"]\n{wrong}");
        let error = crate::chain(&load(&file).unwrap_err());
        assert!(
            error.contains("role 1 in ") && error.contains(words),
            "{error}"
        );
    }
}

#[test]
fn what_was_denied_is_said() {
    let access = load(FILE).unwrap();
    let run = Action::Run {
        what: What::Command,
        user_id: Some("bob"),
        provider: Some("google".parse().unwrap()),
    };
    let denied = access.check(&caller("cn:team-a"), run).unwrap_err();
    let words = "caller `cn:team-a` has no role that allows them to start commands of user `bob` \
                 for `google`";
    assert_eq!(denied.to_string(), words);
}

#[test]
fn roles_that_are_not_understood_are_refused() {
    for wrong in [
        "",
        "[[role]]\nmembers = [\"cn:a\"]",
        "[[role]]\nmembers = [\"cn:a\"]\nmay = [\"fly\"]",
        "[[role]]\nmembers = [\"cn:a\"]\nmay = [\"run\"]\nuser = [\"a\"]",
        "[[role]]\nmembers = [\"cn:a\"]\nmay = [\"run\"]\nproviders = [\"openia\"]",
    ] {
        assert!(load(wrong).is_err(), "{wrong}");
    }
    assert!(Access::load(Path::new("/nowhere")).is_err());
}
