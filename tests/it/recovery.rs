//! What a driver does with a slot that its host recovers.

use std::fs;

use polydev_proto::{
    driver::WaitTaskRequest,
    node::{Slot, run_event::Event, slot::State},
};
use polydev_shim::engine::embedded::pools;
use polydev_tests::{docker, folder::Folder, shim::instance_label};

use crate::host::{Host, id_of, shell};

#[test]
fn a_recovered_slot_waits_for_nomad_and_its_destruction_ends_no_run() {
    let folder = Folder::new("pdtest-");
    let state = folder.path().join("s");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let slot = pools::Slot::new(
            "anthropic".parse().unwrap(),
            "node",
            pools::Options::default(),
        );
        let mut host = Host::launch(&state).await;
        let label = instance_label(&state);
        let handle = host.start_slot(&slot).await;
        let idle = docker::containers(&label);
        assert_eq!(idle.len(), 1);

        // The slot gets its idle container back when Nomad waits for the task, and not earlier.
        host = host.recover(&state, &handle).await;
        let is_settled = |slot: &Slot| slot.state() == State::Idle || !slot.reason.is_empty();
        let (waits, _) = host.slot(is_settled).await;
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
        let run_id = host
            .start(shell("read line; echo $line"), |event| {
                matches!(event, Event::Started(_))
            })
            .await;
        host = host.recover(&state, &handle).await;
        let (claimed, _) = host.slot(|_| true).await;
        assert_eq!(claimed.state(), State::Claimed);
        host.destroy(&handle).await;
        assert_eq!(host.answer(&run_id, "on\n").await, b"on\n");
        docker::wait_containers(&label, 0);

        // Nothing is left of an idle slot.
        let handle = host.start_slot(&slot).await;
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
