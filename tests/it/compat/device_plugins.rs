//! What Nomad asks for with a task whose job has a `device` block: the answer of the device's
//! plugin. The test plays the agent, because no plugin is at hand.

use std::fs;

use polydev_proto::driver::{
    AllocatedCpuResources, AllocatedMemoryResources, AllocatedTaskResources, DestroyTaskRequest,
    Device, LinuxResources, Mount, Resources, StartTaskRequest, TaskConfig, start_task_response,
};
use polydev_shim::engine::embedded::plugin::Plugin;
use polydev_tests::{docker, folder::Folder, job::IMAGE, program, shim::instance_label};
use serde_json::json;
use tempfile::TempDir;

/// A task that sleeps, in an allocation's folder as Nomad makes it.
fn task(alloc: &TempDir, name: &str) -> TaskConfig {
    for folder in ["alloc/logs", "alloc/data", "alloc/tmp"] {
        fs::create_dir_all(alloc.path().join(folder)).expect("a folder can be made");
    }
    for folder in ["local", "secrets", "tmp"] {
        fs::create_dir_all(alloc.path().join(name).join(folder)).expect("a folder can be made");
    }
    let config = json!({ "image": IMAGE, "command": "sleep", "args": ["1000"] });
    TaskConfig {
        id: format!("11111111-2222-3333-4444-555555555555/{name}/0a1b2c3d"),
        name: name.into(),
        alloc_id: "11111111-2222-3333-4444-555555555555".into(),
        alloc_dir: alloc.path().display().to_string(),
        stdout_path: "/dev/null".into(),
        stderr_path: "/dev/null".into(),
        msgpack_driver_config: rmp_serde::to_vec_named(&config).expect("JSON can be encoded"),
        resources: Some(Resources {
            allocated_resources: Some(AllocatedTaskResources {
                cpu: Some(AllocatedCpuResources { cpu_shares: 100 }),
                memory: Some(AllocatedMemoryResources {
                    memory_mb: 32,
                    memory_max_mb: 0,
                }),
                networks: vec![],
            }),
            linux_resources: Some(LinuxResources {
                cpu_shares: 100,
                memory_limit_bytes: 32 << 20,
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_gets_what_the_plugin_of_its_device_asks_for_or_does_not_start() {
    let (alloc, files) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let folder = Folder::new("pdtest-");
    let state = folder.path().join("state");
    fs::write(files.path().join("serial"), "gadget-1\n").unwrap();
    let driver = program("nomad-driver-polydev");
    let mut plugin = Plugin::launch(&driver, &state).await.unwrap();
    plugin.healthy().await.unwrap();
    let mut driver = plugin.driver();

    let gadget = TaskConfig {
        device_env: [("GADGET_VISIBLE_DEVICES".to_owned(), "gadget-1".to_owned())].into(),
        mounts: vec![Mount {
            task_path: "/gadget".into(),
            host_path: files.path().display().to_string(),
            readonly: true,
            ..Mount::default()
        }],
        devices: vec![Device {
            task_path: "/dev/gadget".into(),
            host_path: "/dev/full".into(),
            cgroup_permissions: "r".into(),
        }],
        ..task(&alloc, "gadget")
    };
    let task_id = gadget.id.clone();
    let request = StartTaskRequest { task: Some(gadget) };
    let started = driver.start_task(request).await.unwrap().into_inner();
    assert_eq!(started.driver_error_msg, "");
    let label = instance_label(&state);
    let containers = docker::containers(&label);
    let seen = docker::docker(&[
        "exec",
        &containers[0],
        "sh",
        "-c",
        "echo $GADGET_VISIBLE_DEVICES; cat /gadget/serial; echo x >/gadget/serial || echo read-only; head -c 1 /dev/gadget | wc -c; \
         echo x >/dev/gadget || echo not to write to",
    ]);
    assert_eq!(seen, "gadget-1\ngadget-1\nread-only\n1\nnot to write to\n");
    let destroy = DestroyTaskRequest {
        task_id,
        force: true,
    };
    driver.destroy_task(destroy).await.unwrap();

    // NVIDIA's plugin asks for nothing but this, and its runtime does the rest.
    let nvidia = TaskConfig {
        device_env: [("NVIDIA_VISIBLE_DEVICES".to_owned(), "GPU-1".to_owned())].into(),
        ..task(&alloc, "nvidia")
    };
    let request = StartTaskRequest { task: Some(nvidia) };
    let refused = match driver.start_task(request).await {
        Ok(answer) => {
            let answer = answer.into_inner();
            assert_ne!(answer.result(), start_task_response::Result::Success);
            answer.driver_error_msg
        }
        Err(status) => status.message().to_owned(),
    };
    assert!(refused.contains("nvidia"), "{refused}");
    assert!(docker::containers(&label).is_empty());
    plugin.shutdown().await;
}
