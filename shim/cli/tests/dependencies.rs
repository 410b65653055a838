//! What callers link. Cargo answers as for a build of one package alone: without the features of
//! shared crates that only other packages of the workspace use, such as tonic's router.

use std::{collections::BTreeSet, process::Command};

/// Names of the crates that a package links, its own among them.
fn linked(package: &str, options: &[&str]) -> BTreeSet<String> {
    let output = Command::new(env!("CARGO"))
        .args(["tree", "--locked", "--offline", "--prefix", "none"])
        .args(["--edges", "normal", "--package", package])
        .args(options)
        .output()
        .expect("cargo runs");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{package}: {errors}");
    let text = String::from_utf8_lossy(&output.stdout);
    let names = text
        .lines()
        .filter_map(|line| line.split_whitespace().next());
    names.map(str::to_owned).collect()
}

#[track_caller]
fn links_none(package: &str, options: &[&str], unwanted: &[&str]) {
    let linked = linked(package, options);
    assert!(linked.contains(package), "{linked:?}");
    for name in unwanted {
        assert!(!linked.contains(*name), "{package} links {name}");
    }
}

#[test]
fn callers_link_no_database_and_no_server() {
    let unwanted = ["sqlx", "axum", "polydev-shim"];
    links_none("polydev-client", &[], &unwanted);
    links_none("polydev-cli", &[], &unwanted);
    let shim = linked("polydev-shim", &[]);
    for name in unwanted {
        assert!(shim.contains(name), "the shim does not link {name}");
    }
}

#[test]
fn the_wire_contracts_link_no_tls() {
    links_none(
        "polydev-proto",
        &["--all-features"],
        &["rustls", "tokio-rustls"],
    );
}
