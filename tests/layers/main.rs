//! Which module may import which. The compiler only forbids circles between crates. This test
//! keeps the modules of the driver and those of the shim in layers.

mod imports;

use std::collections::BTreeMap;

use imports::{Import, Imports};

/// The driver's modules, from those that no module may import to those that import nothing.
const DRIVER: &[&str] = &[
    "main",
    "check_job",
    "plugin",
    "service",
    "fingerprint",
    "node",
    "guard",
    "reap",
    "slot",
    "task",
    "run",
    "sandbox",
    "site",
    "broker",
    "images",
    "link",
    "metrics",
    "telemetry",
    "docker",
    "events",
    "firewall",
    "identity",
    "life",
    "config",
    "headroom",
    "limits",
    "logging",
    "netlink",
    "permits",
    "process",
    "scripts",
    "spent",
    "state",
    "ticks",
    "tokens",
    "traces",
];

/// The shim's, in the same way.
const SHIM: &[&str] = &[
    "main",
    "command",
    "service",
    "metrics",
    "run",
    "pool",
    "engine",
    "nomad",
    "tools",
    "approval",
    "credentials",
    "provider",
    "secret",
    "environment",
    "token",
    "audit",
    "permission",
    "policy",
    "access",
    "listen",
    "private",
    "rate",
    "traces",
    "web",
];

#[test]
fn a_module_of_the_driver_imports_only_what_is_below_it() {
    assert_layers(&Imports::of("driver/src"), DRIVER);
}

#[test]
fn a_module_of_the_shim_imports_only_what_is_below_it() {
    assert_layers(&Imports::of("shim/src"), SHIM);
}

/// A child may use its parents: that is ordinary Rust. Without those imports there is no circle.
#[test]
fn files_import_each_other_in_no_circle() {
    for crate_source in ["driver/src", "shim/src"] {
        let imports = Imports::of(crate_source);
        let downwards = imports.all.iter().filter(|import| !import.is_of_a_parent());
        let mut graph: BTreeMap<&str, Vec<&Import>> = BTreeMap::new();
        for import in downwards {
            graph.entry(&import.from).or_default().push(import);
        }
        if let Some(circle) = circle(&graph) {
            panic!(
                "a circle of imports in {crate_source}:\n{}",
                circle.join("\n")
            );
        }
    }
}

fn assert_layers(imports: &Imports, layers: &[&str]) {
    let place = |module: &str| {
        let top = module.split("::").next().unwrap_or_default();
        let place = layers.iter().position(|layer| *layer == top);
        place.unwrap_or_else(|| panic!("`{top}` has no place among the layers in {}", file!()))
    };
    let upwards: Vec<_> = imports
        .all
        .iter()
        .filter(|import| place(&import.from) > place(&import.to))
        .map(ToString::to_string)
        .collect();
    assert!(
        upwards.is_empty(),
        "imports that run upwards:\n{}",
        upwards.join("\n")
    );
    let unused = layers
        .iter()
        .find(|layer| !imports.modules.contains(**layer));
    assert_eq!(unused, None, "there is no such module any more");
}

/// The imports of one circle, in its order.
fn circle(graph: &BTreeMap<&str, Vec<&Import>>) -> Option<Vec<String>> {
    fn visit<'a>(
        module: &'a str,
        graph: &BTreeMap<&'a str, Vec<&'a Import>>,
        way: &mut Vec<&'a Import>,
        done: &mut Vec<&'a str>,
    ) -> Option<Vec<String>> {
        for import in graph.get(module).into_iter().flatten() {
            if let Some(begin) = way.iter().position(|passed| passed.from == import.to) {
                let circle = way[begin..].iter().copied().chain([*import]);
                return Some(circle.map(ToString::to_string).collect());
            }
            if done.contains(&&*import.to) {
                continue;
            }
            way.push(import);
            let found = visit(&import.to, graph, way, done);
            way.pop();
            if found.is_some() {
                return found;
            }
        }
        done.push(module);
        None
    }
    let mut done = Vec::new();
    graph
        .keys()
        .find_map(|module| visit(module, graph, &mut Vec::new(), &mut done))
}
