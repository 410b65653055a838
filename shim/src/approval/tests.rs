//! Who may approve what, and for how long.

use polydev_policy::{
    decision::Outcome,
    rules::{Kind, RunFacts},
};
use polydev_transport::connection::Origin;

use super::*;
use crate::policy::Decided;
use wanted::{Call, Subject};

const TIMEOUT: Duration = Duration::from_secs(60);

fn caller(name: &str) -> Caller {
    let user = crate::access::user_of(name).map(str::to_owned);
    Caller {
        name: name.into(),
        user,
        origin: Origin::Process { uid: 0, pid: None },
    }
}

/// A command that a service wants to run for alice.
fn wanted(caller_name: &str) -> Wanted {
    let record = Record::new(&caller(caller_name), Operation::Start)
        .user("alice")
        .provider("anthropic")
        .run("run")
        .decided(Some(Decided {
            outcome: Outcome::StepUp,
            reason: "large".into(),
            rules: vec!["large".into()],
            policy_hash: "1".into(),
            facts_hash: "2".into(),
            shadow: false,
        }));
    Wanted {
        record,
        who: Who {
            name: caller_name.into(),
            user: caller(caller_name).user,
        },
        subject: Subject::Call(Call {
            node_id: "node".into(),
            tool: "shell.exec".into(),
            name: "Bash".into(),
            arguments: "{\"command\": \"make\\u001b[2J  deploy\"}".into(),
            entered: vec!["files".into()],
        }),
    }
}

fn approvals() -> Approvals {
    Approvals::new(TIMEOUT, Audit::default())
}

fn decide(approvals: &Approvals, name: &str, approves: bool) -> Result<Approval, Error> {
    let id = approvals.all()[0].id;
    approvals.decide(&caller(name), id, approves, "fine".into())
}

#[tokio::test]
async fn somebody_else_approves_and_whoever_waits_goes_on() {
    let approvals = approvals();
    let mut news = approvals.news();
    let waiting = approvals.ask(wanted("cn:service")).unwrap();
    decide(&approvals, "cn:erin", true).unwrap();
    let approved = waiting.approved().await.unwrap();
    assert_eq!(
        (&*approved.decided_by, &*approved.comment),
        ("cn:erin", "fine")
    );
    let states = [news.recv().await.unwrap(), news.recv().await.unwrap()];
    assert_eq!(
        states.map(|one| one.state),
        [State::Pending, State::Approved]
    );
    assert!(approvals.all().is_empty());
    let late = approvals.decide(&caller("cn:erin"), approved.id, false, String::new());
    assert!(matches!(late, Err(Error::NotFound { .. })), "{late:?}");
}

#[tokio::test]
async fn nobody_approves_their_own_or_what_is_for_them() {
    let approvals = approvals();
    let _waiting = approvals.ask(wanted("cn:service")).unwrap();
    for (name, why) in [
        ("cn:service", "somebody else must"),
        // Another name of the same user.
        ("sub:service", "somebody else must"),
        ("cn:alice", "who cannot approve it"),
        ("loopback", "no names"),
    ] {
        let refused = decide(&approvals, name, true).unwrap_err().to_string();
        assert!(refused.contains(why), "{name}: {refused}");
    }
    let _anonymous = {
        let all = approvals.all();
        decide(&approvals, "cn:service", false).expect("whoever wants it may deny it");
        assert_eq!(all.len(), 1);
        approvals.ask(wanted("loopback")).unwrap()
    };
    let refused = decide(&approvals, "uid:0", true).unwrap_err().to_string();
    assert!(refused.contains("no names"), "{refused}");
}

#[tokio::test]
async fn a_denial_says_who_and_why() {
    let approvals = approvals();
    let waiting = approvals.ask(wanted("cn:service")).unwrap();
    decide(&approvals, "cn:erin", false).unwrap();
    let denied = waiting.approved().await.unwrap_err().to_string();
    assert_eq!(denied, "`cn:erin` has denied this call: fine");
}

#[tokio::test(start_paused = true)]
async fn an_approval_expires_and_is_withdrawn_with_whoever_waits() {
    let approvals = approvals();
    let mut news = approvals.news();
    let waiting = approvals.ask(wanted("cn:service")).unwrap();
    let expired = waiting.approved().await.unwrap_err().to_string();
    assert_eq!(expired, "nobody has approved this call within 60 s: large");
    drop(approvals.ask(wanted("cn:service")).unwrap());
    let waiting = approvals.ask(wanted("cn:service")).unwrap();
    approvals.close();
    let stopped = waiting.approved().await;
    assert!(matches!(stopped, Err(Error::Stopping)), "{stopped:?}");
    let mut states = Vec::new();
    while let Ok(one) = news.try_recv() {
        states.push(one.state);
    }
    use State::{Expired, Pending, Withdrawn};
    assert_eq!(
        states,
        [Pending, Expired, Pending, Withdrawn, Pending, Withdrawn]
    );
    assert!(approvals.all().is_empty());
}

#[tokio::test]
async fn no_more_wait_than_fit() {
    let approvals = approvals();
    let waiting: Vec<_> = (0..MAX_WAITING)
        .map(|_| approvals.ask(wanted("cn:service")).unwrap())
        .collect();
    let refused = approvals.ask(wanted("cn:service"));
    assert!(matches!(refused, Err(Error::Full)), "{refused:?}");
    drop(waiting);
    let large = || {
        let facts = RunFacts {
            prompt: "x".repeat(MAX_BYTES / 2),
            ..prompt()
        };
        let subject = Subject::Run(Box::new(facts));
        approvals.ask(Wanted {
            subject,
            ..wanted("cn:service")
        })
    };
    let _two = (large().unwrap(), large().unwrap());
    assert!(matches!(large(), Err(Error::Full)));
}

fn prompt() -> RunFacts {
    serde_json::from_value(serde_json::json!({
        "caller": "cn:service", "user": "alice", "provider": "anthropic", "kind": Kind::Prompt,
    }))
    .unwrap()
}

#[test]
fn a_summary_is_one_short_line() {
    let call = wanted("cn:service").subject.summary();
    assert_eq!(call, r#"Bash {"command": "make\u001b[2J deploy"}"#);
    let facts = RunFacts {
        prompt: format!("a\u{1b}[2J\n  b {}", "\u{20ac}".repeat(100)),
        ..prompt()
    };
    let line = Subject::Run(facts.into()).summary();
    assert!(line.starts_with("a[2J b \u{20ac}"), "{line}");
    assert!(line.ends_with(" ...") && line.len() <= 204, "{line}");
}
