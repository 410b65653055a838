//! A dockerd for one test, which may kill it and fill its disk. It has a containerd and a network
//! namespace of its own. Without the namespace, a dockerd without a bridge would remove the
//! machine's bridge, and two dockerds with a bridge would remove each other's.

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

/// Dropping the engine removes its containers and stops it.
#[derive(Debug)]
pub struct Engine {
    process: Option<Process>,
    /// A separate process, as distributions start it: containerd outlives dockerd.
    containerd: Option<Process>,
    folder: Folder,
    // Removed after the processes in it.
    namespace: Namespace,
    /// Options of dockerd beside the required ones.
    options: Vec<String>,
}

/// The image of the slots in an engine of [`Engine::start_whole`]: busybox alone.
pub const SLOT_IMAGE: &str = "polydev-anthropic-runtime:latest";

/// No networks: tests of faults of plain tasks need none.
const BARE: [&str; 3] = ["--bridge=none", "--iptables=false", "--ip-forward=false"];

impl Engine {
    /// Starts an engine that has [`IMAGE`].
    ///
    /// # Panics
    /// Without root's rights, or if the engine does not start.
    #[must_use]
    pub fn start() -> Self {
        Self::start_with(Vec::new())
    }

    /// As [`Engine::start`], with options of dockerd.
    ///
    /// # Panics
    /// As [`Engine::start`].
    #[must_use]
    pub fn start_with(options: Vec<String>) -> Self {
        let bare = BARE.map(str::to_owned);
        // Small, so that a test can fill it.
        Self::launch_new([&bare[..], &options].concat(), "size=64m")
    }

    /// Starts an engine with bridges and their rules, as on a node. It has [`SLOT_IMAGE`].
    ///
    /// # Panics
    /// As [`Engine::start`].
    #[must_use]
    pub fn start_whole() -> Self {
        let engine = Self::launch_new(Vec::new(), "size=4g");
        let archive = engine.folder.path().join("slot.tar");
        let path = archive.to_str().expect("a temporary folder's name is text");
        let container = engine.docker(&["create", IMAGE, "true"]);
        engine.docker(&["export", "--output", path, container.trim()]);
        engine.docker(&["rm", container.trim()]);
        engine.docker(&["import", "--change", "USER 1000:1000", path, SLOT_IMAGE]);
        fs::remove_file(archive).expect("the archive was written");
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
        engine.load(IMAGE);
        engine
    }

    /// Copies an image of this machine's engine into this one.
    ///
    /// # Panics
    /// If there is no such image, or no room.
    pub fn load(&self, image: &str) {
        let archive = self.folder.path().join("image.tar");
        let path = archive.to_str().expect("a temporary folder's name is text");
        docker::docker(&["save", "--output", path, image]);
        self.docker(&["load", "--input", path]);
        fs::remove_file(archive).expect("the archive was written");
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

    /// The engine's network namespace.
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

    /// Kills dockerd as a crash would; its containers continue.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.end(Signal::SIGKILL);
        }
    }

    /// Whether dockerd was killed by [`Engine::kill`] and not started again.
    #[must_use]
    pub fn is_killed(&self) -> bool {
        self.process.is_none()
    }

    /// Starts dockerd again, and waits until it answers.
    ///
    /// # Panics
    /// If dockerd does not answer.
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
        // The process id in the file may belong to another process by now.
        let _first_start = fs::remove_file(path("pid"));
        self.process = Some(Process::start(&mut command, &path("log")));
    }

    /// An address of this machine that forwards connections to a port of dockerd.
    ///
    /// # Panics
    /// If no port is free.
    #[must_use]
    pub fn forward(&self, port: u16) -> SocketAddr {
        let namespace = fs::File::open(format!("/run/netns/{}", self.namespace.name()));
        let namespace = namespace.expect("the namespace was added at the start");
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let address = listener.local_addr().expect("the listener has an address");
        thread::spawn(move || {
            setns(namespace, CloneFlags::CLONE_NEWNET).expect("root may enter a namespace");
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

    /// Kills containerd's shims: a dockerd that is killed while it starts a container may never
    /// know of the container's shim.
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

    /// Runs `docker ARGS` with this engine. The command must succeed.
    #[track_caller]
    pub fn docker(&self, args: &[&str]) -> String {
        succeed(client(&self.socket()).args(args))
    }

    /// Kills a container, if it still exists.
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

    /// Fills the engine's disk, until [`Engine::empty`].
    ///
    /// # Panics
    /// If the disk is not full afterwards.
    pub fn fill(&self) {
        let filler = fs::File::create(self.data().join("filler")).expect("a file can be made");
        let full = std::io::copy(&mut std::io::repeat(0), &mut &filler).expect_err("a full disk");
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
