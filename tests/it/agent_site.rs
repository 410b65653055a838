//! A shim whose one slot has an agent, and the model that its CLI asks.

use std::{collections::BTreeMap, time::Duration};

use polydev_proto::runtime::{RunStart, started};
use polydev_stand_in::Text;
use polydev_tests::{
    client::{Client, Outcome, prompt},
    fresh_key,
    host::Local,
    shim::Shim,
    wait_until,
};
use serde_json::Value;

pub(crate) struct Site {
    // Dropped before its model.
    pub(crate) shim: Shim,
    pub(crate) client: Client,
    pub(crate) model: Local,
}

impl Site {
    pub(crate) fn start(provider: &str) -> Self {
        let closed = format!("--egress={provider}=");
        Self::start_with(provider, &[&closed, "--agents=true"])
    }

    pub(crate) fn start_with(provider: &str, options: &[&str]) -> Self {
        let model = Local::start();
        let url = format!("--base-url={provider}={}", model.url);
        let options = [options, &[&url]].concat();
        let shim = Shim::dev_with(&[&format!("{provider}=1")], &options);
        Self {
            client: shim.client(),
            shim,
            model,
        }
    }

    /// Runs it once the slot is idle. Returns how it started, and the rest.
    pub(crate) fn run(&self, start: RunStart) -> (started::Agent, String, Outcome) {
        self.client.wait_idle(&start.provider, 1);
        let outcome = self.client.run(start).expect("a whole run");
        let started = outcome.started.clone();
        (started.agent(), started.cold_reason, outcome)
    }

    /// Waits until the model is asked this.
    pub(crate) fn wait_asked(&self, text: &str) {
        wait_until("the question", Duration::from_secs(20), || {
            let asked = self.asked(text);
            (!asked.is_empty())
                .then_some(())
                .ok_or("it has not come".into())
        });
    }

    /// The requests to the model with this prompt.
    pub(crate) fn asked(&self, text: &str) -> Vec<Value> {
        let wanted = Text::of(text);
        let requests = self.model.requests().into_iter();
        let found = requests.filter(|request| request.texts.contains(&wanted));
        found.map(|request| request.body).collect()
    }
}

pub(crate) fn asks(provider: &str, text: &str) -> RunStart {
    RunStart {
        env: BTreeMap::new(),
        ..prompt(provider, text, &fresh_key(), "")
    }
}
