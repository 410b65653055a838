//! The jobs of an agent: submits jobs, and waits for their allocations and tasks.

use std::time::Duration;

use serde_json::Value;

use super::{
    Nomad,
    exec::{self, Exec},
};
use crate::wait_until;

impl Nomad {
    /// Submits a provider's pool from `jobspecs/`.
    #[track_caller]
    pub fn submit_pool(&self, provider: &str, count: u32) {
        self.submit_pool_with(provider, count, "prepare_ahead=false");
    }

    /// As [`Nomad::submit_pool`], with another variable of the file, `NAME=VALUE`, instead of
    /// `prepare_ahead=false`.
    #[track_caller]
    pub fn submit_pool_with(&self, provider: &str, count: u32, variable: &str) {
        let file = format!("jobspecs/pool-{provider}.nomad.hcl");
        let count = format!("count={count}");
        self.run(&[
            "job", "run", "-detach", "-var", &count, "-var", variable, &file,
        ]);
    }

    /// Submits a job given as the API's JSON.
    #[track_caller]
    pub fn submit(&self, job: &Value) {
        self.put("/v1/jobs", &serde_json::json!({ "Job": job }));
    }

    /// Waits until `is` is true for the state of the task in a job's newest allocation. Returns the
    /// allocation.
    #[track_caller]
    pub fn wait_task(&self, job: &str, is: impl Fn(&Value) -> bool) -> Value {
        let what = format!("the task of job {job}");
        wait_until(&what, Duration::from_secs(90), || {
            let allocations = self.allocations(job);
            let Some(alloc) = allocations.last() else {
                return Err(self.get(&format!("/v1/job/{job}/evaluations")).to_string());
            };
            if is(&alloc["TaskStates"]["task"]) {
                Ok(alloc.clone())
            } else {
                Err(alloc["TaskStates"].to_string())
            }
        })
    }

    /// Waits until the task of a job runs. Returns the id of its allocation.
    #[track_caller]
    pub fn wait_started(&self, job: &str) -> String {
        let alloc = self.wait_task(job, |task| task["State"] == "running");
        alloc["ID"]
            .as_str()
            .expect("an allocation has an id")
            .to_owned()
    }

    /// Waits until the task of a job has ended for good. Returns its allocation.
    #[track_caller]
    pub fn wait_dead(&self, job: &str) -> Value {
        self.wait_task(job, |task| task["State"] == "dead")
    }

    /// The output of a task that Nomad has collected so far.
    #[must_use]
    pub fn logs(&self, alloc: &str, stream: &str) -> Vec<u8> {
        self.get_raw(&format!(
            "/v1/client/fs/logs/{alloc}?task=task&type={stream}&plain=true&origin=start"
        ))
    }

    /// Runs a command in a running task, over the agent's web socket, as Nomad's command line does.
    /// The sizes of the terminal are from Nomad's conformance suite.
    #[track_caller]
    pub fn exec(&self, alloc: &str, command: &[&str], tty: bool, stdin: &[u8]) -> Exec {
        exec::run(&self.address, alloc, command, tty, stdin)
    }

    /// The allocations of a job, the newest last.
    #[must_use]
    pub fn allocations(&self, job: &str) -> Vec<Value> {
        let mut list = match self.get(&format!("/v1/job/{job}/allocations")) {
            Value::Array(list) => list,
            _ => vec![],
        };
        list.sort_by_key(|alloc| alloc["CreateIndex"].as_u64());
        list
    }

    /// Waits until a job has `count` running allocations. Returns them.
    #[track_caller]
    pub fn wait_running(&self, job: &str, count: usize) -> Vec<Value> {
        wait_until(
            &format!("{count} running allocations"),
            Duration::from_secs(90),
            || {
                let running = self.allocations(job);
                let running: Vec<Value> = running
                    .into_iter()
                    .filter(|alloc| alloc["ClientStatus"] == "running")
                    .collect();
                if running.len() == count {
                    Ok(running)
                } else {
                    Err(format!("{running:?}"))
                }
            },
        )
    }
}
