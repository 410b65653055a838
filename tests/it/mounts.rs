//! What a plain task mounts is what was checked, whatever its name leads to by then.

use std::{
    collections::HashSet,
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use nix::{
    fcntl::{AT_FDCWD, RenameFlags, renameat2},
    unistd::Pid,
};
use polydev_tests::{
    folder::Folder,
    job::{self, batch, events, merge, shell},
    nomad::Nomad,
    process::Process,
    wait_until,
};
use serde_json::json;

use crate::survive::kill_driver;

#[test]
fn a_folder_that_is_exchanged_while_a_task_starts_does_not_lead_out() {
    race(Duration::from_secs(5));
}

/// Starts tasks that mount a folder of their allocation, while the folder and a link to another
/// folder of the host change places all the time.
pub(crate) fn race(time: Duration) {
    let nomad = Nomad::start();
    let outside = Folder::new("pdtest-");
    fs::write(outside.path().join("outside"), "").expect("the folder is there");
    let allocations = nomad.folder().join("data/alloc");
    let is_over = AtomicBool::new(false);
    let (mut seen, mut refused) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| exchange(&allocations, outside.path(), &is_over));
        let _over = Over(&is_over);
        let begin = Instant::now();
        // Both ends have been seen, so the places were changed in between.
        for round in 0..1000 {
            if begin.elapsed() > time && seen > 0 && refused > 0 {
                break;
            }
            let mut config = shell("ls /x");
            merge(&mut config, json!({ "volumes": ["../alloc/own:/x:ro"] }));
            let name = format!("race-{round}");
            let mut job = batch(&name, config);
            job["TaskGroups"][0]["Count"] = json!(8);
            nomad.submit(&job);
            let ended = |alloc: &serde_json::Value| {
                matches!(alloc["ClientStatus"].as_str(), Some("complete" | "failed"))
            };
            wait_until("the ends", Duration::from_secs(60), || {
                let all = nomad.allocations(&name);
                let are_over = all.len() == 8 && all.iter().all(ended);
                are_over
                    .then_some(())
                    .ok_or(format!("{} are there", all.len()))
            });
            for alloc in nomad.allocations(&name) {
                let listed = nomad.logs(job::id(&alloc), "stdout");
                let listed = String::from_utf8_lossy(&listed).into_owned();
                assert!(!listed.contains("outside"), "{name}: {listed}");
                if alloc["ClientStatus"] == "complete" {
                    // Some of them start before there is a file in the folder.
                    seen += u32::from(listed.contains("inside"));
                } else {
                    let why = events(&alloc);
                    assert!(why.contains("`volumes` is `../alloc/own`"), "{why}");
                    refused += 1;
                }
            }
        }
    });
}

/// Ends the other thread, whether or not the test has failed.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn exchange(allocations: &Path, outside: &Path, is_over: &AtomicBool) {
    let mut known = HashSet::new();
    while !is_over.load(Ordering::Relaxed) {
        for entry in fs::read_dir(allocations).into_iter().flatten().flatten() {
            let [own, link] = ["own", "link"].map(|name| entry.path().join("alloc").join(name));
            if !known.contains(&own) && !prepare(&own, &link, outside) {
                continue;
            }
            known.insert(own.clone());
            let exchange = RenameFlags::RENAME_EXCHANGE;
            let _gone = renameat2(AT_FDCWD, &own, AT_FDCWD, &link, exchange);
        }
        // The containers need the cores as well.
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Whether both are there. The driver may have created the folder.
fn prepare(own: &PathBuf, link: &Path, outside: &Path) -> bool {
    let _exists = fs::create_dir(own);
    fs::write(own.join("inside"), "").is_ok() && symlink(outside, link).is_ok()
}

/// On most machines mounts are shared: what is unmounted in a copy is unmounted everywhere, and
/// other programs, dockerd among them, may have copies of all mounts.
#[test]
fn mounts_that_nomad_and_others_have_stay_as_they_are_when_tasks_start() {
    let nomad = Nomad::start_on_shared_mounts();
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "slave", "sleep", "1000"]);
    let other = Process::start(&mut command, &nomad.folder().join("other.log"));
    let start = |name: &str| {
        let mut config =
            shell("until [ -e /whole/local/go ]; do sleep 0.05; done; cat /secrets/own");
        merge(&mut config, json!({ "volumes": [".:/whole"] }));
        nomad.submit(&batch(name, config));
        nomad.wait_started(name)
    };
    let stage = nomad.state_dir().join("stage");
    let below = |pid: Pid, folder: &Path| {
        let mounts = procfs::process::Process::new(pid.as_raw()).and_then(|it| it.mountinfo());
        let points = mounts.expect("the mounts can be read").into_iter();
        let points = points.map(|mount| mount.mount_point);
        let mut points: Vec<_> = points.filter(|point| point.starts_with(folder)).collect();
        points.sort();
        points
    };
    let expected = [stage.clone(), stage.join("making")];
    for name in ["first", "after-a-kill"] {
        let id = start(name);
        let folder = nomad.folder().join("data/alloc").join(&id).join("task");
        let own = ["private", "secrets"].map(|name| folder.join(name));
        for pid in [nix::unistd::getpid(), other.pid()] {
            assert_eq!(below(pid, &folder), own, "{pid}");
            wait_until("an empty stage", Duration::from_secs(10), || {
                let left = below(pid, &stage);
                (left == expected).then_some(()).ok_or(format!("{left:?}"))
            });
        }
        fs::write(folder.join("secrets/own"), name).expect("the folder is there");
        fs::write(folder.join("local/go"), "").expect("the folder is there");
        let alloc = nomad.wait_dead(name);
        assert_eq!(nomad.logs(job::id(&alloc), "stdout"), name.as_bytes());
        kill_driver(&nomad);
        nomad.wait_healthy();
    }
}

/// Row 1 of the users' jobs: a task makes files of its own beside Nomad's, which it cannot change.
#[test]
fn in_the_folder_of_logs_what_is_nomads_is_covered_and_the_rest_is_the_tasks() {
    let closed = Nomad::start();
    let try_it = "mkdir /alloc/logs/app 2>/dev/null || echo closed; sleep 1";
    closed.submit(&batch("closed", shell(try_it)));
    let alloc = closed.wait_dead("closed");
    assert_eq!(closed.logs(job::id(&alloc), "stdout"), b"closed\n");
    drop(closed);

    let nomad = Nomad::start_with("volumes {\n enabled = true\n}");
    let script = r#"
        cd /alloc/logs
        mkdir app && echo own >app/a.log && cat app/a.log
        for file in .task.stdout.fifo .task.stderr.fifo; do
            [ -c $file ] && echo covered
        done
        for file in task.stdout.0 task.stderr.0; do
            (echo forged >>$file) 2>/dev/null && echo "changed $file"
            rm -f $file 2>/dev/null && echo "removed $file"
            mv $file elsewhere 2>/dev/null && echo "moved $file"
        done
        echo forged >.task.stdout.fifo
        mv /alloc/logs /alloc/elsewhere 2>/dev/null && echo "moved the folder"
        sleep 1
    "#;
    nomad.submit(&batch("logs", job::shell(script)));
    let alloc = nomad.wait_dead("logs");
    let told = nomad.logs(job::id(&alloc), "stdout");
    assert_eq!(String::from_utf8_lossy(&told), "own\ncovered\ncovered\n");
    let path = format!(
        "/v1/client/fs/cat/{}?path=alloc/logs/app/a.log",
        job::id(&alloc)
    );
    assert_eq!(nomad.get_raw(&path), b"own\n");
}
