//! A Nomad server and two clients, each client in a network namespace with a dockerd and a
//! driver of its own. A pair of veths joins the two; the server is in the first one's.

use std::{
    fs,
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::{
    engine::Engine,
    folder::Folder,
    nomad::{clean::stop_driver, nomad_program},
    process::{Process, output, succeed},
    program, root,
    shim::Shim,
    wait_until,
};

const ADDRESSES: [&str; 2] = ["10.213.77.1", "10.213.77.2"];
/// The ends of the pair, in both namespaces.
const LINK: &str = "cluster";
const RPC: u16 = 4647;

/// Dropping it purges its jobs, and ends and removes everything.
pub struct Cluster {
    agents: Vec<Process>,
    pub server: Process,
    pub engines: [Engine; 2],
    pub address: String,
    folder: Folder,
}

impl Cluster {
    /// Starts it all, with [`Engine::start_whole`]'s slot image in both engines, and waits until
    /// both drivers are healthy.
    ///
    /// # Panics
    /// Without root's rights, or if something does not start.
    #[must_use]
    pub fn start() -> Self {
        let folder = Folder::new("pdcluster-");
        let engines = [Engine::start_whole(), Engine::start_whole()];
        let [first, second] = engines.each_ref().map(Engine::namespace);
        let ip = |namespace: &str, words: &[&str]| {
            succeed(Command::new("ip").args(["-netns", namespace]).args(words));
        };
        let pair = ["link", "add", LINK, "type", "veth", "peer", "name", LINK];
        ip(first, &[&pair[..], &["netns", second]].concat());
        for (namespace, address) in [first, second].into_iter().zip(ADDRESSES) {
            let address = format!("{address}/30");
            ip(namespace, &["address", "add", &address, "dev", LINK]);
            ip(namespace, &["link", "set", LINK, "up"]);
        }
        let server = format!(
            r#"
            server {{
              enabled          = true
              bootstrap_expect = 1
              default_scheduler_config {{ scheduler_algorithm = "spread" }}
            }}
            {}
            "#,
            common(&folder, "server", ADDRESSES[0], 4646)
        );
        let server = agent(&folder, "server", &server, &engines[0]);
        let agents = engines.iter().enumerate().map(|(number, engine)| {
            let name = format!("client{number}");
            let config = client(&folder, number, engine);
            agent(&folder, &name, &config, engine)
        });
        let cluster = Self {
            agents: agents.collect(),
            server,
            address: format!("http://{}:4646", ADDRESSES[0]),
            engines,
            folder,
        };
        wait_until("two healthy drivers", Duration::from_secs(90), || {
            let nodes = cluster.get("/v1/nodes");
            let drivers = nodes.as_array().into_iter().flatten();
            let drivers = drivers.map(|node| &node["Drivers"]["polydev"]);
            match drivers.filter(|driver| driver["Healthy"] == true).count() {
                2 => Ok(()),
                _ => Err(nodes.to_string()),
            }
        });
        cluster
    }

    /// A shim in front of the server.
    #[must_use]
    pub fn shim(&self) -> Shim {
        Shim::serve_from(self.engines[0].inside(), &self.address)
    }

    /// `nomad ARGS`, which must succeed.
    #[track_caller]
    pub fn run(&self, args: &[&str]) -> String {
        succeed(&mut self.command(args))
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = self.engines[0].inside();
        command.arg(nomad_program()).args(args);
        command.env("NOMAD_ADDR", &self.address).current_dir(root());
        command
    }

    /// GET a path of the HTTP API; null while it fails.
    #[must_use]
    pub fn get(&self, path: &str) -> Value {
        let url = format!("{}{path}", self.address);
        let mut command = self.engines[0].inside();
        let answer = output(command.args(["curl", "--silent", "--fail", "--noproxy", "*", &url]));
        serde_json::from_slice(&answer.stdout).unwrap_or_default()
    }

    /// A driver's own folder.
    #[must_use]
    pub fn state_dir(&self, number: usize) -> PathBuf {
        self.folder.path().join(format!("state{number}"))
    }
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
            run_headroom {{
              cpu    = 8000
              memory = 8192
            }}
          }}
        }}
        "#,
        common(folder, &format!("client{number}"), ADDRESSES[number], 5646),
        plugins.display(),
        ADDRESSES[0],
        engine.socket().display(),
        folder.path().join(format!("state{number}")).display(),
        program("polydev-init").display(),
    )
}

fn agent(folder: &Folder, name: &str, config: &str, engine: &Engine) -> Process {
    let path = |kind: &str| folder.path().join(format!("{name}.{kind}"));
    fs::write(path("hcl"), config).expect("a file can be written");
    let mut command = engine.inside();
    command.arg(nomad_program()).args(["agent", "-config"]);
    Process::start(command.arg(path("hcl")), &path("log"))
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // A server that a test has stopped hears nothing.
        self.server.signal(Signal::SIGCONT);
        for engine in &mut self.engines {
            if engine.is_killed() {
                engine.restart();
            }
        }
        let jobs = self.get("/v1/jobs");
        for job in jobs.as_array().into_iter().flatten() {
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
        for number in 0..2 {
            let state = self.state_dir(number);
            stop_driver(&state, self.folder.path());
        }
        self.folder.unmount();
    }
}
