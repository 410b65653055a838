//! The Docker networks that the driver creates.

use std::collections::HashMap;

use bollard::{models::NetworkCreateRequest, query_parameters::InspectNetworkOptions};

use super::{CALL_TIMEOUT, Docker, Error, ignore_missing, within};

impl Docker {
    /// Creates the node's bridge if it is missing. Containers on it can reach outside
    /// addresses but not each other.
    ///
    /// # Errors
    /// [`Error`]
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
            // An earlier driver left it to dockerd's default.
            Ok(network) if network.enable_ipv6 == Some(true) => {
                return Err(Error::HasIpv6 { name: name.into() });
            }
            Ok(_) => return Ok(()),
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error),
        }
        let option = |key: &str, value: &str| (format!("com.docker.network.{key}"), value.into());
        let request = NetworkCreateRequest {
            name: name.into(),
            driver: Some("bridge".into()),
            options: Some(HashMap::from([
                option("bridge.name", interface),
                option("bridge.enable_icc", "false"),
            ])),
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
