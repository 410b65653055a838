//! A Nomad server and two nodes, each in a network namespace of its own. A node has a client
//! agent, a dockerd and a driver. A bridge in the server's namespace joins them. Shims and
//! drivers use mutual TLS over the bridge.

use std::{
    fs,
    net::IpAddr,
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::{
    engine::Engine,
    folder::Folder,
    namespace::Namespace,
    nomad::{clean::stop_drivers, nomad_program},
    process::{Process, output, succeed},
    program, root,
    shim::{Shim, instance_label},
    wait_until,
};

/// How many nodes the cluster has.
pub const NODES: usize = 2;
const SERVER: &str = "10.213.77.1";
/// Containers reach the server, as they would a service of the operator's.
const NETWORK: &str = "10.213.77.0/24";
const ADDRESSES: [&str; NODES] = ["10.213.77.2", "10.213.77.3"];
/// The name of the bridge in the server's namespace, and of each node's interface to the bridge.
const LINK: &str = "cluster";
/// Names of the nodes' agents.
const CLIENTS: [&str; NODES] = ["client0", "client1"];
const RPC: u16 = 4647;
/// The HTTP port of a node's agent.
const HTTP: u16 = 5646;

/// Dropping the cluster purges its jobs, ends its processes and removes what it made.
pub struct Cluster {
    agents: Vec<Process>,
    pub server: Process,
    pub engines: [Engine; NODES],
    /// The server's network.
    namespace: Namespace,
    pub address: String,
    folder: Folder,
}

impl Cluster {
    /// Starts the server and both nodes, and waits until both drivers are healthy. Both engines
    /// have the slot image of [`Engine::start_whole`].
    ///
    /// # Panics
    /// Without root's rights, or if a part does not start.
    #[must_use]
    pub fn start() -> Self {
        let folder = Folder::new("pdcluster-");
        let engines = [Engine::start_whole(), Engine::start_whole()];
        let namespace = Namespace::new("pdc");
        join(&namespace, &engines);
        let mut certificates = Command::new(program("polydev-shim"));
        certificates
            .args(["certs", "dev"])
            .arg(folder.path().join("tls"));
        succeed(certificates.args(ADDRESSES.iter().flat_map(|address| ["--name", *address])));
        write_config(&folder, "server", &server(&folder));
        for (number, engine) in engines.iter().enumerate() {
            let config = client(&folder, number, engine);
            write_config(&folder, CLIENTS[number], &config);
        }
        let agents = CLIENTS
            .iter()
            .zip(&engines)
            .map(|(name, engine)| agent(&folder, name, engine.namespace()));
        let cluster = Self {
            agents: agents.collect(),
            server: agent(&folder, "server", &namespace),
            address: format!("http://{SERVER}:4646"),
            engines,
            namespace,
            folder,
        };
        cluster.wait_healthy();
        cluster
    }

    /// Waits until both nodes are ready, with healthy drivers: a job that is submitted before is
    /// placed on one of them alone.
    #[track_caller]
    pub fn wait_healthy(&self) {
        wait_until("two healthy drivers", Duration::from_secs(90), || {
            let nodes = self.get("/v1/nodes");
            let is_up = |node: &&Value| {
                node["Status"] == "ready" && node["Drivers"]["polydev"]["Healthy"] == true
            };
            match nodes.as_array().into_iter().flatten().filter(is_up).count() {
                NODES => Ok(()),
                _ => Err(nodes.to_string()),
            }
        });
    }

    /// A node's agent.
    pub fn agent(&mut self, number: usize) -> &mut Process {
        &mut self.agents[number]
    }

    /// Ends a node's agent with `signal`, starts another one, and waits until the new agent
    /// answers.
    #[track_caller]
    pub fn restart_agent(&mut self, number: usize, signal: Signal) {
        self.agents[number].end(signal);
        let namespace = self.engines[number].namespace();
        self.agents[number] = agent(&self.folder, CLIENTS[number], namespace);
        let health = format!("http://{}:{HTTP}/v1/agent/health", ADDRESSES[number]);
        wait_until("a healthy agent", Duration::from_secs(90), || {
            match self.fetch(&health) {
                Value::Null => Err(self.agents[number].log()),
                _ => Ok(()),
            }
        });
    }

    /// Kills the server and starts another one.
    pub fn restart_server(&mut self) {
        self.server.end(Signal::SIGKILL);
        self.server = agent(&self.folder, "server", &self.namespace);
    }

    /// A shim in front of the server.
    #[must_use]
    pub fn shim(&self) -> Shim {
        self.shim_as("shim")
    }

    /// A shim that presents the certificate of `name` to drivers.
    #[must_use]
    pub fn shim_as(&self, name: &str) -> Shim {
        let tls = self.folder.path().join("tls");
        let mut command = self.namespace.inside();
        let file = |name: &str| tls.join(name);
        command.env("POLYDEV_NODE_TLS_CERT", file(&format!("{name}.pem")));
        command.env("POLYDEV_NODE_TLS_KEY", file(&format!("{name}-key.pem")));
        command.env("POLYDEV_NODE_TLS_CA", file("ca.pem"));
        Shim::serve_from(command, &self.address)
    }

    /// The server's network, which containers of both nodes reach.
    #[must_use]
    pub fn outside(&self) -> (&Namespace, IpAddr) {
        (&self.namespace, SERVER.parse().expect("a valid address"))
    }

    /// Makes a folder like an operator's, with the certificates in `certs`.
    ///
    /// # Panics
    /// If the folder exists.
    #[must_use]
    pub fn walk_folder(&self) -> PathBuf {
        let folder = self.folder.path().join("walk");
        std::fs::create_dir(&folder).expect("a folder can be made");
        let tls = self.folder.path().join("tls");
        std::os::unix::fs::symlink(tls, folder.join("certs")).expect("a link can be made");
        folder
    }

    /// A command that runs the program in its arguments in the server's namespace.
    #[must_use]
    pub fn inside(&self) -> Command {
        let mut command = self.namespace.inside();
        command.env("NOMAD_ADDR", &self.address);
        command
    }

    /// Runs `nomad ARGS`. The command must succeed.
    #[track_caller]
    pub fn run(&self, args: &[&str]) -> String {
        succeed(&mut self.command(args))
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = self.inside();
        command.arg(nomad_program()).args(args);
        // As with `Shim::dev`.
        command.env("NOMAD_VAR_agent", "false");
        command.current_dir(root());
        command
    }

    /// The answer to a GET of a path of the HTTP API, or null if the request fails.
    #[must_use]
    pub fn get(&self, path: &str) -> Value {
        self.fetch(&format!("{}{path}", self.address))
    }

    fn fetch(&self, url: &str) -> Value {
        let mut command = self.namespace.inside();
        let answer = output(command.args(["curl", "--silent", "--fail", "--noproxy", "*", url]));
        serde_json::from_slice(&answer.stdout).unwrap_or_default()
    }

    /// A driver's state folder.
    #[must_use]
    pub fn state_dir(&self, number: usize) -> PathBuf {
        self.folder.path().join(format!("state{number}"))
    }

    /// A node's slot containers, each as `docker ps --format` prints it.
    #[must_use]
    pub fn containers(&self, number: usize, format: &str) -> Vec<String> {
        let filter = format!("label={}", instance_label(&self.state_dir(number)));
        let args = [
            "ps",
            "--all",
            "--no-trunc",
            "--filter",
            &filter,
            "--format",
            format,
        ];
        let listed = self.engines[number].docker(&args);
        listed.lines().map(str::to_owned).collect()
    }
}

fn join(server: &Namespace, engines: &[Engine]) {
    let up = |namespace: &Namespace, address: &str| {
        let address = format!("{address}/29");
        namespace.ip(&["address", "add", &address, "dev", LINK]);
        namespace.ip(&["link", "set", LINK, "up"]);
    };
    server.ip(&["link", "add", LINK, "type", "bridge"]);
    up(server, SERVER);
    for (number, engine) in engines.iter().enumerate() {
        let (end, node) = (format!("node{number}"), engine.namespace());
        let pair = ["link", "add", &end, "type", "veth", "peer", "name", LINK];
        server.ip(&[&pair[..], &["netns", node.name()]].concat());
        server.ip(&["link", "set", &end, "master", LINK, "up"]);
        up(node, ADDRESSES[number]);
    }
}

fn server(folder: &Folder) -> String {
    format!(
        r#"
        server {{
          enabled          = true
          bootstrap_expect = 1
          default_scheduler_config {{ scheduler_algorithm = "spread" }}
        }}
        {}
        "#,
        common(folder, "server", SERVER, 4646)
    )
}

fn common(folder: &Folder, name: &str, address: &str, http: u16) -> String {
    let data = folder.path().join(name);
    format!(
        r#"
        name      = "{name}"
        data_dir  = "{}"
        bind_addr = "{address}"
        log_level = "DEBUG"
        ports {{
          http = {http}
          rpc  = {RPC}
          serf = 4648
        }}
        "#,
        data.display()
    )
}

fn client(folder: &Folder, number: usize, engine: &Engine) -> String {
    let plugins = folder.path().join(format!("plugins{number}"));
    fs::create_dir(&plugins).expect("a folder can be made");
    let driver = "nomad-driver-polydev";
    fs::copy(program(driver), plugins.join(driver)).expect("the driver is built");
    format!(
        r#"
        {}
        plugin_dir = "{}"
        client {{
          enabled           = true
          servers           = ["{}:{RPC}"]
          network_interface = "{LINK}"
          cpu_total_compute = 8000
          memory_total_mb   = 8192
          # What has ended is looked at.
          gc_max_allocs            = 1000
          gc_disk_usage_threshold  = 99
          gc_inode_usage_threshold = 99
          options = {{
            "fingerprint.denylist" = "env_aws,env_gce,env_azure,env_digitalocean"
            "driver.allowlist"     = "polydev"
          }}
        }}
        plugin "{driver}" {{
          config {{
            endpoint  = "unix://{}"
            state_dir = "{}"
            init_path = "{}"
            private_networks = ["{NETWORK}"]
            shims {{
              listen = "{}:7646"
              cert   = "{tls}/node.pem"
              key    = "{tls}/node-key.pem"
              ca     = "{tls}/ca.pem"
              allow  = ["spiffe://polydev.test/shim"]
            }}
            run_headroom {{
              cpu    = 8000
              memory = 8192
            }}
          }}
        }}
        "#,
        common(folder, CLIENTS[number], ADDRESSES[number], HTTP),
        plugins.display(),
        SERVER,
        engine.socket().display(),
        folder.path().join(format!("state{number}")).display(),
        program("polydev-init").display(),
        ADDRESSES[number],
        tls = folder.path().join("tls").display(),
    )
}

fn write_config(folder: &Folder, name: &str, config: &str) {
    let path = folder.path().join(format!("{name}.hcl"));
    fs::write(path, config).expect("a file can be written");
}

fn agent(folder: &Folder, name: &str, namespace: &Namespace) -> Process {
    let path = |kind: &str| folder.path().join(format!("{name}.{kind}"));
    let mut command = namespace.inside();
    command.arg(nomad_program()).args(["agent", "-config"]);
    Process::start(command.arg(path("hcl")), &path("log"))
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // A server that a test has paused does not answer.
        self.server.signal(Signal::SIGCONT);
        for engine in &mut self.engines {
            if engine.is_killed() {
                engine.restart();
            }
        }
        let jobs = self.get("/v1/jobs");
        let jobs = jobs.as_array().into_iter().flatten();
        for job in jobs.filter(|job| job["Status"] != "dead") {
            if let Some(id) = job["ID"].as_str() {
                output(&mut self.command(&["job", "stop", "-purge", "-yes", id]));
            }
        }
        let limit = Instant::now() + Duration::from_secs(60);
        let is_live = |alloc: &Value| alloc["ClientStatus"] == "running";
        while Instant::now() < limit {
            let allocations = self.get("/v1/allocations");
            if !allocations.as_array().into_iter().flatten().any(is_live) {
                break;
            }
            std::thread::park_timeout(Duration::from_millis(100));
        }
        self.agents.clear();
        stop_drivers(self.folder.path());
        self.folder.unmount();
    }
}
