//! A go-plugin host for one driver: launch, handshake, configuration and shutdown, as in a Nomad
//! agent.

use std::{
    io,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use polydev_proto::{
    base::{
        ConfigSchemaRequest, NomadConfig, NomadDriverConfig, PluginInfoRequest, SetConfigRequest,
        base_plugin_client::BasePluginClient,
    },
    driver::{FingerprintRequest, driver_client::DriverClient, fingerprint_response::HealthState},
    goplugin::{Empty, grpc_controller_client::GrpcControllerClient},
    structs::attribute::Value,
};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, ChildStdout, Command},
    time::timeout,
};
use tonic::{
    Status,
    transport::{Channel, Endpoint},
};

const COOKIE: (&str, &str) = (
    "NOMAD_PLUGIN_MAGIC_COOKIE",
    "e4327c2e01eabfd75a8a67adb114fb34a757d57eee7728d857a8cec6e91a7255",
);
const API_VERSION: &str = "v0.1.0";
/// How long to wait for the handshake: as long as a Nomad agent does.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(60);
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
const HEALTHY_TIMEOUT: Duration = Duration::from_secs(30);
const EXIT_TIMEOUT: Duration = Duration::from_secs(2);

/// Why the driver cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot launch the driver `{path}`")]
    Launch { path: PathBuf, source: io::Error },
    #[error("the driver sent no valid handshake: {reason}")]
    Handshake { reason: String },
    #[error("cannot connect to the driver")]
    Connect(#[source] tonic::transport::Error),
    #[error("the driver refused {operation}: {}", status.message())]
    Refused {
        operation: &'static str,
        status: Status,
    },
    #[error("the driver is not healthy: {reason}")]
    Unhealthy { reason: String },
}

/// A driver process and the connection to it.
pub struct Plugin {
    process: Child,
    /// Kept open: a plugin whose stdout breaks may assume that its host has died.
    _stdout: BufReader<ChildStdout>,
    channel: Channel,
}

impl Plugin {
    /// Launches a driver and configures it with a state folder and no other options.
    ///
    /// # Errors
    /// [`Error`]; nothing is left running.
    pub async fn launch(driver: &Path, state_dir: &Path) -> Result<Self, Error> {
        let mut process = Command::new(driver)
            .env(COOKIE.0, COOKIE.1)
            .env("PLUGIN_PROTOCOL_VERSIONS", "2")
            // These secrets are only for the shim.
            .env_remove("ENCRYPTION_MASTER_KEY")
            .env_remove("PGPASSWORD")
            .env("PLUGIN_MIN_PORT", "10000")
            .env("PLUGIN_MAX_PORT", "25000")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|source| Error::Launch {
                path: driver.to_owned(),
                source,
            })?;
        if let Some(stderr) = process.stderr.take() {
            // The task ends with the driver.
            tokio::spawn(relay_log(BufReader::new(stderr)));
        }
        let missing = || Error::Handshake {
            reason: "it has no stdout".into(),
        };
        let mut stdout = BufReader::new(process.stdout.take().ok_or_else(missing)?);
        let mut line = String::new();
        match timeout(HANDSHAKE_TIMEOUT, stdout.read_line(&mut line)).await {
            Ok(Ok(count)) if count > 0 => {}
            Ok(Ok(_)) => {
                return Err(Error::Handshake {
                    reason: "its output ended".into(),
                });
            }
            Ok(Err(error)) => {
                return Err(Error::Handshake {
                    reason: error.to_string(),
                });
            }
            Err(_) => {
                return Err(Error::Handshake {
                    reason: "nothing within 60 s".into(),
                });
            }
        }
        let address = socket(line.trim())?;
        let endpoint = Endpoint::from_shared(address).map_err(Error::Connect)?;
        let channel = endpoint
            .connect_timeout(CALL_TIMEOUT)
            .connect()
            .await
            .map_err(Error::Connect)?;
        let plugin = Self {
            process,
            _stdout: stdout,
            channel,
        };
        plugin.configure(state_dir).await?;
        Ok(plugin)
    }

    async fn configure(&self, state_dir: &Path) -> Result<(), Error> {
        let refused = |operation| move |status| Error::Refused { operation, status };
        let mut base = BasePluginClient::new(self.channel.clone());
        let info = limited(base.plugin_info(PluginInfoRequest {})).await;
        let info = info.map_err(refused("PluginInfo"))?.into_inner();
        if !info
            .plugin_api_versions
            .iter()
            .any(|version| version == API_VERSION)
        {
            let reason = format!("`{}` does not support API version {API_VERSION}", info.name);
            return Err(Error::Handshake { reason });
        }
        limited(base.config_schema(ConfigSchemaRequest {}))
            .await
            .map_err(refused("ConfigSchema"))?;

        // As Nomad encodes a `config` block: every option of the schema, absent ones as nil.
        let config = serde_json::json!({
            "endpoint": null,
            "init_path": null,
            "run_class": null,
            "state_dir": state_dir.to_string_lossy(),
        });
        let msgpack_config =
            rmp_serde::to_vec_named(&config).map_err(|error| Error::Handshake {
                reason: format!("cannot encode its configuration: {error}"),
            })?;
        let mut request = SetConfigRequest {
            msgpack_config,
            nomad_config: None,
            plugin_api_version: API_VERSION.into(),
        };
        let probe = limited(base.set_config(request.clone())).await;
        probe.map_err(refused("SetConfig"))?;
        request.nomad_config = Some(NomadConfig {
            driver: Some(NomadDriverConfig::default()),
        });
        limited(base.set_config(request))
            .await
            .map_err(refused("SetConfig"))?;
        Ok(())
    }

    /// Waits until the driver can run slots and returns its node service's address.
    ///
    /// # Errors
    /// [`Error`] with the reason if it cannot within 30 s.
    pub async fn healthy(&mut self) -> Result<String, Error> {
        let mut reason = "it has reported nothing".to_owned();
        let healthy = async {
            let refused = |status| Error::Refused {
                operation: "Fingerprint",
                status,
            };
            let mut driver = self.driver();
            let fingerprints = driver.fingerprint(FingerprintRequest {}).await;
            let mut fingerprints = fingerprints.map_err(refused)?.into_inner();
            while let Some(told) = fingerprints.message().await.map_err(refused)? {
                let address = told.attributes.get("driver.polydev.node_address");
                if told.health() == HealthState::Healthy
                    && let Some(Value::StringVal(address)) = address.and_then(|a| a.value.clone())
                {
                    return Ok(address);
                }
                if told.health() == HealthState::Unhealthy && reason != told.health_description {
                    tracing::warn!(
                        reason = told.health_description,
                        "the driver is not healthy yet"
                    );
                }
                reason = told.health_description;
            }
            Err(Error::Unhealthy {
                reason: "its fingerprint ended".into(),
            })
        };
        match timeout(HEALTHY_TIMEOUT, healthy).await {
            Ok(result) => result,
            Err(_) => Err(Error::Unhealthy { reason }),
        }
    }

    /// The service that Nomad calls.
    #[must_use]
    pub fn driver(&self) -> DriverClient<Channel> {
        DriverClient::new(self.channel.clone())
    }

    pub(super) async fn died(&mut self) -> String {
        match self.process.wait().await {
            Ok(status) => describe(status),
            Err(error) => error.to_string(),
        }
    }

    /// Asks the driver to exit, and kills it if it does not.
    pub async fn shutdown(mut self) {
        let mut controller = GrpcControllerClient::new(self.channel.clone());
        let _ended_meanwhile = limited(controller.shutdown(Empty {})).await;
        if timeout(EXIT_TIMEOUT, self.process.wait()).await.is_err() {
            tracing::warn!("the driver did not exit, killing it");
            if let Err(error) = self.process.kill().await {
                tracing::warn!(%error, "cannot kill the driver");
            }
        }
    }
}

async fn limited<T>(call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    timeout(CALL_TIMEOUT, call)
        .await
        .unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer in 10 s")))
}

/// The address in a handshake line, `1|2|unix|PATH|grpc`.
fn socket(line: &str) -> Result<String, Error> {
    match line.split('|').map(str::trim).collect::<Vec<_>>()[..] {
        ["1", "2", "unix", path, "grpc", ..] => Ok(format!("unix://{path}")),
        _ => Err(Error::Handshake {
            reason: format!("`{line}` must be `1|2|unix|PATH|grpc`"),
        }),
    }
}

fn describe(status: ExitStatus) -> String {
    format!("the driver ended: {status}")
}

/// Writes the driver's log lines to the shim's log.
async fn relay_log(mut stderr: BufReader<tokio::process::ChildStderr>) {
    let mut line = String::new();
    while stderr
        .read_line(&mut line)
        .await
        .is_ok_and(|count| count > 0)
    {
        let entry: serde_json::Value = serde_json::from_str(&line).unwrap_or_default();
        let message = entry["@message"].as_str().unwrap_or(line.trim());
        let mut details = String::new();
        for (key, value) in entry.as_object().into_iter().flatten() {
            if let Some(value) = value.as_str().filter(|_| !key.starts_with('@')) {
                details.push_str(&format!(" {key}={value}"));
            }
        }
        match entry["@level"].as_str() {
            Some("error") => tracing::error!(target: "driver", "{message}{details}"),
            Some("warn") => tracing::warn!(target: "driver", "{message}{details}"),
            Some("info") => tracing::info!(target: "driver", "{message}{details}"),
            _ => tracing::debug!(target: "driver", "{message}{details}"),
        }
        line.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handshake_is_understood_with_and_without_the_empty_certificate() {
        assert_eq!(
            socket("1|2|unix|/tmp/x.sock|grpc").unwrap(),
            "unix:///tmp/x.sock"
        );
        assert_eq!(
            socket("1|2|unix|/tmp/x.sock|grpc|").unwrap(),
            "unix:///tmp/x.sock"
        );
        assert!(socket("1|1|unix|/tmp/x.sock|netrpc").is_err());
        assert!(socket("hello").is_err());
    }
}
