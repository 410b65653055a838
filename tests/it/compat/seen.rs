//! What a user sees of an allocation.

use std::collections::{BTreeMap, BTreeSet};

use polydev_tests::nomad::Nomad;
use serde_json::Value;

/// Texts by field, without what differs between any two allocations.
#[derive(Debug, Default)]
pub(super) struct Seen {
    fields: BTreeMap<String, String>,
    /// What is replaced by a word.
    known: Vec<(String, String)>,
}

impl Seen {
    pub(super) fn get(&self, field: &str) -> Option<&str> {
        self.fields.get(field).map(String::as_str)
    }

    /// Replaces a text in everything that is added from now on.
    pub(super) fn know(&mut self, text: &str, word: &str) {
        self.known.push((text.to_owned(), word.to_owned()));
    }

    pub(super) fn add(&mut self, field: &str, text: &str) {
        let known = self.known.iter();
        let text = known.fold(text.to_owned(), |text, (known, word)| {
            text.replace(known, word)
        });
        self.fields.insert(field.to_owned(), text);
    }

    /// Fields that are not the same.
    pub(super) fn differs_from(&self, other: &Self) -> Vec<String> {
        let all: BTreeSet<&String> = self.fields.keys().chain(other.fields.keys()).collect();
        let differ = all
            .into_iter()
            .filter(|field| self.get(field) != other.get(field));
        differ.cloned().collect()
    }

    /// Adds what an ended allocation shows.
    pub(super) fn add_end(&mut self, nomad: &Nomad, alloc: &Value) {
        let id = alloc["ID"].as_str().expect("an id");
        self.add("state", alloc["ClientStatus"].as_str().expect("a status"));
        for (task, state) in alloc["TaskStates"].as_object().expect("states") {
            let field = |name: &str| format!("{task}.{name}");
            self.add(
                &field("state"),
                &format!(
                    "{} failed={} restarts={}",
                    state["State"], state["Failed"], state["Restarts"]
                ),
            );
            let events = state["Events"].as_array().expect("events");
            // What a driver says by itself.
            let by_driver = |event: &&Value| event["Type"] == "Driver";
            let mut kinds: Vec<&str> = events
                .iter()
                .filter(|event| !by_driver(event))
                .map(|event| event["Type"].as_str().expect("a type"))
                .collect();
            kinds.sort_unstable();
            self.add(&field("events"), &kinds.join(", "));
            let failed = events
                .iter()
                .filter(|event| event["Type"] == "Setup Failure");
            let failed = failed.filter_map(|event| event["DisplayMessage"].as_str());
            self.add(&field("failure"), &failed.collect::<Vec<_>>().join("\n"));
            let said = events.iter().filter(by_driver);
            let said = said.filter_map(|event| event["DisplayMessage"].as_str());
            self.add(&field("said"), &said.collect::<Vec<_>>().join("\n"));
            let ends = events.iter().filter(|event| event["Type"] == "Terminated");
            let ends = ends.map(|event| {
                let details = &event["Details"];
                let [code, signal, memory] =
                    ["exit_code", "signal", "oom_killed"].map(|name| &details[name]);
                format!("code={code} signal={signal} oom={memory}")
            });
            self.add(&field("ends"), &ends.collect::<Vec<_>>().join("; "));
            for stream in ["stdout", "stderr"] {
                let text = log(nomad, id, task, stream);
                self.add(&field(stream), &text);
            }
        }
    }
}

/// A task's log.
pub(super) fn log(nomad: &Nomad, alloc: &str, task: &str, stream: &str) -> String {
    let path =
        format!("/v1/client/fs/logs/{alloc}?task={task}&type={stream}&plain=true&origin=start");
    String::from_utf8_lossy(&nomad.get_raw(&path)).into_owned()
}

/// The names in a folder of an allocation.
pub(super) fn folder(nomad: &Nomad, alloc: &str, path: &str) -> String {
    let list = nomad.get(&format!("/v1/client/fs/ls/{alloc}?path={path}"));
    let entries = list.as_array().into_iter().flatten();
    let names = entries.filter_map(|entry| entry["Name"].as_str());
    names.collect::<Vec<_>>().join(" ")
}
