//! Scripts in Python: `polydev-shim script`, over a slot in which a Python waits.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};

use nix::sys::signal::Signal;
use polydev_proto::runtime::{ExitReason, ListRunsRequest, RunState};
use polydev_tests::{
    docker,
    process::{Process, output},
    root,
    shim::Shim,
    wait_until,
};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A shim with one slot, and a folder for scripts.
struct Site {
    shim: Shim,
    folder: TempDir,
}

impl Site {
    /// With a Python that waits in each of so many slots.
    fn parked(slots: usize) -> Self {
        Self::start(slots, &["--agents=true"])
    }

    fn start(slots: usize, options: &[&str]) -> Self {
        Self {
            shim: Shim::dev_with(&[&format!("python={slots}")], options),
            folder: tempfile::tempdir().expect("a folder can be made"),
        }
    }

    fn script(&self, text: &str) -> PathBuf {
        let path = self.folder.path().join("script.py");
        fs::write(&path, text).expect("a file can be written");
        path
    }

    fn command(&self, script: &Path, words: &[&str]) -> Command {
        let mut command = self.shim.command(&["script", "--queue-timeout", "60"]);
        command.arg(script).args(words);
        command
    }

    /// Runs a script's text; `words` are options and arguments.
    fn run(&self, text: &str, words: &[&str]) -> Output {
        output(&mut self.command(&self.script(text), words))
    }

    /// The same, with the result as JSON.
    fn result(&self, text: &str, words: &[&str]) -> Value {
        let words = [&["--json"], words].concat();
        let ran = self.run(text, &words);
        serde_json::from_slice(&ran.stdout)
            .unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&ran.stderr)))
    }
}

#[test]
fn what_a_waiting_python_draws_is_in_the_callers_hands() {
    let site = Site::parked(1);
    let outputs = site.folder.path().join("outputs");
    let ran = output(&mut site.command(
        &root().join("tests/sandbox/smoke.py"),
        &[
            "--output=plot.png",
            "--output=plot.pdf:binary",
            "--output=graph.svg:text",
            "--output=flow.svg:text",
            "--outputs-to",
            outputs.to_str().unwrap(),
        ],
    ));
    let stderr = String::from_utf8_lossy(&ran.stderr);
    assert_eq!(ran.status.code(), Some(0), "{stderr}");
    assert_eq!(ran.stdout, b"drawn\n");
    assert!(
        fs::read(outputs.join("plot.png"))
            .unwrap()
            .starts_with(b"\x89PNG")
    );
    assert!(
        fs::read(outputs.join("plot.pdf"))
            .unwrap()
            .starts_with(b"%PDF")
    );
    for drawn in ["graph.svg", "flow.svg"] {
        let text = fs::read_to_string(outputs.join(drawn)).unwrap();
        assert!(text.contains("<svg"), "{drawn}: {text}");
    }

    let result = site.result("import sys\nprint(sys.argv[1:])", &["--", "-a", "b c"]);
    assert_eq!(result["stdout"], "['-a', 'b c']\n");
    assert_eq!(
        (&result["status"], &result["parked"]),
        (&json!("success"), &json!(true)),
        "{result}"
    );
    // A module of the caller's own takes the place of the one that is imported.
    let own = site.folder.path().join("pandas.py");
    fs::write(&own, "mine = 1").unwrap();
    let file = format!("{}:pandas.py", own.display());
    let result = site.result("import pandas\nprint(pandas.mine)", &["--file", &file]);
    assert_eq!(
        (&result["stdout"], &result["parked"]),
        (&json!("1\n"), &json!(false))
    );
    let reason = "`pandas` in the script's folder has the name of a module that is imported";
    assert_eq!(result["cold_reason"], reason);
}

#[test]
fn a_script_is_confined_as_the_systems_before_had_it_or_more() {
    let site = Site::parked(1);
    let text = r"
import json, os, resource, socket
status = dict(line.split(':\t') for line in open('/proc/self/status').read().splitlines() if ':\t' in line)
def read(*paths):
    for path in paths:
        if os.path.exists(path): return open(path).read().split()
def fails(act):
    try: act()
    except OSError as error: return error.strerror
print(json.dumps({
    'uid': os.getuid(), 'caps': status['CapEff'], 'bounding': status['CapBnd'], 'no_new': status['NoNewPrivs'],
    'interfaces': os.listdir('/sys/class/net'),
    'internet': fails(lambda: socket.create_connection(('192.0.2.1', 443), 5)),
    'root': fails(lambda: open('/opt/sandbox/x', 'w')),
    'memory': read('/sys/fs/cgroup/memory.max', '/sys/fs/cgroup/memory/memory.limit_in_bytes'),
    'pids': read('/sys/fs/cgroup/pids.max', '/sys/fs/cgroup/pids/pids.max'),
    'cpu': read('/sys/fs/cgroup/cpu.max', '/sys/fs/cgroup/cpu/cpu.cfs_quota_us')[0],
    'workspace': os.statvfs('/workspace').f_blocks * os.statvfs('/workspace').f_frsize,
}))";
    let result = site.result(text, &[]);
    let seen: Value = serde_json::from_str(result["stdout"].as_str().unwrap())
        .unwrap_or_else(|_| panic!("{result}"));
    assert_eq!(seen["uid"], 1000);
    let none = "0000000000000000";
    assert_eq!(
        (&seen["caps"], &seen["bounding"]),
        (&json!(none), &json!(none))
    );
    assert_eq!(seen["no_new"], "1");
    assert_eq!(seen["interfaces"], json!(["lo"]));
    assert_eq!(seen["internet"], "Network is unreachable");
    assert_eq!(seen["root"], "Read-only file system");
    assert_eq!(seen["memory"], json!(["2147483648"]));
    assert_eq!(seen["pids"], json!(["256"]));
    assert_eq!(seen["cpu"], "200000");
    assert_eq!(seen["workspace"], 256 << 20);
}

#[test]
fn a_script_beyond_its_time_is_gone_with_its_container() {
    let site = Site::parked(1);
    let before = docker::wait_containers(&site.shim.label(), 1);
    let text = "import time\nprint('begun', flush=True)\ntime.sleep(600)";
    let ran = site.run(text, &["--timeout", "2"]);
    assert_eq!(ran.status.code(), Some(124));
    assert_eq!(ran.stdout, b"begun\n");
    wait_until("the container's end", Duration::from_secs(20), || {
        let now = docker::containers(&site.shim.label());
        match now.contains(&before[0]) {
            true => Err(format!("{now:?}")),
            false => Ok(()),
        }
    });
    let result = site.result("import time\ntime.sleep(600)", &["--timeout", "1"]);
    assert_eq!(
        (&result["status"], &result["exit_code"]),
        (&json!("timeout"), &Value::Null)
    );
    assert_eq!(result["reason"], "DEADLINE");
}

#[test]
fn outputs_that_are_no_files_of_the_script_are_refused_by_reason() {
    let site = Site::parked(1);
    let text = r"
import os, socket
os.symlink('/etc/passwd', 'link')
os.mkfifo('fifo')
os.mkdir('folder')
open('large', 'wb').truncate(3 << 20)
open('binary', 'wb').write(b'\xff')
open('good[1]', 'w').write('good')
print('x' * 300000)";
    let expected = [
        "link",
        "fifo",
        "folder",
        "large",
        "binary:text",
        "missing",
        "good[1]:text",
    ];
    let expected = expected.map(|path| format!("--output={path}"));
    let result = site.result(text, &expected.each_ref().map(String::as_str));
    assert_eq!(result["status"], "failure");
    assert_eq!(
        (&result["exit_code"], &result["reason"]),
        (&json!(0), &json!("EXITED"))
    );
    assert_eq!(
        result["outputs"],
        json!([{ "path": "good[1]", "text": "good" }])
    );
    let refused = |path: &str, reason: &str| json!({ "path": path, "reason": reason });
    assert_eq!(
        result["refused_outputs"],
        json!([
            refused("link", "it is a link"),
            refused("fifo", "it is a FIFO"),
            refused("folder", "it is a folder"),
            refused(
                "large",
                "its 3145728 bytes exceed the limit, of which 2097147 bytes are left"
            ),
            refused("binary", "it is not UTF-8, and was asked for as text"),
            refused("missing", "there is no such file"),
        ])
    );
    assert_eq!(
        result["message"],
        "the output `link` is refused: it is a link"
    );
    assert_eq!(result["stdout"].as_str().unwrap().len(), 256 << 10);
    assert_eq!(result["stdout_bytes"], 300_001);
}

#[test]
fn failures_of_a_script_are_told_from_those_of_what_it_runs_in() {
    let site = Site::parked(2);
    let result = site.result("import sys\nsys.exit(126)", &[]);
    assert_eq!(
        (&result["exit_code"], &result["reason"]),
        (&json!(126), &json!("EXITED"))
    );
    assert_eq!(result["message"], "the script ended with status 126");
    let result = site.result("b = bytearray(3 << 30)\nprint(len(b), max(b))", &[]);
    assert_eq!(
        (&result["exit_code"], &result["reason"]),
        (&Value::Null, &json!("OUT_OF_MEMORY")),
        "{result}"
    );
    assert_eq!(result["status"], "failure");
    let result = site.result("import os\nos.kill(os.getpid(), 9)", &[]);
    assert_eq!(result["reason"], "SIGNALED");

    // What is no script is refused before a slot is claimed.
    for (words, why) in [
        (
            &["--output=../x"][..],
            "`expected_outputs[0].path` is \"../x\"",
        ),
        (&["--output=x:picture"], "`picture` must be text or binary"),
        (&["--timeout=0"], "`timeout` is `0s`"),
        (&["--env=LD_PRELOAD=x"], "`env[\"LD_PRELOAD\"]`"),
    ] {
        let ran = site.run("1", words);
        let stderr = String::from_utf8_lossy(&ran.stderr);
        assert!(stderr.contains(why), "{stderr}");
    }
    let empty = site.run(" \n", &[]);
    assert_eq!(empty.status.code(), Some(125));
    let stderr = String::from_utf8_lossy(&empty.stderr);
    assert!(
        stderr.contains("`script` is ` \n`; must be the text of a script"),
        "{stderr}"
    );
    for (words, why) in [
        (
            &["--prompt", "hello"][..],
            "`command` is `a prompt`; must be an argv, because Python has no model",
        ),
        (
            &["--stored", "--", "python", "-V"],
            "`credential` is `set`; must be absent, because scripts in Python have no credential",
        ),
    ] {
        let mut run = site.shim.command(&["run", "python"]);
        let ran = output(run.args(words));
        let stderr = String::from_utf8_lossy(&ran.stderr);
        assert!(stderr.contains(why), "{stderr}");
    }
}

#[test]
fn a_caller_that_is_gone_ends_its_script() {
    let site = Site::start(1, &[]);
    let script = site.script("import time\ntime.sleep(600)");
    let log = site.folder.path().join("log");
    let mut caller = Process::start(&mut site.command(&script, &["--timeout", "600"]), &log);
    let client = site.shim.client();
    let started = wait_until("the script", Duration::from_secs(60), || {
        let mut runs = client
            .list_runs(ListRunsRequest::default())
            .unwrap()
            .runs
            .into_iter();
        let running = runs.find(|run| run.state() == RunState::Running);
        running.ok_or_else(|| caller.log())
    });
    caller.end(Signal::SIGKILL);
    wait_until("its end", Duration::from_secs(60), || {
        let runs = client.list_runs(ListRunsRequest::default()).unwrap().runs;
        let run = runs.iter().find(|run| run.run_id == started.run_id);
        let exited = run.and_then(|run| run.exited.clone());
        match exited {
            Some(exited) => {
                assert_eq!(exited.reason(), ExitReason::Cancelled);
                Ok(())
            }
            None => Err(format!("{run:?}")),
        }
    });
}
