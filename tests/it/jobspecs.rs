//! The jobs of `jobspecs/` are ones that Nomad takes, and the images' copies agree.

use std::fs;

use polydev_tests::{nomad::Nomad, nomad::nomad_program, process::succeed, root};

const PROVIDERS: [&str; 3] = ["openai", "anthropic", "google"];

#[test]
fn jobspecs_are_formatted_and_valid() {
    succeed(
        std::process::Command::new(nomad_program())
            .args(["fmt", "-check"])
            .arg(root().join("jobspecs")),
    );
    let nomad = Nomad::start();
    for provider in PROVIDERS {
        let file = format!("jobspecs/pool-{provider}.nomad.hcl");
        let told = nomad.run(&["job", "validate", &file]);
        assert!(told.contains("Job validation successful"), "{told}");
        assert!(!told.contains("Warning"), "{told}");
        let empty = nomad.run(&["job", "validate", "-var", "count=0", &file]);
        assert!(empty.contains("Job validation successful"), "{empty}");
    }
}

#[test]
fn jobspecs_of_all_providers_say_the_same() {
    let of = |provider: &str| {
        let path = root().join(format!("jobspecs/pool-{provider}.nomad.hcl"));
        fs::read_to_string(path)
            .unwrap()
            .replace(provider, "PROVIDER")
    };
    let [first, rest @ ..] = PROVIDERS.map(of);
    assert!(rest.iter().all(|other| *other == first));
}

#[test]
fn what_the_images_share_is_the_same_in_each() {
    for file in ["entrypoint.sh", ".dockerignore", "extra-ca/README.md"] {
        let of = |provider: &str| {
            fs::read(root().join(format!("containers/{provider}-runtime/{file}"))).unwrap()
        };
        let [first, rest @ ..] = PROVIDERS.map(of);
        assert!(rest.iter().all(|other| *other == first), "{file}");
    }
}
