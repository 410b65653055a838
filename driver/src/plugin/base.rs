//! The plugin's identity and configuration.
//!
//! Each agent start launches the binary three times: twice to inspect it, without
//! `nomad_config`, and once to use it. Only the third process takes charge of the node.

use std::sync::Arc;

use parking_lot::Mutex;
use polydev_proto::base::{
    ClientTopology, ClientTopologyCore, ConfigSchemaRequest, ConfigSchemaResponse,
    PluginInfoRequest, PluginInfoResponse, PluginType, SetConfigRequest, SetConfigResponse,
    base_plugin_server::BasePlugin,
};
use tokio::sync::watch;
use tonic::{Request, Response, Status};

use crate::{
    chain, config,
    events::Events,
    fingerprint::{self, Health},
    node::Node,
    site::Compute,
};

/// The only version of the driver API.
const API_VERSION: &str = "v0.1.0";
/// The value of `driver` in jobs.
const NAME: &str = "polydev";

pub(super) struct Base {
    events: Events,
    /// Taken by the first configuration that has `nomad_config`.
    publish: Mutex<Option<Publish>>,
}

type Publish = (watch::Sender<Option<Arc<Node>>>, watch::Sender<Health>);

impl Base {
    pub(super) fn new(
        events: Events,
        node: watch::Sender<Option<Arc<Node>>>,
        health: watch::Sender<Health>,
    ) -> Self {
        Self {
            events,
            publish: Mutex::new(Some((node, health))),
        }
    }
}

#[tonic::async_trait]
impl BasePlugin for Base {
    async fn plugin_info(
        &self,
        _: Request<PluginInfoRequest>,
    ) -> Result<Response<PluginInfoResponse>, Status> {
        Ok(Response::new(PluginInfoResponse {
            r#type: PluginType::Driver.into(),
            plugin_api_versions: vec![API_VERSION.into()],
            plugin_version: env!("CARGO_PKG_VERSION").into(),
            name: NAME.into(),
        }))
    }

    async fn config_schema(
        &self,
        _: Request<ConfigSchemaRequest>,
    ) -> Result<Response<ConfigSchemaResponse>, Status> {
        Ok(Response::new(ConfigSchemaResponse {
            spec: Some(config::schema::plugin()),
        }))
    }

    /// An error here prevents the whole agent from starting. So only values that are wrong
    /// in themselves are rejected; the fingerprint reports what is missing on the node.
    async fn set_config(
        &self,
        request: Request<SetConfigRequest>,
    ) -> Result<Response<SetConfigResponse>, Status> {
        let request = request.into_inner();
        let config = config::Plugin::parse(&request.msgpack_config)
            .map_err(|error| Status::invalid_argument(chain(&error)))?;
        if let Some(nomad) = request.nomad_config {
            let compute = compute(nomad.driver.and_then(|driver| driver.topology));
            let publish = self.publish.lock().take();
            match publish {
                Some((node, health)) => {
                    let run = fingerprint::run(config, compute, self.events.clone(), node, health);
                    // Runs until the process ends.
                    tokio::spawn(run);
                }
                None => tracing::warn!("ignoring a second configuration until the next start"),
            }
        }
        Ok(Response::new(SetConfigResponse {}))
    }
}

/// The node's CPUs as its agent counts them.
fn compute(topology: Option<ClientTopology>) -> Compute {
    let ClientTopology {
        cores,
        override_total_compute,
        ..
    } = topology.unwrap_or_default();
    let own = std::thread::available_parallelism().map_or(1, usize::from);
    let count = if cores.is_empty() { own } else { cores.len() };
    let speed = |core: &ClientTopologyCore| match core.base_speed {
        0 => core.guess_speed.max(core.max_speed),
        base => base,
    };
    let mhz = match override_total_compute {
        0 => cores.iter().map(speed).sum(),
        given => given,
    };
    Compute {
        mhz: i64::try_from(mhz).unwrap_or(i64::MAX),
        cores: i64::try_from(count).unwrap_or(1),
    }
}
