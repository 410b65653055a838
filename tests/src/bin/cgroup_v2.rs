//! The limits of the driver on a kernel that has only cgroup v2. `tests/cgroup-v2.sh` boots a
//! small virtual machine with this program as its init. The program prints `PASSED` or the
//! error, and switches the machine off.

use std::{
    fs,
    io::Read,
    os::unix::process::CommandExt,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, ensure};
use nix::{
    mount::{MsFlags, mount},
    sys::reboot::{RebootMode, reboot},
};
use polydev_driver::limits::{self, Handle, Limits};

const GROUP: &str = "/sys/fs/cgroup/task";

#[expect(
    clippy::print_stdout,
    reason = "the console is all that is seen of the machine"
)]
fn main() {
    // As the command in the group, this program uses memory until it is killed, or waits.
    match std::env::args().nth(1).as_deref() {
        Some("eat") => {
            let mut eaten = Vec::new();
            loop {
                eaten.push(vec![1_u8; 1 << 20]);
                std::hint::black_box(&eaten);
            }
        }
        Some("wait") => {
            let _end = std::io::stdin().read(&mut [0]);
            return;
        }
        _ => {}
    }
    match run() {
        Ok(()) => println!("PASSED"),
        Err(error) => println!("FAILED: {error:#}"),
    }
    let _never_returns = reboot(RebootMode::RB_POWER_OFF);
}

fn run() -> anyhow::Result<()> {
    for (kind, target) in [
        ("devtmpfs", "/dev"),
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("cgroup2", "/sys/fs/cgroup"),
    ] {
        fs::create_dir_all(target)?;
        mount(
            Some(kind),
            target,
            Some(kind),
            MsFlags::empty(),
            None::<&str>,
        )
        .with_context(|| format!("cannot mount {kind}"))?;
    }
    fs::write(
        "/sys/fs/cgroup/cgroup.subtree_control",
        "+cpu +memory +pids",
    )?;
    fs::create_dir(GROUP)?;
    ensure!(limits::cgroup_version() == 2, "the version is not seen");

    let read = |name: &str| -> anyhow::Result<String> {
        let text =
            fs::read_to_string(Path::new(GROUP).join(name)).with_context(|| name.to_owned())?;
        Ok(text.trim().to_owned())
    };
    let mut waiting = in_group("wait")?;
    let handle = Handle::open_shaped(waiting.id(), None)?;
    for (class, quota) in [
        (Limits::IDLE, "10000 100000"),
        (Limits::RUN, "50000 100000"),
        (Limits::IDLE, "10000 100000"),
    ] {
        handle.set(&class)?;
        let seen = [read("cpu.max")?, read("memory.max")?, read("pids.max")?];
        let expected = [
            quota.to_owned(),
            class.memory_bytes().to_string(),
            class.pids.to_string(),
        ];
        ensure!(seen == expected, "{seen:?} instead of {expected:?}");
    }
    let usage = handle.usage();
    ensure!(
        usage.memory > 0 && usage.memory_max > 0 && !usage.cpu.is_zero(),
        "no usage: {usage:?}"
    );
    ensure!(handle.oom_kills() == 0, "killed too early");

    // The kernel kills a process that uses too much memory, and counts the kill.
    handle.set(&Limits {
        memory_mb: 64,
        ..Limits::IDLE
    })?;
    let status = in_group("eat")?.wait()?;
    ensure!(!status.success(), "it ate it all");
    ensure!(handle.oom_kills() >= 1, "the kill is not counted");

    drop(waiting.stdin.take());
    waiting.wait()?;
    Ok(())
}

/// Starts this program again. The new process is in the group before it does anything.
fn in_group(what: &str) -> anyhow::Result<std::process::Child> {
    let mut command = Command::new("/proc/self/exe");
    let child = spawn(command.arg0("task").arg(what))?;
    fs::write(
        Path::new(GROUP).join("cgroup.procs"),
        child.id().to_string(),
    )?;
    Ok(child)
}

fn spawn(command: &mut Command) -> anyhow::Result<std::process::Child> {
    Ok(command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?)
}
