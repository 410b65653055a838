//! The Docker networks that the driver creates.

use std::collections::HashMap;

use bollard::{
    models::{NetworkCreateRequest, NetworkInspect},
    query_parameters::InspectNetworkOptions,
};

use super::{CALL_TIMEOUT, Docker, Error, ignore_missing, within};

/// The driver of the network.
const DRIVER: &str = "bridge";

/// Options of the network, by Docker's names.
fn options(interface: &str) -> [(String, String); 2] {
    let option =
        |key: &str, value: &str| (format!("com.docker.network.bridge.{key}"), value.into());
    [option("name", interface), option("enable_icc", "false")]
}

/// The first option in which an existing network differs from what is wanted: its name, what the
/// network has, and what it should have.
fn differs(
    network: &NetworkInspect,
    interface: &str,
    labels: &HashMap<String, String>,
) -> Option<(String, String, String)> {
    let has = |of: &Option<HashMap<String, String>>, key: &str| {
        let value = of.as_ref().and_then(|of| of.get(key));
        value.cloned().unwrap_or_default()
    };
    let flag = |flag: Option<bool>| flag.unwrap_or_default().to_string();
    let driver = network.driver.clone().unwrap_or_default();
    let plain = [
        ("driver".to_owned(), driver, DRIVER.to_owned()),
        ("enable_ipv6".into(), flag(network.enable_ipv6), flag(None)),
        ("internal".into(), flag(network.internal), flag(None)),
    ];
    let options = options(interface).map(|(key, wanted)| {
        let found = has(&network.options, &key);
        (key, found, wanted)
    });
    let labels = labels.iter().map(|(key, wanted)| {
        let found = has(&network.labels, key);
        (key.clone(), found, wanted.clone())
    });
    let mut all = plain.into_iter().chain(options).chain(labels);
    all.find(|(_, found, wanted)| found != wanted)
}

impl Docker {
    /// Creates the node's bridge if it is missing. Containers on it can reach outside
    /// addresses but not each other.
    ///
    /// # Errors
    /// [`Error`]; [`Error::OtherNetwork`] if there is one with this name and other options.
    pub async fn ensure_bridge(
        &self,
        name: &str,
        interface: &str,
        labels: &HashMap<String, String>,
    ) -> Result<(), Error> {
        let inspect = self
            .api()?
            .inspect_network(name, None::<InspectNetworkOptions>);
        match within(CALL_TIMEOUT, format!("inspect network `{name}`"), inspect).await {
            Ok(network) => {
                return match differs(&network, interface, labels) {
                    None => Ok(()),
                    Some((option, found, wanted)) => Err(Error::OtherNetwork {
                        name: name.into(),
                        option,
                        found,
                        wanted,
                    }),
                };
            }
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error),
        }
        let request = NetworkCreateRequest {
            name: name.into(),
            driver: Some(DRIVER.into()),
            options: Some(options(interface).into()),
            labels: Some(labels.clone()),
            // No rule of the firewall is for it, whatever dockerd's default is.
            enable_ipv6: Some(false),
            ..Default::default()
        };
        let create = self.api()?.create_network(request);
        within(CALL_TIMEOUT, format!("create network `{name}`"), create)
            .await
            .map(drop)
    }

    /// Removes a bridge without containers; a missing bridge is not an error.
    ///
    /// # Errors
    /// [`Error`] if it is in use.
    pub async fn remove_bridge(&self, name: &str) -> Result<(), Error> {
        let remove = self.api()?.remove_network(name);
        ignore_missing(within(CALL_TIMEOUT, format!("remove network `{name}`"), remove).await)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_with_other_options_is_not_taken() {
        let labels = HashMap::from([("dev.polydev.instance".to_owned(), "0123abcd".to_owned())]);
        let ours = || NetworkInspect {
            driver: Some(DRIVER.into()),
            options: Some(options("pd-0123abcd").into()),
            labels: Some(labels.clone()),
            enable_ipv6: Some(false),
            ..NetworkInspect::default()
        };
        let differs = |network: &NetworkInspect| differs(network, "pd-0123abcd", &labels);
        assert_eq!(differs(&ours()), None);
        let with = |key: &str, value: &str| {
            let mut network = ours();
            let options = network.options.as_mut().unwrap();
            options.insert(format!("com.docker.network.bridge.{key}"), value.into());
            differs(&network).map(|(option, ..)| option)
        };
        let icc = "com.docker.network.bridge.enable_icc";
        assert_eq!(with("enable_icc", "true").as_deref(), Some(icc));
        assert!(with("name", "docker0").is_some());
        assert_eq!(
            with("host_binding_ipv4", "0.0.0.0"),
            None,
            "it says nothing here"
        );
        for other in [
            NetworkInspect {
                driver: Some("macvlan".into()),
                ..ours()
            },
            NetworkInspect {
                enable_ipv6: Some(true),
                ..ours()
            },
            NetworkInspect {
                internal: Some(true),
                ..ours()
            },
            NetworkInspect {
                labels: None,
                ..ours()
            },
        ] {
            assert!(differs(&other).is_some(), "{other:?}");
        }
    }
}
