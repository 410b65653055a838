//! What a driver does with a slot that its host recovers. The host is a test that acts like a
//! Nomad agent, in an order that is rare with a real agent.

use std::{fs, path::Path, time::Duration};

use polydev_proto::{
    driver::{
        DestroyTaskRequest, RecoverTaskRequest, StartTaskRequest, TaskHandle, WaitTaskRequest,
    },
    node::{
        Attach, AttachRequest, Ballot, Claim, ClaimRequest, RunEvent, RunInput, RunSpec, Slot,
        Stdin, WatchSlotsRequest, attach_request, claim_request,
        node_service_client::NodeServiceClient, run_event::Event, run_input::Input, slot::State,
    },
};
use polydev_shim::engine::embedded::{plugin::Plugin, pools};
use polydev_tests::{docker, folder::Folder, program, shim::instance_label};
use prost_types::Duration as Seconds;
use tokio::time::timeout;
use tokio_stream::StreamExt;
use tonic::transport::Channel;
use uuid::Uuid;

const LIMIT: Duration = Duration::from_secs(60);

/// A driver that this test has launched.
struct Host {
    plugin: Plugin,
    node: NodeServiceClient<Channel>,
}

impl Host {
    async fn launch(state_dir: &Path) -> Self {
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
    async fn recover(self, state_dir: &Path, handle: &TaskHandle) -> Self {
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
    async fn slot(&mut self, is: impl Fn(&Slot) -> bool) -> (Slot, String) {
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
    async fn destroy(&self, handle: &TaskHandle) {
        let task_id = id_of(handle);
        let request = DestroyTaskRequest {
            task_id,
            force: true,
        };
        let destroyed = self.plugin.driver().destroy_task(request).await;
        destroyed.expect("a task can be destroyed");
    }

    /// Claims the slot for a command, and waits until the command runs. Returns the id of the run.
    async fn start(&mut self, script: &str) -> String {
        let (slot, start_id) = self.slot(|slot| slot.state() == State::Idle).await;
        let run_id = Uuid::now_v7().to_string();
        let seconds = |seconds| Some(Seconds { seconds, nanos: 0 });
        let claim = Claim {
            run_id: run_id.clone(),
            slot_id: slot.slot_id,
            generation: slot.generation,
            start_id,
            start_by: Some((std::time::SystemTime::now() + LIMIT).into()),
            user_id: "user".into(),
            spec: Some(RunSpec {
                argv: ["sh", "-c", script]
                    .map(|word| word.as_bytes().to_vec().into())
                    .into(),
                stdin: true,
                timeout: seconds(60),
                kill_timeout: seconds(1),
                ..Default::default()
            }),
            ballot: Some(Ballot {
                attempt: 1,
                nonce: 1,
            }),
            ..Default::default()
        };
        let message = Some(claim_request::Message::Claim(Box::new(claim)));
        let requests = tokio_stream::iter([ClaimRequest { message }]);
        let events = self.node.claim(requests).await.expect("it is granted");
        let mut events = events.into_inner();
        loop {
            let told = events
                .message()
                .await
                .expect("the run goes on")
                .expect("it is told");
            if let Some(RunEvent {
                event: Some(Event::Started(_)),
            }) = told.event
            {
                return run_id;
            }
        }
    }

    /// Attaches to a run, sends it a line, and returns its output.
    async fn answer(&mut self, run_id: &str, line: &'static str) -> Vec<u8> {
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

fn id_of(handle: &TaskHandle) -> String {
    handle.config.as_ref().expect("a handle has one").id.clone()
}

#[test]
fn a_recovered_slot_waits_for_nomad_and_its_destruction_ends_no_run() {
    let folder = Folder::new("pdtest-");
    let state = folder.path().join("s");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let slot = pools::Slot::new("anthropic".parse().unwrap(), "node");
        let mut host = Host::launch(&state).await;
        let label = instance_label(&state);
        let start = async |host: &Host| {
            let task = Some(slot.task());
            let started = host
                .plugin
                .driver()
                .start_task(StartTaskRequest { task })
                .await;
            started.unwrap().into_inner().handle.unwrap()
        };
        let handle = start(&host).await;
        let idle = docker::containers(&label);
        assert_eq!(idle.len(), 1);

        // The slot gets its idle container back when Nomad waits for the task, and not earlier.
        host = host.recover(&state, &handle).await;
        let (waits, _) = host.slot(|_| true).await;
        assert_eq!(waits.state(), State::Warming);
        assert!(
            waits.reason.contains("does not wait for it yet"),
            "{}",
            waits.reason
        );
        let (mut driver, task_id) = (host.plugin.driver(), id_of(&handle));
        tokio::spawn(async move { driver.wait_task(WaitTaskRequest { task_id }).await });
        let (again, _) = host.slot(|slot| slot.state() == State::Idle).await;
        assert_eq!(again.generation, waits.generation);
        assert_eq!(docker::containers(&label), idle);

        // A run outlives the driver and the slot.
        let run_id = host.start("read line; echo $line").await;
        host = host.recover(&state, &handle).await;
        let (claimed, _) = host.slot(|_| true).await;
        assert_eq!(claimed.state(), State::Claimed);
        host.destroy(&handle).await;
        assert_eq!(host.answer(&run_id, "on\n").await, b"on\n");
        docker::wait_containers(&label, 0);

        // Nothing is left of an idle slot.
        let handle = start(&host).await;
        docker::wait_containers(&label, 1);
        host = host.recover(&state, &handle).await;
        host.destroy(&handle).await;
        docker::wait_containers(&label, 0);
        for folder in ["idle", "link"] {
            let left: Vec<_> = fs::read_dir(state.join(folder)).unwrap().collect();
            assert!(left.is_empty(), "{left:?}");
        }
        host.plugin.shutdown().await;
    });
}
