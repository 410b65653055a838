//! What the containers of a pool may reach beside their model.

use ipnet::Ipv4Net;
use polydev_proto::egress::{INTERNET, MAX_RULES, Rule};
use serde::{Deserialize, Serialize};

use super::{Error, value};

/// Where `private_networks` may be: private and shared addresses (RFC 1918, RFC 6598).
const PRIVATE_NETWORKS: [&str; 4] = [
    "10.0.0.0/8",
    "100.64.0.0/10",
    "172.16.0.0/12",
    "192.168.0.0/16",
];

/// An `egress` block of a slot or a plain task.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Egress {
    /// A network interface, and all public addresses.
    #[default]
    Internet,
    /// No interface: these destinations, through the broker.
    Listed(Vec<String>),
}

impl Egress {
    /// What is listed; `None` for the internet.
    #[must_use]
    pub fn listed(&self) -> Option<&[String]> {
        match self {
            Self::Internet => None,
            Self::Listed(allow) => Some(allow),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Raw {
    allow: Option<Vec<String>>,
}

impl Raw {
    /// `field` is the name of the block. A block without a list allows nothing.
    pub(super) fn check(self, field: &str) -> Result<Egress, Error> {
        let allow = self.allow.unwrap_or_default();
        let refused =
            |given: &str, allowed: String| value::refused(format!("{field}.allow"), given, allowed);
        if allow == [INTERNET] {
            return Ok(Egress::Internet);
        }
        if allow.len() > MAX_RULES {
            let given = format!("a list of {}", allow.len());
            return Err(refused(
                &given,
                format!("must have at most {MAX_RULES} entries"),
            ));
        }
        for rule in &allow {
            let parsed = rule.parse::<Rule>();
            parsed.map_err(|error| refused(rule, error.to_string()))?;
        }
        Ok(Egress::Listed(allow))
    }
}

/// The plugin's `private_networks`.
pub(super) fn private_networks(given: Option<Vec<String>>) -> Result<Vec<Ipv4Net>, Error> {
    let is_inside = |network: &Ipv4Net| {
        let private = PRIVATE_NETWORKS
            .iter()
            .map(|private| private.parse::<Ipv4Net>());
        let mut private = private.map(|private| private.expect("they are networks"));
        private.any(|private| private.contains(network))
    };
    let network = |text: String| {
        let network = text.parse::<Ipv4Net>().ok();
        let network = network.filter(|network| *network == network.trunc() && is_inside(network));
        network.ok_or_else(|| {
            let allowed = format!(
                "must be an IPv4 network, ADDRESS/PREFIX, within {}",
                PRIVATE_NETWORKS.join(", ")
            );
            value::refused("private_networks", &text, allowed)
        })
    };
    given.into_iter().flatten().map(network).collect()
}
