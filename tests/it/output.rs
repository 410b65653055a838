//! The output of a plain task reaches Nomad completely, also if parts of the system die.

use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use polydev_tests::{
    job::{self, batch, events, merge, shell},
    nomad::Nomad,
    wait_until,
};
use serde_json::json;
use sha2::{Digest, Sha256};

/// `count` allocations at once. Each prints 20,000 lines to each stream and ends.
pub(crate) fn every_line_of(nomad: &Nomad, id: &str, count: usize) {
    let script = "seq 1 20000; seq 1 20000 >&2";
    let mut job = batch(id, shell(script));
    job["TaskGroups"][0]["Count"] = count.into();
    merge(
        job::task(&mut job),
        json!({ "Resources": { "CPU": 20, "MemoryMB": 20 } }),
    );
    nomad.submit(&job);
    let allocations = wait_until("every allocation's end", Duration::from_secs(300), || {
        let allocations = nomad.allocations(id);
        let done = allocations
            .iter()
            .filter(|alloc| alloc["ClientStatus"] == "complete")
            .count();
        if done == count {
            Ok(allocations)
        } else {
            Err(format!("{done} of {count} are complete"))
        }
    });
    let expected: Vec<u8> = (1..=20_000)
        .flat_map(|line| format!("{line}\n").into_bytes())
        .collect();
    let mut lost = Vec::new();
    for alloc in &allocations {
        let id = job::id(alloc);
        for stream in ["stdout", "stderr"] {
            let text = nomad.logs(id, stream);
            if text != expected {
                lost.push(format!(
                    "{id} {stream}: {} of {} bytes",
                    text.len(),
                    expected.len()
                ));
            }
        }
    }
    assert!(lost.is_empty(), "{lost:#?}");
}

#[test]
fn forty_allocations_at_once_lose_no_line() {
    let nomad = Nomad::start();
    every_line_of(&nomad, "forty", 40);
}

/// A script that writes so many bytes of numbers in lines, and their hash.
fn lots(bytes: usize) -> (String, String) {
    let mut hash = Sha256::new();
    let mut left = bytes;
    for line in 1.. {
        let line = format!("{line}\n");
        let part = line.len().min(left);
        hash.update(&line.as_bytes()[..part]);
        left -= part;
        if left == 0 {
            break;
        }
    }
    let script = format!("seq 1 13000000 | head -c {bytes}");
    (script, hex::encode(hash.finalize()))
}

fn hash_of(nomad: &Nomad, job: &str, stream: &str) -> String {
    let alloc = nomad.wait_dead(job);
    let id = job::id(&alloc);
    assert!(
        events(&alloc).contains("Exit Code: 0"),
        "{}",
        events(&alloc)
    );
    hex::encode(Sha256::digest(nomad.logs(id, stream)))
}

#[test]
fn a_hundred_megabytes_at_full_speed_arrive_byte_for_byte_each_way() {
    let nomad = Nomad::start();
    let unrotated = json!({ "type": "json-file", "config": [{ "max-size": "1g" }] });
    for (id, bytes, options) in [
        ("init", 100_000_000, json!({})),
        // dockerd deletes rotated logs, even if nobody has read them.
        (
            "docker",
            1_000_000,
            json!({ "init": false, "logging": unrotated }),
        ),
        ("logging", 1_000_000, json!({ "logging": unrotated })),
    ] {
        let (script, expected) = lots(bytes);
        let mut config = shell(&script);
        merge(&mut config, options);
        nomad.submit(&batch(id, config));
        assert_eq!(hash_of(&nomad, id, "stdout"), expected, "{id}");
    }
}

#[test]
fn a_terminal_has_one_stream_with_carriage_returns() {
    let nomad = Nomad::start();
    for (id, init) in [("tty", true), ("docker-tty", false)] {
        let mut config = shell("tty >/dev/null || exit 9; echo out; echo err >&2; exit 4");
        merge(&mut config, json!({ "tty": true, "init": init }));
        nomad.submit(&batch(id, config));
        let alloc = nomad.wait_dead(id);
        assert!(
            events(&alloc).contains("Exit Code: 4"),
            "{}",
            events(&alloc)
        );
        let alloc = job::id(&alloc);
        assert_eq!(
            String::from_utf8_lossy(&nomad.logs(alloc, "stdout")),
            "out\r\nerr\r\n",
            "{id}"
        );
        assert_eq!(nomad.logs(alloc, "stderr"), b"", "{id}");
    }
}

/// The agent is stopped and started, then killed together with the reader of the output. The
/// task continues, and waits while nobody reads.
#[test]
fn a_restarted_agent_finds_its_task_and_every_line() {
    let mut nomad = Nomad::start_lasting();
    let script =
        "seq 1 1000; until [ -e /alloc/again ]; do sleep 0.05; done; seq 1001 200000; exit 6";
    nomad.submit(&batch("long", shell(script)));
    let id = nomad.wait_started("long");
    let lines = |last: u32| -> String { (1..=last).map(|line| format!("{line}\n")).collect() };
    let collected = |nomad: &Nomad, expected: &str| {
        wait_until("the first lines", Duration::from_secs(20), || {
            let text = nomad.logs(&id, "stdout");
            if text == expected.as_bytes() {
                Ok(())
            } else {
                Err(format!("{} bytes", text.len()))
            }
        });
    };
    collected(&nomad, &lines(1000));
    nomad.restart();
    nomad.wait_started("long");
    // Output that a killed reader has read and not written is lost. This reader has written all.
    collected(&nomad, &lines(1000));
    let (agent, readers) = (nomad.agent().pid(), nomad.log_readers());
    assert_eq!(readers.len(), 1, "Nomad has a process that reads logs");
    kill(agent, Signal::SIGKILL).unwrap();
    kill(readers[0], Signal::SIGKILL).unwrap();
    let go = nomad
        .folder()
        .join("data/alloc")
        .join(&id)
        .join("alloc/again");
    std::fs::write(go, "").unwrap();
    nomad.restart();
    let alloc = nomad.wait_dead("long");
    assert!(
        events(&alloc).contains("Exit Code: 6"),
        "{}",
        events(&alloc)
    );
    let text = String::from_utf8(nomad.logs(&id, "stdout")).unwrap();
    assert!(
        text == lines(200_000),
        "{} of {} bytes",
        text.len(),
        lines(200_000).len()
    );
    assert_eq!(nomad.allocations("long").len(), 1);
}
