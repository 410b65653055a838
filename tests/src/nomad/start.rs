//! How an agent is configured and started.
//!
//! Most agents run with `-dev`: the same server, client and scheduler, with the state in
//! memory, and a first heartbeat at once. Without it, a node is ready after 12 to 40 s. A test
//! that restarts its agent starts a lasting one.

use std::{fs, path::Path, time::Duration};

use nix::mount::{MsFlags, mount};
use serde_json::Value;

use super::Nomad;
use crate::{folder::Folder, program, wait_until};

impl Nomad {
    /// Starts an agent and waits until the driver is healthy on its node.
    #[must_use]
    pub fn start() -> Self {
        Self::start_with("")
    }

    /// As [`Nomad::start`]. The agent keeps its state on disk, as in production: it can be
    /// [restarted](Nomad::restart), and its tasks outlive it.
    #[must_use]
    pub fn start_lasting() -> Self {
        let mut nomad = Self::configure("", "polydev");
        nomad.lasting = true;
        nomad.run_healthy()
    }

    /// As [`Nomad::start`], with `options` of the plugin beside the required ones.
    #[must_use]
    pub fn start_with(options: &str) -> Self {
        Self::configure(options, "polydev").run_healthy()
    }

    /// As [`Nomad::start_with`], with Nomad's own Docker driver beside ours.
    #[must_use]
    pub fn start_beside_docker(options: &str) -> Self {
        Self::configure(options, "polydev,docker").run_healthy()
    }

    /// As [`Nomad::start_with`], with `folder` first in the agent's `PATH`.
    #[must_use]
    pub fn start_with_programs(options: &str, folder: &Path) -> Self {
        let mut nomad = Self::configure(options, "polydev");
        nomad.programs = Some(folder.to_owned());
        nomad.run_healthy()
    }

    /// As [`Nomad::start`]; agent and driver log at level `trace`.
    #[must_use]
    pub fn start_traced() -> Self {
        let mut nomad = Self::configure("", "polydev");
        nomad.traced = true;
        nomad.run_healthy()
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
        nomad.run_healthy()
    }

    /// As [`Nomad::start`], with the folders of allocations and of the driver on mounts that are
    /// shared, as systemd makes all mounts.
    ///
    /// # Panics
    /// Without root's rights.
    #[must_use]
    pub fn start_on_shared_mounts() -> Self {
        let nomad = Self::configure("", "polydev");
        let (kind, none) = (Some("tmpfs"), None::<&str>);
        for folder in [nomad.folder().join("data"), nomad.state_dir()] {
            fs::create_dir(&folder).expect("a folder can be made");
            mount(kind, &folder, kind, MsFlags::empty(), none).expect("root may mount");
            mount(none, &folder, none, MsFlags::MS_SHARED, none).expect("root may mount");
        }
        nomad.run_healthy()
    }

    /// Starts an agent whose plugin has `options` beside the required ones. Waits for the node,
    /// but not for the driver.
    #[must_use]
    pub fn launch(options: &str) -> Self {
        Self::configure(options, "polydev").run_agent()
    }

    fn run_healthy(self) -> Self {
        let nomad = self.run_agent();
        nomad.wait_healthy();
        nomad
    }

    fn run_agent(mut self) -> Self {
        self.agent = Some(self.spawn_agent());
        self.wait_ready();
        self
    }

    /// Waits until the agent's node is ready, or the agent has ended. Time limits of tests start
    /// here. A server without its keyring refuses a node, and the agent tries again 15 to 30 s
    /// later. A registered node becomes ready with its first heartbeat, up to 10 s later (Nomad
    /// 1.11.3, `client/client.go`). Until then Nomad places nothing on the node, and a shim does
    /// not follow the node's driver.
    #[track_caller]
    fn wait_ready(&mut self) {
        wait_until("a ready node", Duration::from_secs(120), || {
            if self.agent().exit().is_some() {
                return Ok(());
            }
            match self.get("/v1/nodes") {
                Value::Array(nodes) if nodes.iter().any(|node| node["Status"] == "ready") => Ok(()),
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
        let broker = folder.path().join("polydev-broker");
        fs::copy(program("polydev-broker"), broker).expect("the broker is built");
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
              # Tests look at ended allocations, however full this machine's disk is.
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
            plugin "docker" {{
              config {{
                # Its own is in a registry.
                infra_image = "polydev-pause:1"
                allow_caps  = ["all"]
                volumes {{
                  enabled = true
                }}
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
            init = init.display(),
        );
        fs::write(folder.path().join("agent.hcl"), config).expect("a file can be written");
        Self {
            agent: None,
            address: format!("http://127.0.0.1:{http}"),
            folder,
            programs: None,
            traced: false,
            lasting: false,
        }
    }
}
