//! A test that acts like a Nomad agent and a shim at once, for orders of calls that are rare
//! with real ones.

use std::{
    path::Path,
    time::{Duration, SystemTime},
};

use polydev_proto::{
    driver::{DestroyTaskRequest, RecoverTaskRequest, StartTaskRequest, TaskHandle},
    node::{
        Attach, AttachRequest, Ballot, Claim, ClaimRequest, ClaimResponse, RunEvent, RunInput,
        RunSpec, Slot, Stdin, WatchSlotsRequest, attach_request, claim_request,
        node_service_client::NodeServiceClient, run_event::Event, run_input::Input, slot::State,
    },
};
use polydev_shim::engine::embedded::{plugin::Plugin, pools};
use polydev_tests::program;
use prost_types::Duration as Seconds;
use tokio::time::timeout;
use tokio_stream::StreamExt;
use tonic::{Status, Streaming, transport::Channel};
use uuid::Uuid;

const LIMIT: Duration = Duration::from_secs(60);

/// A driver that this test has launched.
pub(crate) struct Host {
    pub(crate) plugin: Plugin,
    pub(crate) node: NodeServiceClient<Channel>,
}

impl Host {
    pub(crate) async fn launch(state_dir: &Path) -> Self {
        let driver = program("nomad-driver-polydev");
        let plugin = Plugin::launch(&driver, state_dir).await;
        let mut plugin = plugin.expect("the driver is launched");
        let address = plugin.healthy().await.expect("it is healthy");
        let node = NodeServiceClient::connect(address).await;
        Self {
            plugin,
            node: node.expect("it serves shims"),
        }
    }

    /// Kills the driver and launches another one, which recovers the task.
    pub(crate) async fn recover(self, state_dir: &Path, handle: &TaskHandle) -> Self {
        drop(self);
        let host = Self::launch(state_dir).await;
        let request = RecoverTaskRequest {
            task_id: id_of(handle),
            handle: Some(handle.clone()),
        };
        let recovered = host.plugin.driver().recover_task(request).await;
        recovered.expect("what was started is recovered");
        host
    }

    /// Waits until `is` is true for the one slot. Returns the slot and the driver's start id.
    pub(crate) async fn slot(&mut self, is: impl Fn(&Slot) -> bool) -> (Slot, String) {
        let watched = async {
            let slots = self.node.watch_slots(WatchSlotsRequest {}).await;
            let mut slots = slots.expect("the driver answers").into_inner();
            let mut start_id = String::new();
            while let Some(told) = slots.message().await.expect("another event") {
                start_id = Some(told.start_id)
                    .filter(|id| !id.is_empty())
                    .unwrap_or(start_id);
                if let Some(slot) = told.slots.into_iter().find(&is) {
                    return (slot, start_id);
                }
            }
            panic!("the driver ended the stream");
        };
        timeout(LIMIT, watched).await.expect("it comes to that")
    }

    /// Destroys the task, running or not.
    pub(crate) async fn destroy(&self, handle: &TaskHandle) {
        let task_id = id_of(handle);
        let request = DestroyTaskRequest {
            task_id,
            force: true,
        };
        let destroyed = self.plugin.driver().destroy_task(request).await;
        destroyed.expect("a task can be destroyed");
    }

    /// Starts a task that is one slot.
    pub(crate) async fn start_slot(&self, slot: &pools::Slot) -> TaskHandle {
        let task = Some(slot.task());
        let mut driver = self.plugin.driver();
        let started = driver.start_task(StartTaskRequest { task }).await;
        let started = started.expect("a slot can be started").into_inner();
        started.handle.expect("what is started has a handle")
    }

    /// Claims the idle slot, at `ahead` generations after its own. Returns the id of the run,
    /// and its events.
    pub(crate) async fn claim(
        &mut self,
        spec: RunSpec,
        ahead: u64,
    ) -> (String, Result<Streaming<ClaimResponse>, Status>) {
        let (slot, start_id) = self.slot(|slot| slot.state() == State::Idle).await;
        let run_id = Uuid::now_v7().to_string();
        let claim = Claim {
            run_id: run_id.clone(),
            slot_id: slot.slot_id,
            generation: slot.generation + ahead,
            start_id,
            start_by: Some((SystemTime::now() + LIMIT).into()),
            user_id: "user".into(),
            spec: Some(spec),
            ballot: Some(Ballot {
                attempt: 1,
                nonce: 1,
            }),
            ..Default::default()
        };
        let message = Some(claim_request::Message::Claim(Box::new(claim)));
        let requests = tokio_stream::iter([ClaimRequest { message }]);
        let events = self.node.claim(requests).await;
        (run_id, events.map(tonic::Response::into_inner))
    }

    /// Claims the slot for a command, and waits until `is` is true for an event of the run.
    /// Returns the id of the run.
    pub(crate) async fn start(&mut self, spec: RunSpec, is: impl Fn(&Event) -> bool) -> String {
        let (run_id, events) = self.claim(spec, 0).await;
        let mut events = events.expect("it is granted");
        loop {
            let told = timeout(LIMIT, events.message()).await;
            let told = told.expect("it is told in time").expect("the run goes on");
            let event = told.expect("it is told").event.and_then(|told| told.event);
            if event.as_ref().is_some_and(&is) {
                return run_id;
            }
        }
    }

    /// Attaches to a run, sends it a line, and returns its output.
    pub(crate) async fn answer(&mut self, run_id: &str, line: &'static str) -> Vec<u8> {
        let attach = attach_request::Message::Attach(Attach {
            run_id: run_id.into(),
            user_id: "user".into(),
            ..Default::default()
        });
        let input = attach_request::Message::Input(RunInput {
            input: Some(Input::Stdin(Stdin {
                data: line.into(),
                ..Default::default()
            })),
        });
        let messages = [attach, input].map(|message| AttachRequest {
            message: Some(message),
        });
        // The caller sends nothing more, and stays connected.
        let requests = tokio_stream::iter(messages).chain(tokio_stream::pending());
        let events = self.node.attach(requests).await.expect("the run is known");
        let mut events = events.into_inner();
        let mut written = Vec::new();
        loop {
            let told = timeout(LIMIT, events.message())
                .await
                .expect("it is told in time");
            match told.expect("the run goes on").and_then(|told| told.event) {
                Some(RunEvent {
                    event: Some(Event::Stdout(output)),
                }) => written.extend(output.data),
                Some(RunEvent {
                    event: Some(Event::Ended(_)),
                })
                | None => return written,
                Some(_) => {}
            }
        }
    }
}

/// A command that runs for at most a minute.
pub(crate) fn shell(script: &str) -> RunSpec {
    let seconds = |seconds| Some(Seconds { seconds, nanos: 0 });
    RunSpec {
        argv: ["sh", "-c", script]
            .map(|word| word.as_bytes().to_vec().into())
            .into(),
        stdin: true,
        timeout: seconds(60),
        kill_timeout: seconds(1),
        ..Default::default()
    }
}

pub(crate) fn id_of(handle: &TaskHandle) -> String {
    handle.config.as_ref().expect("a handle has one").id.clone()
}
