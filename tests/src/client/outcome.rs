//! What a run leaves.

use polydev_proto::runtime::{Accepted, Artifacts, Destination, Exited, Started, agent_event};

/// A run that has ended.
#[derive(Debug)]
pub struct Outcome {
    pub accepted: Accepted,
    pub started: Started,
    /// What the agent has done.
    pub agent: Vec<agent_event::Event>,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub artifacts: Artifacts,
    /// The contents of the artifacts, one file after the other.
    pub artifact_data: Vec<u8>,
    /// What it was not allowed to connect to.
    pub denied: Vec<Destination>,
    pub exited: Exited,
}

impl Outcome {
    #[must_use]
    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    #[must_use]
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }
}
