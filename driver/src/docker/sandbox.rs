//! The container that holds a group's network, and nothing else.

use std::collections::HashMap;

use bollard::models::{ContainerCreateBody, HostConfig, HostConfigLogConfig};

use super::{Docker, Error};

/// A program that sleeps, in an image with nothing but it.
#[derive(Debug, Clone)]
pub struct SandboxSpec {
    pub name: String,
    pub image: String,
    pub command: Vec<String>,
    pub labels: HashMap<String, String>,
    /// Empty for Docker's choice.
    pub hostname: String,
}

/// A sandbox that runs.
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
    /// [`Error`]; [`Error::is_conflict`] if there is one of that name.
    pub async fn create_sandbox(&self, spec: &SandboxSpec) -> Result<String, Error> {
        let body = ContainerCreateBody {
            image: Some(spec.image.clone()),
            entrypoint: Some(spec.command.clone()),
            hostname: Some(spec.hostname.clone()).filter(|name| !name.is_empty()),
            labels: Some(spec.labels.clone()),
            host_config: Some(HostConfig {
                network_mode: Some("none".into()),
                cap_drop: Some(vec!["ALL".into()]),
                security_opt: Some(vec!["no-new-privileges:true".into()]),
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

    /// A sandbox by id or name; `None` if it does not run.
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
