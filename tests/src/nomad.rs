//! A real Nomad agent, server and client in one, with our driver in its plugin
//! folder.

use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use serde_json::Value;
use tempfile::TempDir;

use crate::{
    process::{Process, output, succeed},
    program, root, wait_until,
};

/// Dropping it purges its jobs and stops it.
pub struct Nomad {
    agent: Option<Process>,
    pub address: String,
    folder: TempDir,
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
        let nomad = Self::launch("");
        wait_until("a healthy driver", Duration::from_secs(60), || {
            let driver = nomad.driver();
            if driver["Healthy"] == true {
                Ok(())
            } else {
                Err(driver.to_string())
            }
        });
        nomad
    }

    /// Starts an agent whose plugin has `options` besides the needed ones, and does
    /// not wait for anything.
    #[must_use]
    pub fn launch(options: &str) -> Self {
        let folder = tempfile::Builder::new()
            .prefix("pdtest-")
            .tempdir_in("/tmp");
        let folder = folder.expect("a folder can be made");
        let plugins = folder.path().join("plugins");
        fs::create_dir(&plugins).expect("a folder can be made");
        fs::copy(
            program("nomad-driver-polydev"),
            plugins.join("nomad-driver-polydev"),
        )
        .expect("the driver is built");
        let [http, rpc, serf] = free_ports();
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
              memory_total_mb   = 8192
              options = {{
                "fingerprint.denylist" = "env_aws,env_gce,env_azure,env_digitalocean"
                "driver.allowlist"     = "polydev"
              }}
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
            init = program("polydev-init").display(),
        );
        let path = folder.path().join("agent.hcl");
        fs::write(&path, config).expect("a file can be written");
        let mut command = Command::new(nomad_program());
        command.args(["agent", "-config"]).arg(&path);
        let agent = Process::start(&mut command, &folder.path().join("nomad.log"));
        Self {
            agent: Some(agent),
            address: format!("http://127.0.0.1:{http}"),
            folder,
        }
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
        let file = format!("jobspecs/pool-{provider}.nomad.hcl");
        self.run(&[
            "job",
            "run",
            "-detach",
            "-var",
            &format!("count={count}"),
            &file,
        ]);
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

impl Drop for Nomad {
    fn drop(&mut self) {
        let jobs = self.get("/v1/jobs");
        let jobs = jobs
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|job| job["ID"].as_str());
        for job in jobs {
            output(&mut self.command(&["job", "stop", "-purge", "-yes", job]));
        }
        self.agent = None;
        // The agent leaves tasks alone when it stops; those of a failed test are left.
        if let Ok(instance) = fs::read_to_string(self.state_dir().join("instance")) {
            let label = format!("dev.polydev.instance={instance}");
            for id in crate::docker::containers(&label) {
                output(crate::docker::command().args(["rm", "--force", &id]));
            }
            output(crate::docker::command().args([
                "network",
                "rm",
                &format!("polydev-{instance}"),
            ]));
        }
    }
}

/// Free now; taken again at once.
fn free_ports() -> [u16; 3] {
    let listeners = [(); 3].map(|()| TcpListener::bind("127.0.0.1:0").expect("a port is free"));
    listeners.map(|listener| listener.local_addr().expect("it is bound").port())
}
