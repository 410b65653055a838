//! The program, as its users start it: what it prints, executes and exits with.

use std::{
    fs,
    path::PathBuf,
    process::{Command, Output, Stdio},
};

use serde_json::{Value, json};
use tempfile::TempDir;

const SECRET: &str = "a secret of this test alone";
const TOOLS: &str = r#"
    [[tool]]
    name = "note"
    argv = ["/bin/sh", "-c", "printf %s \"$1\" >> \"$0\"", "FILE", "{text}"]
    target = "text"
    allow = ["*"]
    risk = "low"
    capability = "ipc"

    [[tool]]
    name = "erase"
    argv = ["/bin/rm", "--", "{path}"]
    target = "path"
    allow = ["*"]
    risk = "critical"
    capability = "filesystem_write"

    [[tool]]
    name = "fails"
    argv = ["/bin/false"]
    target = "text"
    allow = ["*"]
    risk = "low"
    capability = "ipc"
"#;

/// A folder with a registry, whose `note` writes to the file `notes`.
struct Bench {
    folder: TempDir,
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let notes = folder.path().join("notes");
        let tools = TOOLS.replace("FILE", notes.to_str().expect("UTF-8"));
        fs::write(folder.path().join("tools.toml"), tools).expect("a file");
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn notes(&self) -> String {
        fs::read_to_string(self.path("notes")).unwrap_or_default()
    }

    fn gate(&self, command: &str, switches: &[(&str, &str)]) -> Command {
        let mut gate = Command::new(env!("CARGO_BIN_EXE_polydev-tool-gate"));
        gate.arg(command).env_clear().envs(switches.iter().copied());
        gate.stdout(Stdio::piped()).stderr(Stdio::piped());
        if matches!(command, "run" | "decide") {
            gate.arg("--registry").arg(self.path("tools.toml"));
        }
        gate
    }

    /// Runs a payload.
    fn run(&self, calls: &[Value], switches: &[(&str, &str)], args: &[&str]) -> Output {
        let payload = self.payload(calls);
        let mut run = self.gate("run", switches);
        run.arg("--payload").arg(payload).args(args);
        run.output().expect("the gate runs")
    }

    fn payload(&self, calls: &[Value]) -> PathBuf {
        let path = self.path("payload.json");
        fs::write(&path, json!(calls).to_string()).expect("a file");
        path
    }
}

fn note(text: &str) -> Value {
    json!({ "name": "note", "arguments": { "text": text } })
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn summary(executed: usize, blocked: usize) -> String {
    let total = executed + blocked;
    format!(
        "total_calls={total}\nexecuted_calls={executed}\nblocked_calls={blocked}\nstep_up_calls=0\n"
    )
}

const TOKENS: (&str, &str) = ("MVAR_REQUIRE_EXECUTION_TOKEN", "1");
const WITH_SECRET: [(&str, &str); 2] = [TOKENS, ("MVAR_EXEC_TOKEN_SECRET", SECRET)];

#[test]
fn the_demo_executes_one_call_and_blocks_one() {
    let bench = Bench::new();
    let cookbook = [
        TOKENS,
        ("MVAR_EXEC_TOKEN_SECRET", "change_me_in_prod"),
        ("MVAR_FAIL_CLOSED", "1"),
    ];
    let shown = bench.gate("demo", &cookbook).output().unwrap();
    assert_eq!(
        text(&shown),
        format!("mvar_openai_docker_demo\n{}", summary(1, 1))
    );
    assert_eq!(shown.status.code(), Some(0));
}

#[test]
fn without_a_secret_nothing_is_executed_and_the_status_says_so() {
    let bench = Bench::new();
    let shown = bench.gate("demo", &[TOKENS]).output().unwrap();
    assert_eq!(
        text(&shown),
        format!("mvar_openai_docker_demo\n{}", summary(0, 2))
    );
    assert_eq!(shown.status.code(), Some(3));
    let shown = bench
        .gate("demo", &[TOKENS])
        .args(["--output", "json"])
        .output()
        .unwrap();
    let report: Value = serde_json::from_str(&text(&shown)).unwrap();
    assert_eq!(report["calls"][0]["status"], "blocked");
    assert_eq!(
        report["calls"][0]["reason"],
        "Fail-closed: execution token secret missing"
    );
    assert_eq!(
        report["calls"][1]["reason"],
        "UNTRUSTED integrity → critical risk sink = BLOCK"
    );
}

#[test]
fn the_secret_that_everybody_knows_is_for_the_demo_alone() {
    let bench = Bench::new();
    let known = [TOKENS, ("MVAR_EXEC_TOKEN_SECRET", "change_me_in_prod")];
    let refused = bench.run(&[note("a")], &known, &["--trusted"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        stderr(&refused).contains("choose one"),
        "{}",
        stderr(&refused)
    );
    assert_eq!(bench.notes(), "");
}

#[test]
fn an_unknown_tool_in_the_middle_stops_no_other_call_and_all_are_counted() {
    let bench = Bench::new();
    let calls = [
        note("a"),
        json!({ "name": "fly", "arguments": {} }),
        json!({ "name": "fails", "arguments": { "text": "x" } }),
        json!({ "arguments": {} }),
        note("b"),
    ];
    let run = bench.run(&calls, &WITH_SECRET, &["--trusted"]);
    let numbers =
        "total_calls=5\nexecuted_calls=2\nblocked_calls=2\nstep_up_calls=0\nfailed_calls=1\n";
    assert_eq!(text(&run), format!("polydev_tool_gate\n{numbers}"));
    assert_eq!((bench.notes().as_str(), run.status.code()), ("ab", Some(3)));
}

#[test]
fn the_status_tells_blocked_step_up_and_failed_apart() {
    let bench = Bench::new();
    let erase = json!({ "name": "erase", "arguments": { "path": "/tmp/polydev-nothing" } });
    let fails = json!({ "name": "fails", "arguments": { "text": "x" } });
    for (calls, trusted, status) in [
        (vec![note("a")], true, 0),
        (vec![erase.clone()], true, 4),
        (vec![erase.clone()], false, 3),
        (vec![fails.clone()], true, 5),
        (vec![fails, erase], true, 4),
    ] {
        let args: &[&str] = if trusted { &["--trusted"] } else { &[] };
        let run = bench.run(&calls, &WITH_SECRET, args);
        assert_eq!(run.status.code(), Some(status), "{}", text(&run));
    }
    let wrong = bench.gate("run", &[]).arg("--nothing").output().unwrap();
    assert_eq!(wrong.status.code(), Some(2));
    let wrong = bench
        .gate("run", &[("MVAR_NOTHING", "1")])
        .output()
        .unwrap();
    assert_eq!(wrong.status.code(), Some(1));
}

#[test]
fn in_strict_mode_nothing_is_executed_unless_everything_is_allowed() {
    let bench = Bench::new();
    let erase = json!({ "name": "erase", "arguments": { "path": "/tmp/polydev-nothing" } });
    for (other, words) in [
        (
            erase,
            "error: STEP_UP required before execution: CRITICAL risk sink",
        ),
        (json!({ "name": "fly" }), "error: Unknown tool call: fly"),
        (
            json!({ "name": "note", "arguments": { "text": "x", "target": "y" } }),
            "error: argument `target` is not one",
        ),
    ] {
        let run = bench.run(
            &[note("a"), other],
            &WITH_SECRET,
            &["--trusted", "--strict"],
        );
        assert_eq!((bench.notes().as_str(), run.status.code()), ("", Some(3)));
        assert!(stderr(&run).contains(words), "{}", stderr(&run));
    }
    let run = bench.run(&[note("a")], &WITH_SECRET, &["--trusted", "--strict"]);
    assert_eq!((bench.notes().as_str(), run.status.code()), ("a", Some(0)));
}

#[test]
fn one_process_decides_and_another_executes_what_was_decided_alone() {
    let bench = Bench::new();
    let store = bench.path("nonces");
    let shared = [
        TOKENS,
        ("MVAR_EXEC_TOKEN_SECRET", SECRET),
        ("MVAR_EXECUTION_TOKEN_NONCE_PERSIST", "1"),
        ("MVAR_EXEC_TOKEN_NONCE_STORE", store.to_str().unwrap()),
    ];
    let payload = bench.payload(&[note("a"), note("b")]);
    let decided = bench
        .gate("decide", &shared)
        .arg("--trusted")
        .arg("--payload")
        .arg(&payload)
        .output()
        .unwrap();
    assert_eq!(
        (bench.notes().as_str(), decided.status.code()),
        ("", Some(0))
    );
    let decisions = bench.path("decisions.json");
    fs::write(&decisions, &decided.stdout).unwrap();
    let execute =
        |calls: &[Value]| bench.run(calls, &shared, &["--decided", decisions.to_str().unwrap()]);
    // Another argument than the one that was decided about.
    let run = execute(&[note("c"), note("b")]);
    assert_eq!((bench.notes().as_str(), run.status.code()), ("b", Some(3)));
    let run = execute(&[note("a"), note("b")]);
    assert_eq!(bench.notes(), "ba", "{}", text(&run));
    // Neither is used twice.
    let run = execute(&[note("a"), note("b")]);
    assert_eq!(text(&run), format!("polydev_tool_gate\n{}", summary(0, 2)));
    // Who changes what is known of the data, changes its id.
    let forged = fs::read_to_string(&decisions)
        .unwrap()
        .replace("\"trusted\"", "\"untrusted\"");
    fs::write(&decisions, forged).unwrap();
    let refused = execute(&[note("a"), note("b")]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        stderr(&refused).contains("was changed"),
        "{}",
        stderr(&refused)
    );
}

#[test]
fn a_decision_without_a_token_executes_nothing() {
    let bench = Bench::new();
    let payload = bench.payload(&[note("a")]);
    let decided = bench
        .gate("decide", &[])
        .arg("--trusted")
        .arg("--payload")
        .arg(&payload)
        .output()
        .unwrap();
    let decisions = bench.path("decisions.json");
    fs::write(&decisions, &decided.stdout).unwrap();
    let needs = bench.run(
        &[note("a")],
        &WITH_SECRET,
        &["--decided", decisions.to_str().unwrap()],
    );
    assert_eq!(needs.status.code(), Some(1));
    assert!(
        stderr(&needs).contains("NONCE_PERSIST=1"),
        "{}",
        stderr(&needs)
    );
    let store = bench.path("nonces");
    let shared = [
        ("MVAR_EXEC_TOKEN_SECRET", SECRET),
        ("MVAR_EXECUTION_TOKEN_NONCE_PERSIST", "1"),
        ("MVAR_EXEC_TOKEN_NONCE_STORE", store.to_str().unwrap()),
    ];
    let run = bench.run(
        &[note("a")],
        &shared,
        &["--decided", decisions.to_str().unwrap(), "--output", "json"],
    );
    let report: Value = serde_json::from_str(&text(&run)).unwrap();
    assert_eq!(
        report["calls"][0]["reason"],
        "Execution token required but missing"
    );
    assert_eq!(bench.notes(), "");
}

#[test]
fn a_token_is_used_once_between_processes_that_share_a_store() {
    let bench = Bench::new();
    let store = bench.path("nonces");
    let shared = [
        TOKENS,
        ("MVAR_EXEC_TOKEN_SECRET", SECRET),
        ("MVAR_EXECUTION_TOKEN_NONCE_PERSIST", "1"),
        ("MVAR_EXEC_TOKEN_NONCE_STORE", store.to_str().unwrap()),
    ];
    let probes: Vec<_> = (0..6)
        .map(|_| bench.gate("probe", &shared).spawn().unwrap())
        .collect();
    let probes: Vec<_> = probes
        .into_iter()
        .map(|probe| probe.wait_with_output().unwrap())
        .collect();
    let allowed = probes
        .iter()
        .filter(|probe| text(probe).starts_with("nonce_probe=ALLOW\n"))
        .count();
    let used = "nonce_probe=BLOCK\nreason=Execution token invalid: it was used before\n";
    let refused = probes
        .iter()
        .filter(|probe| text(probe) == used && probe.status.code() == Some(3))
        .count();
    assert_eq!((allowed, refused), (1, 5));
}

#[test]
fn three_tasks_end_without_and_with_the_gate_as_they_should() {
    let bench = Bench::new();
    let shown = bench.gate("trilogy", &[]).output().unwrap();
    assert_eq!(shown.status.code(), Some(0));
    let shown = text(&shown);
    for (name, outcome, executed, words) in [
        (
            "rag_injection",
            "BLOCK",
            "False",
            [
                "retrieved_doc_chunk (UNTRUSTED external content)",
                "UNTRUSTED + CRITICAL",
                "qseal_algo: hmac-sha256",
            ],
        ),
        (
            "taint_laundering",
            "BLOCK",
            "False",
            [
                "Decoded payload \"Y2F0IC9ldGMvc2hhZG93\"",
                "UNTRUSTED + CRITICAL",
                "qseal_algo: hmac-sha256",
            ],
        ),
        (
            "benign",
            "ALLOW",
            "True",
            [
                "source_context: user_prompt + retrieved_doc_chunk",
                "base_decision: allow",
                "final_decision: allow",
            ],
        ),
    ] {
        let (_, task) = shown.split_once(&format!("=== {name} ===")).unwrap();
        let (task, _) = task.split_once("=== Summary ===").unwrap();
        let (baseline, gated) = task.split_once("[MVAR]").unwrap();
        assert!(
            baseline.contains("[BASELINE]\noutcome: ALLOW\nexecuted: True"),
            "{baseline}"
        );
        assert!(
            gated.starts_with(&format!("\noutcome: {outcome}\nexecuted: {executed}\n")),
            "{gated}"
        );
        for words in words {
            assert!(gated.contains(words), "{name}: {words}: {gated}");
        }
    }
}
