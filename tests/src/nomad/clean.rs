//! Removes what a stopped agent leaves behind.

use std::{
    collections::HashSet,
    path::Path,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use procfs::process::{Process, all_processes};

use super::Nomad;
use crate::{broker::brokers, process::output};

/// Ends the drivers whose program is below `folder`, and the brokers whose socket is. A driver with live tasks
/// outlives its agent, and so does for a moment one that the agent had just started. A broker
/// with containers outlives its driver.
pub(crate) fn stop_drivers(folder: &Path) {
    let is_ours = |process: &Process| {
        let name = |program: &Path| {
            let name = program.file_name().unwrap_or_default();
            name.to_string_lossy().starts_with("nomad-driver-polydev")
        };
        let program = process.exe();
        program.is_ok_and(|program| program.starts_with(folder) && name(&program))
    };
    let mut told = HashSet::new();
    let limit = Instant::now() + Duration::from_secs(30);
    while Instant::now() < limit {
        let all = all_processes().expect("processes can be listed").flatten();
        let mut ours: Vec<_> = all.filter(is_ours).map(|process| process.pid).collect();
        ours.extend(brokers(folder).iter().map(|pid| pid.as_raw()));
        if ours.is_empty() {
            return;
        }
        for pid in ours {
            if told.insert(pid) {
                let _gone = kill(Pid::from_raw(pid), Signal::SIGTERM);
            }
        }
        std::thread::park_timeout(Duration::from_millis(20));
    }
}

/// Removes a driver's containers and its network. dockerd finishes what a driver that was killed
/// has asked for: a container may come late, and a network may have one that is going.
pub(crate) fn remove_from_docker(instance: &str) {
    let name = format!("polydev-{instance}");
    let label = format!("dev.polydev.instance={instance}");
    let list = ["network", "ls", "--quiet", "--filter"];
    let limit = Instant::now() + Duration::from_secs(60);
    loop {
        for id in crate::docker::containers(&label) {
            output(crate::docker::command().args(["rm", "--force", &id]));
        }
        let removed = output(crate::docker::command().args(["network", "rm", &name]));
        let left = output(
            crate::docker::command()
                .args(list)
                .arg(format!("name={name}")),
        );
        if left.status.success() && left.stdout.is_empty() {
            return;
        }
        if Instant::now() > limit {
            let why = String::from_utf8_lossy(&removed.stderr);
            eprintln!("network {name} is left behind: {why}");
            return;
        }
        std::thread::park_timeout(Duration::from_millis(100));
    }
}

impl Nomad {
    /// Whether any allocation is running or pending.
    fn has_live_allocations(&self) -> bool {
        let all = self.get("/v1/allocations");
        let mut all = all.as_array().into_iter().flatten();
        all.any(|alloc| alloc["ClientStatus"] == "running" || alloc["ClientStatus"] == "pending")
    }
}

impl Drop for Nomad {
    fn drop(&mut self) {
        let jobs = self.get("/v1/jobs");
        let jobs = jobs
            .as_array()
            .into_iter()
            .flatten()
            .filter(|job| job["Status"] != "dead")
            .filter_map(|job| job["ID"].as_str());
        for job in jobs {
            output(&mut self.command(&["job", "stop", "-purge", "-yes", job]));
        }
        // A stopping agent does not end tasks.
        let limit = Instant::now() + Duration::from_secs(60);
        while self.has_live_allocations() && Instant::now() < limit {
            std::thread::park_timeout(Duration::from_millis(50));
        }
        // The folder removes the rest when it is dropped.
        self.agent = None;
    }
}
