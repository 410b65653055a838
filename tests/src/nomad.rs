//! A real Nomad agent, both server and client, with our driver in its plugin folder.

pub(crate) mod clean;
mod exec;
mod jobs;
mod start;

pub use exec::Exec;

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use nix::unistd::Pid;
use serde_json::Value;

use crate::{
    folder::Folder,
    process::{Process, output, succeed},
    root, wait_until,
};

/// Dropping the agent purges its jobs and stops it.
pub struct Nomad {
    agent: Option<Process>,
    pub address: String,
    folder: Folder,
    /// A folder that comes first in the agent's `PATH`.
    programs: Option<PathBuf>,
    /// Agent and driver log at level `trace`.
    traced: bool,
    /// The agent keeps its state on disk, for an agent after it.
    lasting: bool,
}

/// The `nomad` program: `tests/test.sh` says where it is.
#[must_use]
pub fn nomad_program() -> PathBuf {
    std::env::var_os("POLYDEV_NOMAD")
        .unwrap_or_else(|| "nomad".into())
        .into()
}

impl Nomad {
    fn spawn_agent(&self) -> Process {
        let mut command = Command::new(nomad_program());
        let folder = self.folder.path();
        command
            .args(["agent", "-config"])
            .arg(folder.join("agent.hcl"));
        if let Some(programs) = &self.programs {
            let ours = std::env::var_os("PATH").unwrap_or_default();
            let all = std::iter::once(programs.clone()).chain(std::env::split_paths(&ours));
            let path = std::env::join_paths(all).expect("a folder's name has no colon");
            command.env("PATH", path);
        }
        if !self.lasting {
            command.arg("-dev");
        }
        if self.traced {
            // The option overrides the file.
            command.args(["-log-level", "TRACE"]);
            command.env("POLYDEV_LOG", "trace");
        }
        Process::start(&mut command, &folder.join("nomad.log"))
    }

    /// Stops the agent, if it still runs, and starts another one. Waits for a healthy driver.
    ///
    /// # Panics
    /// If the agent is not [lasting](Nomad::start_lasting).
    pub fn restart(&mut self) {
        assert!(self.lasting, "an agent in dev mode forgets its tasks");
        self.agent = None;
        self.agent = Some(self.spawn_agent());
        self.wait_healthy();
    }

    /// Replaces the files of driver and init with another version, as a package would. The next
    /// driver that the agent starts is the new one.
    ///
    /// # Panics
    /// If the disk is full.
    pub fn upgrade(&self) {
        for path in ["plugins/nomad-driver-polydev", "polydev-init"] {
            let (path, new) = (
                self.folder.path().join(path),
                self.folder.path().join("new"),
            );
            fs::copy(&path, &new).expect("a file can be copied");
            let file = fs::File::options().append(true).open(&new);
            let written = file.and_then(|mut file| file.write_all(b"another version"));
            written.expect("a file can be written");
            fs::rename(&new, &path).expect("both are in one folder");
        }
    }

    /// Removes the plugin socket of the driver while the agent is stopped. The next agent cannot
    /// attach to this driver, because go-plugin finds no socket at the recorded address.
    ///
    /// # Panics
    /// If no driver runs.
    pub fn forget_plugin(&self) {
        let lock = fs::read_to_string(self.state_dir().join("driver.lock"));
        let pid = lock.expect("a driver runs").trim().parse();
        let driver = procfs::process::Process::new(pid.expect("a pid")).expect("a driver runs");
        let open = driver.fd().expect("root may look").flatten();
        let sockets: Vec<u64> = open
            .filter_map(|fd| match fd.target {
                procfs::process::FDTarget::Socket(inode) => Some(inode),
                _ => None,
            })
            .collect();
        let listening = procfs::net::unix().expect("root may look").into_iter();
        let named = listening.filter(|socket| sockets.contains(&socket.inode));
        let plugin = named.filter_map(|socket| socket.path).find(|path| {
            let folder = path.parent().and_then(Path::file_name).unwrap_or_default();
            folder.to_string_lossy().starts_with("polydev-plugin-")
        });
        let plugin = plugin.expect("a plugin listens for its agent");
        fs::remove_file(plugin).expect("the socket exists");
    }

    /// Waits until the driver is healthy on the node.
    #[track_caller]
    pub fn wait_healthy(&self) {
        wait_until("a healthy driver", Duration::from_secs(60), || {
            let driver = self.driver();
            if driver["Healthy"] == true {
                Ok(())
            } else {
                Err(driver.to_string())
            }
        });
    }

    /// The processes that read logs for this agent, from FIFOs in its data folder.
    #[must_use]
    pub fn log_readers(&self) -> Vec<Pid> {
        let fifos = |process: &procfs::process::Process| {
            let mut open = process.fd().into_iter().flatten().flatten();
            open.any(|fd| match fd.target {
                procfs::process::FDTarget::Path(path) => {
                    path.starts_with(self.folder.path().join("data"))
                        && path
                            .extension()
                            .is_some_and(|extension| extension == "fifo")
                }
                _ => false,
            })
        };
        let all = procfs::process::all_processes().expect("processes can be listed");
        all.flatten()
            .filter(|process| {
                process
                    .cmdline()
                    .is_ok_and(|line| line.iter().any(|arg| arg == "logmon"))
            })
            .filter(fifos)
            .map(|process| Pid::from_raw(process.pid))
            .collect()
    }

    /// The folder that contains all files of the agent and the driver.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    #[must_use]
    pub fn state_dir(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    /// The agent's process.
    ///
    /// # Panics
    /// Only while the agent is being dropped.
    pub fn agent(&mut self) -> &mut Process {
        self.agent.as_mut().expect("an agent until the drop")
    }

    /// The log of the agent, which contains the log of the driver.
    #[must_use]
    pub fn agent_log(&self) -> String {
        self.agent.as_ref().map(Process::log).unwrap_or_default()
    }

    /// `nomad ARGS` for this agent.
    #[must_use]
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(nomad_program());
        command
            .args(args)
            .env("NOMAD_ADDR", &self.address)
            // As with `Shim::dev`.
            .env("NOMAD_VAR_agent", "false")
            .current_dir(root());
        command
    }

    /// Runs `nomad ARGS`. The command must succeed.
    #[track_caller]
    pub fn run(&self, args: &[&str]) -> String {
        succeed(&mut self.command(args))
    }

    /// Sends a PUT to a path of the HTTP API. The request must succeed.
    #[track_caller]
    pub fn put(&self, path: &str, body: &Value) -> Value {
        let url = format!("{}{path}", self.address);
        let body = body.to_string();
        let mut command = Command::new("curl");
        command.args([
            "--silent",
            "--show-error",
            "--fail-with-body",
            "--noproxy",
            "*",
        ]);
        let answer = succeed(command.args(["--request", "PUT", "--data-binary", &body, &url]));
        serde_json::from_str(&answer).unwrap_or_default()
    }

    /// The raw answer to a GET of a path of the HTTP API, or nothing if the request fails.
    #[must_use]
    pub fn get_raw(&self, path: &str) -> Vec<u8> {
        let url = format!("{}{path}", self.address);
        let mut command = Command::new("curl");
        output(command.args(["--silent", "--fail", "--noproxy", "*", &url])).stdout
    }

    /// The answer to a GET of a path of the HTTP API, or null if the request fails.
    #[must_use]
    pub fn get(&self, path: &str) -> Value {
        let url = format!("{}{path}", self.address);
        let mut command = Command::new("curl");
        let answer = output(command.args(["--silent", "--fail", "--noproxy", "*", &url]));
        serde_json::from_slice(&answer.stdout).unwrap_or_default()
    }

    /// The node's entry for our driver.
    #[must_use]
    pub fn driver(&self) -> Value {
        let nodes = self.get("/v1/nodes");
        nodes[0]["Drivers"]["polydev"].clone()
    }
}
