//! Nomad's jobs.

use std::collections::BTreeMap;

use reqwest::Method;
use serde::Deserialize;
use serde_json::Value;

use super::{Error, Nomad};

/// The state of a job's allocation.
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

/// How a group of a job is scaled.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Scaling {
    /// The count that the group should have.
    pub desired: u32,
    #[serde(default)]
    pub events: Option<Vec<ScalingEvent>>,
}

/// One change of a group's count.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct ScalingEvent {
    /// Nanoseconds since 1970.
    pub time: i64,
    /// Whether the change failed.
    pub error: bool,
    /// Data from whoever made the change.
    #[serde(default)]
    pub meta: Option<BTreeMap<String, Value>>,
}

/// What registering a job would change.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Plan {
    /// The index of the registered job; 0 if there is none.
    pub job_modify_index: u64,
    pub diff: Value,
    #[serde(default)]
    pub annotations: Value,
    #[serde(default, rename = "FailedTGAllocs")]
    pub failed: Value,
    #[serde(default)]
    pub warnings: String,
}

/// An answer whose content is not used.
#[derive(Deserialize)]
struct Taken {}

impl Nomad {
    /// How a job's groups are scaled; `None` if the job does not exist.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn scaling(&self, job: &str) -> Result<Option<BTreeMap<String, Scaling>>, Error> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Scale {
            task_groups: BTreeMap<String, Scaling>,
        }
        let request = self.request(Method::GET, &format!("/v1/job/{job}/scale"));
        match self.ask::<Scale>(request).await {
            Ok((_, Scale { task_groups })) => Ok(Some(task_groups)),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Sets the count of a job's group, as `nomad job scale` does. The job's scaling events contain
    /// `message` and `meta`.
    ///
    /// # Errors
    /// [`Error`]; [`Error::is_deployment`] while a deployment of the job is active.
    pub async fn scale(
        &self,
        job: &str,
        group: &str,
        count: u32,
        message: &str,
        meta: &BTreeMap<&str, String>,
    ) -> Result<(), Error> {
        let body = serde_json::json!({
            "Count": count, "Target": { "Group": group }, "Message": message, "Meta": meta,
        });
        let request = self.request(Method::POST, &format!("/v1/job/{job}/scale"));
        let request = request.body(body.to_string());
        self.ask::<Taken>(request).await.map(drop)
    }

    /// Parses a job file with these `variables`, lines of `name = value`.
    ///
    /// # Errors
    /// [`Error::Status`] with Nomad's message about the file.
    pub async fn parse(&self, hcl: &str, variables: &str) -> Result<Value, Error> {
        let body = serde_json::json!({
            "JobHCL": hcl, "Variables": variables, "Canonicalize": true,
        });
        let request = self.request(Method::POST, "/v1/jobs/parse");
        let (_, job) = self.ask(request.body(body.to_string())).await?;
        Ok(job)
    }

    /// What registering a job would change.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn plan(&self, job: &Value) -> Result<Plan, Error> {
        let id = job["ID"].as_str().unwrap_or_default();
        let body = serde_json::json!({ "Job": job, "Diff": true });
        let request = self.request(Method::POST, &format!("/v1/job/{id}/plan"));
        let (_, plan) = self.ask(request.body(body.to_string())).await?;
        Ok(plan)
    }

    /// Registers a job, if the registered job has not changed since the plan.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn register(&self, job: &Value, planned: &Plan) -> Result<(), Error> {
        let body = serde_json::json!({
            "Job": job, "EnforceIndex": true, "JobModifyIndex": planned.job_modify_index,
        });
        let request = self.request(Method::POST, "/v1/jobs");
        let request = request.body(body.to_string());
        self.ask::<Taken>(request).await.map(drop)
    }

    /// Dispatches a parameterised job, at most once for each `token`. Returns the id of the
    /// dispatched job.
    ///
    /// # Errors
    /// [`Error`]; [`Error::is_not_found`] if the job does not exist.
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
        let request = self.request(Method::POST, &format!("/v1/job/{job}/dispatch"));
        let request = request.query(&[("idempotency_token", token)]);
        let request = request.body(serde_json::json!({ "Meta": meta }).to_string());
        let (_, dispatched) = self.ask::<Dispatched>(request).await?;
        Ok(dispatched.job)
    }

    /// Stops a job. Succeeds also if the job does not exist.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn stop(&self, job: &str) -> Result<(), Error> {
        let request = self.request(Method::DELETE, &format!("/v1/job/{job}"));
        match self.ask::<Taken>(request).await {
            Err(error) if !error.is_not_found() => Err(error),
            _ => Ok(()),
        }
    }

    /// The allocations of a job, as soon as there is something newer than `index`, or after a
    /// minute. Also returns the index for the next query.
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
