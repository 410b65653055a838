//! A dockerd of a test's own, to be killed and filled up, with a containerd and a network
//! namespace of its own: one without a bridge would take the machine's away, and two with one
//! each other's.

use std::{
    fs,
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    docker,
    folder::Folder,
    job::IMAGE,
    namespace::Namespace,
    process::{Process, output, succeed},
    wait_until,
};

/// Dropping it removes its containers and stops it.
#[derive(Debug)]
pub struct Engine {
    process: Option<Process>,
    /// By itself, as distributions start it: it outlives dockerd.
    containerd: Option<Process>,
    folder: Folder,
    // Removed after what lives in it.
    namespace: Namespace,
    /// Of dockerd, besides the needed ones.
    options: Vec<String>,
}

/// The image of the slots in an engine of [`Engine::start_whole`]: busybox alone.
pub const SLOT_IMAGE: &str = "polydev-anthropic-runtime:latest";

/// Without networks, of which plain faults need none.
const BARE: [&str; 3] = ["--bridge=none", "--iptables=false", "--ip-forward=false"];

impl Engine {
    /// Starts it with [`IMAGE`] in it.
    ///
    /// # Panics
    /// Without root's rights, or if it does not start.
    #[must_use]
    pub fn start() -> Self {
        Self::start_with(Vec::new())
    }

    /// As [`Engine::start`], with options of dockerd.
    ///
    /// # Panics
    /// As there.
    #[must_use]
    pub fn start_with(options: Vec<String>) -> Self {
        let bare = BARE.map(str::to_owned);
        // Small, so that a test can fill it.
        Self::launch_new([&bare[..], &options].concat(), "size=64m")
    }

    /// One with bridges and their rules, as a node has it, and with [`SLOT_IMAGE`] in it.
    ///
    /// # Panics
    /// As [`Engine::start`].
    #[must_use]
    pub fn start_whole() -> Self {
        let engine = Self::launch_new(Vec::new(), "size=512m");
        let archive = engine.folder.path().join("slot.tar");
        let path = archive.to_str().expect("a temporary folder's name is text");
        let container = engine.docker(&["create", IMAGE, "true"]);
        engine.docker(&["export", "--output", path, container.trim()]);
        engine.docker(&["rm", container.trim()]);
        engine.docker(&["import", "--change", "USER 1000:1000", path, SLOT_IMAGE]);
        fs::remove_file(archive).expect("it was written");
        engine
    }

    fn launch_new(options: Vec<String>, size: &str) -> Self {
        let mut engine = Self {
            process: None,
            containerd: None,
            namespace: Namespace::new("pde"),
            folder: Folder::new("pdengine-"),
            options,
        };
        let data = engine.data();
        fs::create_dir(&data).expect("a folder can be made");
        let kind = Some("tmpfs");
        mount(kind, &data, kind, MsFlags::empty(), Some(size)).expect("root may mount");
        engine.start_containerd();
        engine.restart();
        let archive = engine.folder.path().join("image.tar");
        let path = archive.to_str().expect("a temporary folder's name is text");
        docker::docker(&["save", "--output", path, IMAGE]);
        engine.docker(&["load", "--input", path]);
        fs::remove_file(archive).expect("it was written");
        engine
    }

    fn start_containerd(&mut self) {
        let path = |name: &str| self.folder.path().join(name);
        let config = format!(
            "version = 2\nroot = {:?}\nstate = {:?}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = {:?}\n",
            self.data().join("containerd"),
            path("containerd"),
            path("containerd.sock"),
        );
        fs::write(path("containerd.toml"), config).expect("a file can be written");
        let mut command = self.namespace.inside();
        command
            .args(["containerd", "--config"])
            .arg(path("containerd.toml"));
        self.containerd = Some(Process::start(&mut command, &path("containerd.log")));
        let socket = path("containerd.sock");
        wait_until("the test's containerd", Duration::from_secs(30), || {
            UnixStream::connect(&socket).map_err(|error| error.to_string())
        });
    }

    /// Its network namespace.
    #[must_use]
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("docker.sock")
    }

    /// Kills dockerd as a crash would; containers go on.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.end(Signal::SIGKILL);
        }
    }

    /// Whether [`Engine::kill`] was the last that happened to it.
    #[must_use]
    pub fn is_killed(&self) -> bool {
        self.process.is_none()
    }

    /// Starts dockerd again, and waits until it answers.
    ///
    /// # Panics
    /// If it does not.
    #[track_caller]
    pub fn restart(&mut self) {
        self.launch();
        let socket = self.socket();
        wait_until("the test's dockerd", Duration::from_secs(60), || {
            if answers(&socket) {
                Ok(())
            } else {
                Err(self.process.as_ref().map(Process::log).unwrap_or_default())
            }
        });
    }

    fn launch(&mut self) {
        self.kill();
        let path = |name: &str| self.folder.path().join(name);
        let mut command = self.namespace.inside();
        command
            .args(["dockerd", "--live-restore"])
            .arg("--data-root")
            .arg(self.data())
            .arg("--exec-root")
            .arg(path("exec"))
            .arg("--containerd")
            .arg(path("containerd.sock"))
            .arg("--pidfile")
            .arg(path("pid"))
            .arg("--config-file")
            .arg(path("daemon.json"))
            .arg("--host")
            .arg(format!("unix://{}", self.socket().display()))
            .args(&self.options);
        fs::write(path("daemon.json"), "{}").expect("a file can be written");
        // The number it holds may be another process's by now.
        let _first_start = fs::remove_file(path("pid"));
        self.process = Some(Process::start(&mut command, &path("log")));
    }

    /// An address of this machine's from which connections go on to a port of dockerd's.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    pub fn forward(&self, port: u16) -> SocketAddr {
        let namespace = fs::File::open(format!("/run/netns/{}", self.namespace.name()));
        let namespace = namespace.expect("it was added at the start");
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let address = listener.local_addr().expect("it listens");
        thread::spawn(move || {
            setns(namespace, CloneFlags::CLONE_NEWNET).expect("root may enter");
            for client in listener.incoming().flatten() {
                let Ok(docker) = TcpStream::connect(("127.0.0.1", port)) else {
                    continue;
                };
                let ends = [client.try_clone(), docker.try_clone()];
                let [from, to] = ends.map(|end| end.expect("a descriptor can be copied"));
                thread::spawn(move || pass_on(&client, &docker));
                thread::spawn(move || pass_on(&to, &from));
            }
        });
        address
    }

    /// A dockerd that is killed while it starts a container may never know of its shim.
    fn end_shims(&self) {
        let address = self.folder.path().join("containerd.sock");
        let all = procfs::process::all_processes().into_iter().flatten();
        for process in all.flatten() {
            let line = process.cmdline().unwrap_or_default();
            if line.iter().any(|argument| Path::new(argument) == address) {
                let _gone = kill(Pid::from_raw(process.pid), Signal::SIGKILL);
            }
        }
    }

    /// `docker ARGS` with this engine, which must succeed.
    #[track_caller]
    pub fn docker(&self, args: &[&str]) -> String {
        succeed(client(&self.socket()).args(args))
    }

    /// Kills a container, if there is still one.
    pub fn end(&self, container: &str) {
        output(client(&self.socket()).args(["kill", container]));
    }

    /// Ids of all containers.
    #[track_caller]
    #[must_use]
    pub fn containers(&self) -> Vec<String> {
        let ids = self.docker(&["ps", "--all", "--quiet", "--no-trunc"]);
        ids.lines().map(str::to_owned).collect()
    }

    /// Leaves no room for anything, until [`Engine::empty`].
    ///
    /// # Panics
    /// If there is room all the same.
    pub fn fill(&self) {
        let filler = fs::File::create(self.data().join("filler")).expect("it is a folder");
        let full = std::io::copy(&mut std::io::repeat(0), &mut &filler).expect_err("it is small");
        assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
    }

    pub fn empty(&self) {
        let _not_filled = fs::remove_file(self.data().join("filler"));
    }
}

fn pass_on(mut from: &TcpStream, mut to: &TcpStream) {
    let _broken = std::io::copy(&mut from, &mut to);
    let _closed_already = to.shutdown(Shutdown::Write);
}

fn client(socket: &Path) -> Command {
    let mut command = docker::command();
    command
        .arg("--host")
        .arg(format!("unix://{}", socket.display()));
    command
}

fn answers(socket: &Path) -> bool {
    output(client(socket).arg("version")).status.success()
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.empty();
        if self.process.is_none() {
            self.launch();
            let limit = Instant::now() + Duration::from_secs(30);
            while !answers(&self.socket()) && Instant::now() < limit {
                thread::park_timeout(Duration::from_millis(100));
            }
        }
        let ids = output(client(&self.socket()).args(["ps", "--all", "--quiet"]));
        for id in String::from_utf8_lossy(&ids.stdout).lines() {
            output(client(&self.socket()).args(["rm", "--force", id]));
        }
        let networks = output(client(&self.socket()).args([
            "network",
            "ls",
            "--quiet",
            "--filter",
            "type=custom",
        ]));
        for id in String::from_utf8_lossy(&networks.stdout).lines() {
            output(client(&self.socket()).args(["network", "rm", id]));
        }
        self.process = None;
        self.containerd = None;
        self.end_shims();
        self.folder.unmount();
    }
}
