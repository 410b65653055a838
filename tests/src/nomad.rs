//! A real Nomad agent, server and client in one, with our driver in its plugin
//! folder.

pub(crate) mod clean;
mod exec;

pub use exec::Exec;

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use nix::{
    mount::{MsFlags, mount},
    unistd::Pid,
};
use serde_json::Value;

use crate::{
    folder::Folder,
    process::{Process, output, succeed},
    program, root, wait_until,
};

/// Dropping it purges its jobs and stops it.
pub struct Nomad {
    agent: Option<Process>,
    pub address: String,
    folder: Folder,
    /// Where programs are looked for, this machine's own places apart.
    programs: Option<PathBuf>,
    /// The driver logs all that it can.
    traced: bool,
}

/// The `nomad` program: `tests/test.sh` says where it is.
#[must_use]
pub fn nomad_program() -> PathBuf {
    std::env::var_os("POLYDEV_NOMAD")
        .unwrap_or_else(|| "nomad".into())
        .into()
}

impl Nomad {
    /// Starts an agent and waits until the driver is healthy on its node.
    #[must_use]
    pub fn start() -> Self {
        Self::start_with("")
    }

    /// As [`Nomad::start`], with `options` of the plugin beside the needed ones.
    #[must_use]
    pub fn start_with(options: &str) -> Self {
        let nomad = Self::launch(options);
        nomad.wait_healthy();
        nomad
    }

    /// As [`Nomad::start_with`], with Nomad's own Docker driver beside ours.
    #[must_use]
    pub fn start_beside_docker(options: &str) -> Self {
        let nomad = Self::launch_with(options, "polydev,docker");
        nomad.wait_healthy();
        nomad
    }

    /// As [`Nomad::start_with`], with the programs of a folder in its `PATH`.
    #[must_use]
    pub fn start_with_programs(options: &str, folder: &Path) -> Self {
        let mut nomad = Self::configure(options, "polydev");
        nomad.programs = Some(folder.to_owned());
        let nomad = nomad.run_agent();
        nomad.wait_healthy();
        nomad
    }

    /// As [`Nomad::start`]; agent and driver log all that they can.
    #[must_use]
    pub fn start_traced() -> Self {
        let mut nomad = Self::configure("", "polydev");
        nomad.traced = true;
        let nomad = nomad.run_agent();
        nomad.wait_healthy();
        nomad
    }

    /// As [`Nomad::start_with`], with 4 MB for the driver's own files.
    ///
    /// # Panics
    /// Without root's rights.
    #[must_use]
    pub fn start_with_small_state(options: &str) -> Self {
        let nomad = Self::configure(options, "polydev");
        let state = nomad.state_dir();
        fs::create_dir(&state).expect("a folder can be made");
        let kind = Some("tmpfs");
        mount(kind, &state, kind, MsFlags::empty(), Some("size=4m")).expect("root may mount");
        let nomad = nomad.run_agent();
        nomad.wait_healthy();
        nomad
    }

    /// Starts an agent whose plugin has `options` besides the needed ones, and does
    /// not wait for anything.
    #[must_use]
    pub fn launch(options: &str) -> Self {
        Self::launch_with(options, "polydev")
    }

    fn launch_with(options: &str, drivers: &str) -> Self {
        Self::configure(options, drivers).run_agent()
    }

    fn run_agent(mut self) -> Self {
        self.agent = Some(self.spawn_agent());
        self.wait_registered();
        self
    }

    /// Waits until the agent's node is registered, or the agent has ended: whoever starts one
    /// begins to count from there. A server refuses a node while its keyring is not there yet,
    /// and the agent tries again 15 to 30 s later (Nomad 1.11.3, `client/client.go`).
    #[track_caller]
    fn wait_registered(&mut self) {
        wait_until("a registered node", Duration::from_secs(120), || {
            if self.agent().exit().is_some() {
                return Ok(());
            }
            match self.get("/v1/nodes") {
                Value::Array(nodes) if !nodes.is_empty() => Ok(()),
                other => Err(other.to_string()),
            }
        });
    }

    fn configure(options: &str, drivers: &str) -> Self {
        let folder = Folder::new("pdtest-");
        let plugins = folder.path().join("plugins");
        fs::create_dir(&plugins).expect("a folder can be made");
        fs::copy(
            program("nomad-driver-polydev"),
            plugins.join("nomad-driver-polydev"),
        )
        .expect("the driver is built");
        let init = folder.path().join("polydev-init");
        fs::copy(program("polydev-init"), &init).expect("init is built");
        let [http, rpc, serf] = crate::free_ports();
        let config = format!(
            r#"
            data_dir   = "{data}"
            plugin_dir = "{plugins}"
            bind_addr  = "127.0.0.1"
            log_level  = "DEBUG"
            ports {{
              http = {http}
              rpc  = {rpc}
              serf = {serf}
            }}
            advertise {{
              http = "127.0.0.1"
              rpc  = "127.0.0.1"
              serf = "127.0.0.1"
            }}
            server {{
              enabled          = true
              bootstrap_expect = 1
            }}
            client {{
              enabled           = true
              network_interface = "lo"
              cpu_total_compute = 8000
              memory_total_mb   = 16384
              # What has ended is looked at, however full this machine's disk is.
              gc_max_allocs            = 1000
              gc_disk_usage_threshold  = 99
              gc_inode_usage_threshold = 99
              cni_path          = "/usr/lib/cni"
              options = {{
                "fingerprint.denylist" = "env_aws,env_gce,env_azure,env_digitalocean"
                "driver.allowlist"     = "{drivers}"
              }}
            }}
            telemetry {{
              publish_allocation_metrics = true
            }}
            plugin "nomad-driver-polydev" {{
              config {{
                state_dir = "{state}"
                init_path = "{init}"
                {options}
              }}
            }}
            "#,
            data = folder.path().join("data").display(),
            plugins = plugins.display(),
            state = folder.path().join("state").display(),
            init = init.display(),
        );
        fs::write(folder.path().join("agent.hcl"), config).expect("a file can be written");
        Self {
            agent: None,
            address: format!("http://127.0.0.1:{http}"),
            folder,
            programs: None,
            traced: false,
        }
    }

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
        if self.traced {
            // Before what the file says.
            command.args(["-log-level", "TRACE"]);
            command.env("POLYDEV_LOG", "trace");
        }
        Process::start(&mut command, &folder.join("nomad.log"))
    }

    /// Stops the agent, if it has not ended, and starts another in its place; waits
    /// until the driver is healthy.
    pub fn restart(&mut self) {
        self.agent = None;
        self.agent = Some(self.spawn_agent());
        self.wait_healthy();
    }

    /// Puts another driver and another init in the places of those that run, as a package
    /// would: the next driver is the new one.
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

    /// Makes an agent that is not running unable to attach to the driver it had: go-plugin
    /// finds nobody at the address it knows.
    ///
    /// # Panics
    /// If no driver runs.
    pub fn forget_plugin(&self) {
        let lock = fs::read_to_string(self.state_dir().join("driver.lock"));
        let pid = lock.expect("a driver runs").trim().parse();
        let driver = procfs::process::Process::new(pid.expect("a pid")).expect("it runs");
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
        fs::remove_file(plugin).expect("it is there");
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

    /// Processes that read logs for this agent: of its data folder's FIFOs.
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

    /// Everything the agent and the driver keep is below this folder.
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
    /// Never while the agent is not being dropped.
    pub fn agent(&mut self) -> &mut Process {
        self.agent.as_mut().expect("it lives as long as this")
    }

    /// What the agent, and through it the driver, has logged.
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
            .current_dir(root());
        command
    }

    /// `nomad ARGS`, which must succeed.
    #[track_caller]
    pub fn run(&self, args: &[&str]) -> String {
        succeed(&mut self.command(args))
    }

    /// Submits a file of `jobspecs/`.
    #[track_caller]
    pub fn submit_pool(&self, provider: &str, count: u32) {
        self.submit_pool_with(provider, count, "prepare_ahead=false");
    }

    /// As [`Nomad::submit_pool`], with one more of the file's variables, `NAME=VALUE`.
    #[track_caller]
    pub fn submit_pool_with(&self, provider: &str, count: u32, variable: &str) {
        let file = format!("jobspecs/pool-{provider}.nomad.hcl");
        let count = format!("count={count}");
        self.run(&[
            "job", "run", "-detach", "-var", &count, "-var", variable, &file,
        ]);
    }

    /// Submits a job given as the API's JSON.
    #[track_caller]
    pub fn submit(&self, job: &Value) {
        self.put("/v1/jobs", &serde_json::json!({ "Job": job }));
    }

    /// PUT to a path of the HTTP API, which must succeed.
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

    /// The one allocation of a job, once it has a task whose state `is` as wanted.
    #[track_caller]
    pub fn wait_task(&self, job: &str, is: impl Fn(&Value) -> bool) -> Value {
        let what = format!("the task of job {job}");
        wait_until(&what, Duration::from_secs(90), || {
            let allocations = self.allocations(job);
            let Some(alloc) = allocations.last() else {
                return Err(self.get(&format!("/v1/job/{job}/evaluations")).to_string());
            };
            if is(&alloc["TaskStates"]["task"]) {
                Ok(alloc.clone())
            } else {
                Err(alloc["TaskStates"].to_string())
            }
        })
    }

    /// Waits until the task of a job runs; its allocation's id.
    #[track_caller]
    pub fn wait_started(&self, job: &str) -> String {
        let alloc = self.wait_task(job, |task| task["State"] == "running");
        alloc["ID"]
            .as_str()
            .expect("an allocation has an id")
            .to_owned()
    }

    /// Waits until the task of a job has ended for good; its allocation.
    #[track_caller]
    pub fn wait_dead(&self, job: &str) -> Value {
        self.wait_task(job, |task| task["State"] == "dead")
    }

    /// A task's collected output, once it ends as wanted or the time is up.
    #[must_use]
    pub fn logs(&self, alloc: &str, stream: &str) -> Vec<u8> {
        self.get_raw(&format!(
            "/v1/client/fs/logs/{alloc}?task=task&type={stream}&plain=true&origin=start"
        ))
    }

    /// A command in a running task, over the agent's web socket: what Nomad's command
    /// line does, with the sizes of its conformance suite for the terminal.
    #[track_caller]
    pub fn exec(&self, alloc: &str, command: &[&str], tty: bool, stdin: &[u8]) -> Exec {
        exec::run(&self.address, alloc, command, tty, stdin)
    }

    /// GET a path of the HTTP API as it is; empty while it fails.
    #[must_use]
    pub fn get_raw(&self, path: &str) -> Vec<u8> {
        let url = format!("{}{path}", self.address);
        let mut command = Command::new("curl");
        output(command.args(["--silent", "--fail", "--noproxy", "*", &url])).stdout
    }

    /// GET a path of the HTTP API; null while it fails.
    #[must_use]
    pub fn get(&self, path: &str) -> Value {
        let url = format!("{}{path}", self.address);
        let mut command = Command::new("curl");
        let answer = output(command.args(["--silent", "--fail", "--noproxy", "*", &url]));
        serde_json::from_slice(&answer.stdout).unwrap_or_default()
    }

    /// Our driver as the node shows it.
    #[must_use]
    pub fn driver(&self) -> Value {
        let nodes = self.get("/v1/nodes");
        nodes[0]["Drivers"]["polydev"].clone()
    }

    /// Allocations of a job, newest last.
    #[must_use]
    pub fn allocations(&self, job: &str) -> Vec<Value> {
        let mut list = match self.get(&format!("/v1/job/{job}/allocations")) {
            Value::Array(list) => list,
            _ => vec![],
        };
        list.sort_by_key(|alloc| alloc["CreateIndex"].as_u64());
        list
    }

    /// Waits until a job has as many running allocations.
    #[track_caller]
    pub fn wait_running(&self, job: &str, count: usize) -> Vec<Value> {
        wait_until(
            &format!("{count} running allocations"),
            Duration::from_secs(90),
            || {
                let running = self.allocations(job);
                let running: Vec<Value> = running
                    .into_iter()
                    .filter(|alloc| alloc["ClientStatus"] == "running")
                    .collect();
                if running.len() == count {
                    Ok(running)
                } else {
                    Err(format!("{running:?}"))
                }
            },
        )
    }
}
