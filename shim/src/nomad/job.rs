//! Jobs.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::{Error, Nomad};

/// An allocation of a job, as far as it says how its start goes.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Allocation {
    /// `pending`, `running`, `complete`, `failed`, `lost` or `unknown`.
    pub client_status: String,
    #[serde(default)]
    pub task_states: Option<BTreeMap<String, TaskState>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct TaskState {
    #[serde(default)]
    pub events: Vec<TaskEvent>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct TaskEvent {
    pub r#type: String,
    #[serde(default)]
    pub display_message: String,
}

impl Nomad {
    /// The counts that a job's groups should have; `None` without such a job.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn counts(&self, job: &str) -> Result<Option<BTreeMap<String, u32>>, Error> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Scale {
            task_groups: BTreeMap<String, Group>,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Group {
            desired: u32,
        }
        let request = self.client.get(self.url(&format!("/v1/job/{job}/scale")));
        match self.ask::<Scale>(request).await {
            Ok((_, Scale { task_groups })) => Ok(Some(
                task_groups
                    .into_iter()
                    .map(|(name, group)| (name, group.desired))
                    .collect(),
            )),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Sets the count of a job's group, as `nomad job scale` does; `message` stands in the
    /// job's scaling events.
    ///
    /// # Errors
    /// [`Error`]; [`Error::is_deployment`] while a deployment of the job is going on.
    pub async fn scale(
        &self,
        job: &str,
        group: &str,
        count: u32,
        message: &str,
    ) -> Result<(), Error> {
        #[derive(Deserialize)]
        struct Taken {}
        let body = serde_json::json!({
            "Count": count, "Target": { "Group": group }, "Message": message,
        });
        let url = self.url(&format!("/v1/job/{job}/scale"));
        let request = self.client.post(url).body(body.to_string());
        self.ask::<Taken>(request).await.map(drop)
    }

    /// Dispatches a parameterised job, at most once for each `token`: the id of its child.
    ///
    /// # Errors
    /// [`Error`]; [`Error::is_not_found`] without such a job.
    pub async fn dispatch(
        &self,
        job: &str,
        meta: &[(&str, &str)],
        token: &str,
    ) -> Result<String, Error> {
        #[derive(Deserialize)]
        struct Dispatched {
            #[serde(rename = "DispatchedJobID")]
            job: String,
        }
        let meta: BTreeMap<_, _> = meta.iter().copied().collect();
        let url = self.url(&format!("/v1/job/{job}/dispatch"));
        let request = self.client.post(url).query(&[("idempotency_token", token)]);
        let request = request.body(serde_json::json!({ "Meta": meta }).to_string());
        let (_, dispatched) = self.ask::<Dispatched>(request).await?;
        Ok(dispatched.job)
    }

    /// Stops a job; one that is not there is stopped.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn stop(&self, job: &str) -> Result<(), Error> {
        #[derive(Deserialize)]
        struct Taken {}
        let request = self.client.delete(self.url(&format!("/v1/job/{job}")));
        match self.ask::<Taken>(request).await {
            Err(error) if !error.is_not_found() => Err(error),
            _ => Ok(()),
        }
    }

    /// The allocations of a job, as soon as there is something newer than `index`, or after
    /// a minute; with the index to ask with next.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn allocations(
        &self,
        job: &str,
        index: u64,
    ) -> Result<(u64, Vec<Allocation>), Error> {
        self.watch(&format!("/v1/job/{job}/allocations"), index)
            .await
    }
}
