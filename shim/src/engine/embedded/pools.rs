//! Keeps slots without Nomad: starts one task for each slot, waits for it, and starts it again when
//! it fails.

use std::time::Duration;

use polydev_proto::{
    driver::{
        AllocatedCpuResources, AllocatedMemoryResources, AllocatedTaskResources,
        DestroyTaskRequest, Resources, StartTaskRequest, StopTaskRequest, TaskConfig,
        WaitTaskRequest, driver_client::DriverClient,
    },
    provider::Provider,
};
use polydev_transport::backoff::Backoff;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tonic::{Status, transport::Channel};
use uuid::Uuid;

/// What the jobs of `jobspecs/` reserve for a slot.
const CPU_MHZ: i64 = 100;
const MEMORY_MB: i64 = 256;
/// The same for a Python with its modules.
const PYTHON_MEMORY_MB: i64 = 512;
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
const MAX_RETRY_INTERVAL: Duration = Duration::from_secs(15);

/// What the slots of a pool have in common.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Where their model requests go, in place of the provider's own API.
    pub base_url: Option<String>,
    /// What their containers may reach, if not what is usual for their provider.
    pub egress: Option<Vec<String>>,
    /// Whether the provider's CLI waits in them for a prompt.
    pub agent: bool,
    /// Whether the calls of its tools wait for a decision.
    pub tool_policy: bool,
}

/// One slot of a pool.
pub struct Slot {
    provider: Provider,
    options: Options,
    node_id: String,
    alloc_id: String,
}

impl Slot {
    /// A slot with its own allocation id.
    #[must_use]
    pub fn new(provider: Provider, node_id: &str, options: Options) -> Self {
        Self {
            provider,
            options,
            node_id: node_id.to_owned(),
            alloc_id: Uuid::new_v4().to_string(),
        }
    }

    /// Keeps the slot until `stop`.
    pub(super) async fn keep(self, mut driver: DriverClient<Channel>, stop: CancellationToken) {
        let mut retry = Backoff::new(RETRY_INTERVAL, MAX_RETRY_INTERVAL);
        while !stop.is_cancelled() {
            let task = self.task();
            let task_id = task.id.clone();
            let kept = tokio::select! {
                kept = start_and_wait(driver.clone(), task) => kept,
                () = stop.cancelled() => Ok(()),
            };
            let request = StopTaskRequest {
                task_id: task_id.clone(),
                ..Default::default()
            };
            let stopped = driver.stop_task(request).await;
            let request = DestroyTaskRequest {
                task_id,
                force: true,
            };
            let destroyed = driver.destroy_task(request).await;
            if let Err(status) = stopped.map(drop).and(destroyed.map(drop)) {
                tracing::warn!(provider = %self.provider, error = status.message(), "cannot stop a slot");
            }
            if let Err(status) = kept {
                tracing::warn!(provider = %self.provider, error = status.message(), "a slot failed");
                tokio::select! {
                    () = sleep(retry.next_wait()) => {}
                    () = stop.cancelled() => {}
                }
            } else {
                retry.reset();
            }
        }
    }

    /// The task that Nomad would send for an allocation of `jobspecs/pool-*.nomad.hcl`.
    ///
    /// # Panics
    /// Never.
    #[must_use]
    pub fn task(&self) -> TaskConfig {
        let Options {
            base_url,
            egress,
            agent,
            tool_policy,
        } = &self.options;
        let config = serde_json::json!({
            "image": null,
            "slot": {
                "image": null,
                "provider": self.provider.name(),
                "agent": agent,
                "tool_policy": tool_policy,
                "upstream": base_url.as_ref().map(|url| serde_json::json!({ "base_url": url })),
                "egress": egress.as_ref().map(|allow| serde_json::json!({ "allow": allow })),
            },
        });
        let name = "runtime";
        TaskConfig {
            id: format!("{}/{name}/{:08x}", self.alloc_id, rand::random::<u32>()),
            name: name.into(),
            alloc_id: self.alloc_id.clone(),
            job_id: format!("polydev-pool-{}", self.provider),
            job_name: format!("polydev-pool-{}", self.provider),
            task_group_name: "pool".into(),
            namespace: "default".into(),
            node_id: self.node_id.clone(),
            node_name: "dev".into(),
            msgpack_driver_config: rmp_serde::to_vec_named(&config)
                .expect("a JSON value of strings can be encoded"),
            resources: Some(Resources {
                allocated_resources: Some(AllocatedTaskResources {
                    cpu: Some(AllocatedCpuResources {
                        cpu_shares: CPU_MHZ,
                    }),
                    memory: Some(AllocatedMemoryResources {
                        memory_mb: match self.provider {
                            Provider::Cli(_) => MEMORY_MB,
                            Provider::Python => PYTHON_MEMORY_MB,
                        },
                        memory_max_mb: 0,
                    }),
                    networks: vec![],
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }
}

async fn start_and_wait(mut driver: DriverClient<Channel>, task: TaskConfig) -> Result<(), Status> {
    let task_id = task.id.clone();
    driver
        .start_task(StartTaskRequest { task: Some(task) })
        .await?;
    let ended = driver
        .wait_task(WaitTaskRequest { task_id })
        .await?
        .into_inner();
    Err(Status::unknown(ended.err))
}
