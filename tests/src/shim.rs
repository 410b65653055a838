//! A shim of this build: with the embedded engine, or in front of a Nomad agent.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use uuid::Uuid;

use crate::{client::Client, folder::Folder, process::Process, program, wait_until};

/// A running shim. Dropping it stops the shim and everything that the shim started.
pub struct Shim {
    // Dropped before the folder in which the shim's driver works.
    pub process: Process,
    pub address: String,
    /// The shim's command line.
    words: Vec<OsString>,
    folder: Folder,
}

impl Shim {
    /// Starts `polydev-shim dev` with `pools` such as `anthropic=2`, and waits until all are warm.
    #[must_use]
    pub fn dev(pools: &[&str]) -> Self {
        Self::dev_with(pools, &[])
    }

    /// As [`Shim::dev`], with options for the shim.
    #[must_use]
    pub fn dev_with(pools: &[&str], options: &[&str]) -> Self {
        Self::dev_in(pools, options, &[])
    }

    /// As [`Shim::dev_with`], with environment variables.
    #[must_use]
    pub fn dev_in(pools: &[&str], options: &[&str], environment: &[(&str, &str)]) -> Self {
        let mut command = Command::new(program("polydev-shim"));
        command.envs(environment.iter().copied());
        Self::dev_by(command, pools, options)
    }

    /// As [`Shim::dev`], by a command that runs the program in its arguments.
    #[must_use]
    pub fn dev_within(mut command: Command, pools: &[&str]) -> Self {
        command.arg(program("polydev-shim"));
        Self::dev_by(command, pools, &[])
    }

    fn dev_by(mut command: Command, pools: &[&str], options: &[&str]) -> Self {
        let folder = Folder::new("pdtest-");
        command
            .arg("dev")
            .arg("--state-dir")
            .arg(folder.path().join("s"))
            .args(options);
        // The commands of most tests need no CLI, and a slot without one is filled at once.
        if !options.contains(&"--agents=true") {
            command.arg("--agents=false");
        }
        for pool in pools {
            command.args(["--pool", pool]);
        }
        let shim = Self::start(command, folder);
        let client = shim.client();
        for pool in pools {
            let (provider, count) = pool.split_once('=').expect("a pool is PROVIDER=COUNT");
            client.wait_idle(provider, count.parse().expect("a count is a number"));
        }
        shim
    }

    /// Starts `polydev-shim serve` in front of the agent at `nomad`.
    #[must_use]
    pub fn serve(nomad: &str) -> Self {
        Self::serve_with(nomad, &[])
    }

    /// As [`Shim::serve`], with options for the shim.
    #[must_use]
    pub fn serve_with(nomad: &str, options: &[&str]) -> Self {
        Self::serve_in(nomad, options, &[])
    }

    /// As [`Shim::serve_with`], with environment variables.
    #[must_use]
    pub fn serve_in(nomad: &str, options: &[&str], environment: &[(&str, &str)]) -> Self {
        let mut command = Command::new(program("polydev-shim"));
        command.envs(environment.iter().copied());
        command.args(["serve", "--nomad-addr", nomad]).args(options);
        Self::start(command, Folder::new("pdtest-"))
    }

    /// Starts the shim again, after it has ended.
    ///
    /// # Panics
    /// If the shim does not start.
    pub fn restart(&mut self) {
        let (program, arguments) = self.words.split_first().expect("words of a command");
        let mut command = Command::new(program);
        self.process = launch(command.args(arguments), self.folder.path());
    }

    /// As [`Shim::serve`], run by `command`, which enters a network namespace.
    #[must_use]
    pub fn serve_from(mut command: Command, nomad: &str) -> Self {
        command.arg(program("polydev-shim"));
        command.args(["serve", "--nomad-addr", nomad]);
        Self::start(command, Folder::new("pdtest-"))
    }

    /// As [`Shim::serve`], as a user who is in `group` and no other group.
    ///
    /// # Panics
    /// Without root's rights.
    #[must_use]
    pub fn serve_as(user: u32, group: &str, nomad: &str) -> Self {
        let folder = Folder::new("pdtest-");
        // The user may not reach the folder in which it is built.
        let copy = folder.path().join("polydev-shim");
        std::fs::copy(program("polydev-shim"), &copy).expect("the shim is built");
        std::os::unix::fs::chown(folder.path(), Some(user), None).expect("root may do this");
        let user = user.to_string();
        let mut command = Command::new("setpriv");
        command.args(["--reuid", &user, "--regid", &user, "--groups", group]);
        command.arg(copy).args(["serve", "--nomad-addr", nomad]);
        Self::start(command, folder)
    }

    /// Kills the shim and its driver, and starts both again with another boot id, as if the
    /// machine had been restarted.
    ///
    /// # Panics
    /// Without root's rights, or with a shim that has no driver of its own.
    pub fn reboot(&mut self) {
        let driver = std::fs::read_to_string(self.state_dir().join("driver.lock"));
        let driver = driver.expect("the shim has a driver").trim().parse();
        self.process.end(Signal::SIGKILL);
        let _gone = kill(Pid::from_raw(driver.expect("a pid")), Signal::SIGKILL);
        let boot_id = self.folder.path().join("boot_id");
        std::fs::write(&boot_id, format!("{}\n", Uuid::new_v4())).expect("a file can be written");
        let script = "mount --bind \"$0\" /proc/sys/kernel/random/boot_id && exec \"$@\"";
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", script]).arg(boot_id);
        command.args(&self.words);
        self.process = launch(&mut command, self.folder.path());
    }

    fn start(mut command: Command, folder: Folder) -> Self {
        let socket = folder.path().join("shim.sock");
        let address = format!("unix://{}", socket.display());
        command.args(["--listen", &address]);
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        let words = words.map(ToOwned::to_owned).collect();
        Self {
            process: launch(&mut command, folder.path()),
            words,
            address,
            folder,
        }
    }

    #[must_use]
    pub fn client(&self) -> Client {
        Client::connect(&self.address)
    }

    /// The driver's state folder, with the embedded engine.
    #[must_use]
    pub fn state_dir(&self) -> PathBuf {
        self.folder.path().join("s")
    }

    /// The label of everything that the embedded engine's driver has made in Docker.
    #[must_use]
    pub fn label(&self) -> String {
        instance_label(&self.state_dir())
    }

    /// `polydev-shim run ...` against this shim.
    #[must_use]
    pub fn run_command(&self) -> Command {
        self.command(&["run"])
    }

    /// `polydev-shim ...` against this shim.
    #[must_use]
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(program("polydev-shim"));
        command
            .args(arguments)
            .env("POLYDEV_ADDRESS", &self.address);
        command
    }
}

/// Starts a shim that listens in `folder`, and waits until it listens.
fn launch(command: &mut Command, folder: &Path) -> Process {
    let socket = folder.join("shim.sock");
    let mut process = Process::start(command, &folder.join("shim.log"));
    wait_until("the shim's socket", Duration::from_secs(60), || {
        if let Some(status) = process.exit() {
            panic!("the shim ended, {status}:\n{}", process.log());
        }
        std::os::unix::net::UnixStream::connect(&socket).map_err(|error| error.to_string())
    });
    process
}

/// The label of everything that the driver of a state folder has made in Docker.
///
/// # Panics
/// If no driver has used the folder.
#[must_use]
pub fn instance_label(state_dir: &Path) -> String {
    let instance = std::fs::read_to_string(state_dir.join("instance"));
    format!(
        "dev.polydev.instance={}",
        instance.expect("the driver has made its id")
    )
}
