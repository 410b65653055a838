//! The container that only holds a group's network.

use std::collections::HashMap;

use bollard::models::{ContainerCreateBody, HostConfig, HostConfigLogConfig};

use super::{Docker, Error};

/// A program that sleeps, alone in its image.
#[derive(Debug, Clone)]
pub struct SandboxSpec {
    pub name: String,
    pub image: String,
    pub command: Vec<String>,
    pub labels: HashMap<String, String>,
    /// Empty: Docker chooses.
    pub hostname: String,
}

/// A running sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sandbox {
    pub id: String,
    pub hostname: String,
    /// File of its network namespace.
    pub namespace: String,
}

impl Docker {
    /// Creates a sandbox and returns its id.
    ///
    /// # Errors
    /// [`Error`]; [`Error::is_conflict`] if the name is in use.
    pub async fn create_sandbox(&self, spec: &SandboxSpec) -> Result<String, Error> {
        let body = ContainerCreateBody {
            image: Some(spec.image.clone()),
            entrypoint: Some(spec.command.clone()),
            hostname: Some(spec.hostname.clone()).filter(|name| !name.is_empty()),
            labels: Some(spec.labels.clone()),
            host_config: Some(HostConfig {
                network_mode: Some("none".into()),
                cap_drop: Some(vec!["ALL".into()]),
                security_opt: Some(vec!["no-new-privileges=true".into()]),
                readonly_rootfs: Some(true),
                memory: Some(16 << 20),
                memory_swap: Some(16 << 20),
                pids_limit: Some(8),
                log_config: Some(HostConfigLogConfig {
                    typ: Some("none".into()),
                    config: None,
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        self.create_container(&spec.name, body).await
    }

    /// Finds a sandbox by id or name; `None` if it is not running.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn sandbox(&self, id: &str) -> Result<Option<Sandbox>, Error> {
        let container = self.inspect(id).await?;
        let runs = container.state.and_then(|state| state.running) == Some(true);
        let namespace = container
            .network_settings
            .and_then(|settings| settings.sandbox_key);
        Ok(namespace
            .filter(|path| runs && !path.is_empty())
            .map(|namespace| Sandbox {
                id: container.id.unwrap_or_default(),
                hostname: container
                    .config
                    .and_then(|config| config.hostname)
                    .unwrap_or_default(),
                namespace,
            }))
    }
}
