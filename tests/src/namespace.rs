//! A network namespace for one test.

use std::process::Command;

use crate::process::{output, succeed};

/// Dropping the namespace removes it and its interfaces.
#[derive(Debug)]
pub struct Namespace(String);

impl Namespace {
    /// Makes a namespace whose loopback is up. `prefix` must be short, because the names of
    /// interfaces contain it.
    ///
    /// # Panics
    /// Without root's rights.
    #[must_use]
    pub fn new(prefix: &str) -> Self {
        let name = format!("{prefix}{:08x}", rand::random::<u32>());
        succeed(Command::new("ip").args(["netns", "add", &name]));
        let namespace = Self(name);
        namespace.ip(&["link", "set", "lo", "up"]);
        namespace
    }

    #[must_use]
    pub fn name(&self) -> &str {
        &self.0
    }

    /// A command that runs the program in its arguments inside the namespace. (`ip netns exec`
    /// would hide the cgroups.)
    #[must_use]
    pub fn inside(&self) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.0));
        command
    }

    /// Runs `ip WORDS` in the namespace. The command must succeed.
    #[track_caller]
    pub fn ip(&self, words: &[&str]) -> String {
        succeed(Command::new("ip").args(["-netns", &self.0]).args(words))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        output(Command::new("ip").args(["netns", "delete", &self.0]));
    }
}
