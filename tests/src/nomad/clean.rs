//! Removes what a stopped agent leaves behind.

use std::{
    fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use super::Nomad;
use crate::process::output;

/// Ends the driver of a state folder, if its program is below `folder`. A driver with live tasks
/// outlives its agent.
pub(crate) fn stop_driver(state_dir: &Path, folder: &Path) {
    let lock = fs::read_to_string(state_dir.join("driver.lock"));
    let Some(pid) = lock.ok().and_then(|pid| pid.trim().parse().ok()) else {
        return;
    };
    let is_ours = || {
        let program = fs::read_link(format!("/proc/{pid}/exe"));
        program.is_ok_and(|program| program.starts_with(folder))
    };
    if is_ours() {
        let _gone = kill(Pid::from_raw(pid), Signal::SIGTERM);
        let limit = Instant::now() + Duration::from_secs(30);
        while is_ours() && Instant::now() < limit {
            std::thread::park_timeout(Duration::from_millis(20));
        }
    }
}

impl Nomad {
    /// Unmounts the secrets of ended tasks. Nomad keeps them mounted until it collects the tasks.
    fn unmount(&self) {
        let mounts = procfs::process::Process::myself().and_then(|me| me.mountinfo());
        let mounts = mounts.map(|mounts| mounts.0).unwrap_or_default();
        let ours =
            |mount: &&procfs::process::MountInfo| mount.mount_point.starts_with(self.folder.path());
        for mount in mounts.iter().filter(ours) {
            output(Command::new("umount").arg(&mount.mount_point));
        }
    }

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
        self.agent = None;
        stop_driver(&self.state_dir(), self.folder.path());
        let instance = fs::read_to_string(self.state_dir().join("instance"));
        self.unmount();
        // A stopping agent does not end tasks: the containers of a failed test are still there.
        if let Ok(instance) = instance {
            let label = format!("dev.polydev.instance={instance}");
            for id in crate::docker::containers(&label) {
                output(crate::docker::command().args(["rm", "--force", &id]));
            }
            output(crate::docker::command().args([
                "network",
                "rm",
                &format!("polydev-{instance}"),
            ]));
            crate::host::remove_rules(instance.trim());
        }
    }
}
