//! What runs the pools and knows the drivers: a Nomad cluster, or this machine alone.

pub mod embedded;
pub mod nomad;

/// Where a driver is, and which node's it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct At {
    pub address: String,
    pub expected: Expected,
}

/// Which node a driver should say that it is. An address alone does not tell: on every machine, the
/// same path leads to its own driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expected {
    /// Nobody else can be there.
    Any,
    /// The node with this identity. Its name is for people.
    Node { identity: String, name: String },
    /// None, for this reason: the node cannot be reached.
    Nobody(String),
}

impl Expected {
    /// Checks what the driver at `address` says.
    ///
    /// # Errors
    /// Why this is not the driver of the node.
    pub fn check(&self, address: &str, told: &str) -> Result<(), String> {
        match self {
            Self::Any => Ok(()),
            Self::Node { identity, .. } if identity == told => Ok(()),
            Self::Node { name, .. } if address.starts_with("unix:") => Err(format!(
                "node `{name}` is at {address}, which on this machine is another node's driver: \
                 give its plugin a `shims` block, see docs/access.md"
            )),
            Self::Node { name, .. } => Err(format!(
                "node `{name}` is at {address}, where another node's driver answers: each needs \
                 an address of its own in `shims.advertise`"
            )),
            Self::Nobody(reason) => Err(reason.clone()),
        }
    }
}
