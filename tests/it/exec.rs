//! `nomad alloc exec` into plain tasks: Nomad's own conformance cases and harder ones.

use std::time::Duration;

use polydev_tests::{
    job::{merge, service, shell},
    nomad::Nomad,
    process::output,
    wait_until,
};
use serde_json::json;

/// One case: the command for `/bin/sh -c`, its input, and its exact output.
struct Case {
    name: &'static str,
    tty: bool,
    command: &'static str,
    stdin: &'static str,
    stdout: &'static str,
    stderr: &'static str,
    exit_code: i64,
}

const STREAMING: &str = "for n in 1 2 3; do echo $n; sleep 1; done";
const BASIC: &str = "echo hello stdout; echo hello stderr >&2; exit 43";

/// C170 to C178.
const CASES: [Case; 9] = [
    Case {
        name: "basic",
        tty: false,
        command: BASIC,
        stdin: "",
        stdout: "hello stdout\n",
        stderr: "hello stderr\n",
        exit_code: 43,
    },
    Case {
        name: "streaming",
        tty: false,
        command: STREAMING,
        stdin: "",
        stdout: "1\n2\n3\n",
        stderr: "",
        exit_code: 0,
    },
    Case {
        name: "stty check",
        tty: false,
        command: "stty size",
        stdin: "",
        stdout: "",
        stderr: "stty: standard input: Inappropriate ioctl for device\n",
        exit_code: 1,
    },
    Case {
        name: "stdin passing",
        tty: false,
        command: "echo hello from command; head -n1",
        stdin: "hello from stdin\n",
        stdout: "hello from command\nhello from stdin\n",
        stderr: "",
        exit_code: 0,
    },
    Case {
        name: "tty basic",
        tty: true,
        command: BASIC,
        stdin: "",
        stdout: "hello stdout\r\nhello stderr\r\n",
        stderr: "",
        exit_code: 43,
    },
    Case {
        name: "tty streaming",
        tty: true,
        command: STREAMING,
        stdin: "",
        stdout: "1\r\n2\r\n3\r\n",
        stderr: "",
        exit_code: 0,
    },
    Case {
        name: "tty stty check",
        tty: true,
        command: "sleep 1; stty size",
        stdin: "",
        stdout: "100 100\r\n",
        stderr: "",
        exit_code: 0,
    },
    Case {
        name: "tty stdin passing",
        tty: true,
        command: "head -n1",
        stdin: "hello from stdin\n",
        stdout: "hello from stdin\r\nhello from stdin\r\n",
        stderr: "",
        exit_code: 0,
    },
    Case {
        name: "tty children",
        tty: true,
        command: "(( sleep 3; echo from background ) & ); echo from main; exec sleep 1",
        stdin: "",
        stdout: "from main\r\n",
        stderr: "",
        exit_code: 0,
    },
];

#[test]
fn the_conformance_cases_pass_through_the_agents_api() {
    let nomad = Nomad::start();
    for (job, options) in [
        ("with-init", json!({})),
        ("without-init", json!({ "init": false })),
    ] {
        let mut config = shell("while :; do sleep 1; done");
        merge(&mut config, options);
        nomad.submit(&service(job, config));
        let id = nomad.wait_started(job);
        for case in &CASES {
            let command = ["/bin/sh", "-c", case.command];
            let done = nomad.exec(&id, &command, case.tty, case.stdin.as_bytes());
            let label = format!("{job}: {}", case.name);
            assert_eq!(done.stdout, case.stdout, "{label}");
            assert_eq!(done.stderr, case.stderr, "{label}");
            assert_eq!(done.exit_code, case.exit_code, "{label}");
        }
        // C179: a file that an exec writes is in the task, and not on the host.
        let script = "FILE=$(mktemp); echo \"$FILE\"; echo 'hello from the other side' >\"$FILE\"";
        let made = nomad.exec(&id, &["/bin/sh", "-c", script], false, b"");
        let path = made.stdout.trim();
        assert!(
            !std::path::Path::new(path).exists(),
            "{path} is on the host"
        );
        let read = nomad.exec(&id, &["cat", path], false, b"");
        assert_eq!(read.stdout, "hello from the other side\n");
        let missing = nomad.exec(&id, &["no-such-program"], false, b"");
        assert!(
            missing.exit_code != 0 || !missing.error.is_empty(),
            "{missing:?}"
        );
        nomad.run(&["job", "stop", "-detach", "-yes", job]);
    }
}

/// C181: an archive through stdin. The command must see the end of stdin.
#[test]
fn a_megabyte_goes_in_and_out_of_an_exec() {
    let nomad = Nomad::start();
    nomad.submit(&service("open", shell("while :; do sleep 1; done")));
    let id = nomad.wait_started("open");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("input");
    let input: Vec<u8> = (0..200_000_u32).flat_map(u32::to_le_bytes).collect();
    std::fs::write(&path, &input).unwrap();
    let mut command = nomad.command(&["alloc", "exec", "-t=false", "-i=true", &id, "cat"]);
    let copied = command
        .stdin(std::fs::File::open(&path).unwrap())
        .output()
        .unwrap();
    assert!(
        copied.status.success(),
        "{}",
        String::from_utf8_lossy(&copied.stderr)
    );
    assert!(
        copied.stdout == input,
        "{} of {} bytes",
        copied.stdout.len(),
        input.len()
    );
}

/// Runs Nomad's command line `count` times. Returns how many outputs were cut short.
pub(crate) fn truncated(nomad: &Nomad, id: &str, count: usize) -> usize {
    let expected: String = (1..=200_000).map(|line| format!("{line}\n")).collect();
    let run = |_: &usize| {
        let args = [
            "alloc", "exec", "-t=false", "-i=false", id, "seq", "1", "200000",
        ];
        let done = output(&mut nomad.command(&args));
        assert!(
            done.status.success(),
            "{}",
            String::from_utf8_lossy(&done.stderr)
        );
        done.stdout != expected.as_bytes()
    };
    (0..count).filter(run).count()
}

/// Script checks need Consul; a template's change script makes the same call of the driver.
#[test]
fn a_change_script_runs_in_the_task() {
    let nomad = Nomad::start();
    let mut job = service("checked", shell("while :; do sleep 1; done"));
    job["TaskGroups"][0]["Tasks"][0]["Templates"] = json!([{
        "EmbeddedTmpl": "{{ with nomadVar \"nomad/jobs/checked\" }}{{ .value }}{{ end }}",
        "DestPath": "local/value", "ChangeMode": "script",
        "ChangeScript": { "Command": "/bin/sh", "Args": ["-c", "cp /local/value /tmp/seen"], "Timeout": 5_000_000_000_u64 },
    }]);
    let variable = |value: &str| {
        nomad.put(
            "/v1/var/nomad/jobs/checked",
            &json!({
                "Path": "nomad/jobs/checked", "Items": { "value": value },
            }),
        )
    };
    variable("one");
    nomad.submit(&job);
    let id = nomad.wait_started("checked");
    variable("two");
    wait_until("the change script", Duration::from_secs(30), || {
        let seen = nomad.exec(&id, &["cat", "/tmp/seen"], false, b"").stdout;
        if seen == "two" { Ok(()) } else { Err(seen) }
    });
}
