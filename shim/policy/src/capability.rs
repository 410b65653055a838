//! What a tool was granted. Without a grant that fits, a call is denied.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use wildmatch::WildMatch;

/// What a sink needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Capability {
    FilesystemRead,
    FilesystemWrite,
    NetworkEgress,
    ProcessExec,
    CredentialAccess,
    Ipc,
}

impl Capability {
    /// The name in reasons and records.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::FilesystemRead => "filesystem_read",
            Self::FilesystemWrite => "filesystem_write",
            Self::NetworkEgress => "network_egress",
            Self::ProcessExec => "process_exec",
            Self::CredentialAccess => "credential_access",
            Self::Ipc => "ipc",
        }
    }

    /// Whether its targets are paths of files.
    fn is_of_files(self) -> bool {
        matches!(self, Self::FilesystemRead | Self::FilesystemWrite)
    }
}

/// A capability for the targets that fit one of the patterns `allow`, and none of `deny`. In a
/// pattern `?` stands for one character and `*` for any characters, also `/`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grant {
    pub capability: Capability,
    pub allow: Vec<String>,
    #[serde(default)]
    pub deny: Vec<String>,
}

/// What each tool was granted, for each of its actions.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Grants(BTreeMap<String, BTreeMap<String, Vec<Grant>>>);

impl Grants {
    pub fn add(&mut self, tool: &str, action: &str, grant: Grant) {
        let actions = self.0.entry(tool.into()).or_default();
        actions.entry(action.into()).or_default().push(grant);
    }

    /// Whether the tool's action may have the capability for this target. A denial of any of its grants of
    /// the capability decides.
    #[must_use]
    pub fn allow(&self, tool: &str, action: &str, capability: Capability, target: &str) -> bool {
        let Some(grants) = self.0.get(tool).and_then(|actions| actions.get(action)) else {
            return false;
        };
        // A path could lead elsewhere than its text says.
        if capability.is_of_files() && !is_plain_path(target) {
            return false;
        }
        let fits = |patterns: &[String]| {
            let mut patterns = patterns.iter();
            patterns.any(|pattern| WildMatch::new(pattern).matches(target))
        };
        let mut of_capability = grants.iter().filter(|grant| grant.capability == capability);
        let is_denied = of_capability.clone().any(|grant| fits(&grant.deny));
        !is_denied && of_capability.any(|grant| fits(&grant.allow))
    }
}

/// Whether a path is absolute and has neither `.` nor `..` nor empty parts.
fn is_plain_path(path: &str) -> bool {
    let parts = path.strip_prefix('/').map(|rest| rest.split('/'));
    parts.is_some_and(|mut parts| parts.all(|part| !matches!(part, "" | "." | "..")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grants(capability: Capability, allow: &[&str], deny: &[&str]) -> Grants {
        let list = |items: &[&str]| items.iter().map(ToString::to_string).collect();
        let mut grants = Grants::default();
        let grant = Grant {
            capability,
            allow: list(allow),
            deny: list(deny),
        };
        grants.add("tool", "run", grant);
        grants
    }

    #[test]
    fn only_what_was_granted_is_allowed_and_a_denial_decides() {
        let grants = grants(Capability::ProcessExec, &["*"], &["rm *"]);
        assert!(grants.allow("tool", "run", Capability::ProcessExec, "ls /tmp"));
        assert!(!grants.allow("tool", "run", Capability::ProcessExec, "rm /tmp/a"));
        assert!(!grants.allow("tool", "run", Capability::NetworkEgress, "ls /tmp"));
        assert!(!grants.allow("tool", "write", Capability::ProcessExec, "ls /tmp"));
        assert!(!grants.allow("other", "run", Capability::ProcessExec, "ls /tmp"));
    }

    #[test]
    fn a_path_that_could_lead_elsewhere_fits_no_pattern() {
        let grants = grants(Capability::FilesystemRead, &["/tmp/*"], &["/tmp/private/*"]);
        let may = |path| grants.allow("tool", "run", Capability::FilesystemRead, path);
        assert!(may("/tmp/report.txt") && may("/tmp/a/b"));
        for path in [
            "/tmp/../etc/passwd",
            "/tmp/./a",
            "/tmp//a",
            "tmp/a",
            "/tmp/private/a",
            "/tmp/",
        ] {
            assert!(!may(path), "{path}");
        }
    }
}
