//! How the shim reaches Nomad: tokens, namespaces, regions and addresses.

use std::fs;

use polydev_proto::runtime::ScalePoolRequest;
use polydev_tests::{folder::Folder, process::output, program, wait_until};
use tonic::Response;

use crate::site::{LIMIT, Site, steps};

#[test]
fn a_new_token_in_its_file_is_used() {
    let folder = Folder::new("pdtoken-");
    let file = folder.path().join("token");
    fs::write(&file, "first\n").unwrap();
    let mut site = Site::empty(&["--nomad-token-file", file.to_str().unwrap()]);
    site.nomad().set_token("second");
    let log = || site.shim.process.log();
    wait_until("the refusal", LIMIT, || {
        log()
            .contains("403 Forbidden: Permission denied")
            .then_some(())
            .ok_or_else(log)
    });
    fs::write(&file, "second\n").unwrap();
    site.add_node(Default::default(), &[("anthropic", 1)]);
    site.shim.client().wait_idle("anthropic", 1);
    site.shim.client().run(steps(&["true"])).unwrap();
    assert!(!site.shim.process.log().contains("second"));
}

#[test]
fn every_request_names_namespace_and_region() {
    let options = ["--nomad-namespace", "llm", "--nomad-region", "eu"];
    let site = Site::start_with(&[("anthropic", 1)], &options);
    site.nomad().add_pool("anthropic", 1);
    let request = ScalePoolRequest {
        provider: "anthropic".into(),
        size: 2,
    };
    let scaled = site.shim.client().call(async |mut shim| {
        let mut steps = shim.scale_pool(request).await?.into_inner();
        while steps.message().await?.is_some() {}
        Ok(Response::new(()))
    });
    scaled.unwrap();
    assert_eq!(site.nomad().pool("anthropic").0, 2);
    let asked = site.nomad().asked();
    assert!(
        asked.iter().any(|uri| uri.starts_with("/v1/job/")),
        "{asked:?}"
    );
    for uri in asked {
        assert!(
            uri.contains("namespace=llm") && uri.contains("region=eu"),
            "{uri}"
        );
    }
}

#[test]
fn what_would_not_be_safe_is_refused_at_the_start() {
    let folder = Folder::new("pdtoken-");
    let file = folder.path().join("token");
    fs::write(&file, "secret").unwrap();
    let token = ["--nomad-token-file", file.to_str().unwrap()];
    let refused = |options: &[&str], variables: &[(&str, &str)]| {
        let mut command = std::process::Command::new(program("polydev-shim"));
        command.args(["serve", "--listen"]);
        command.arg(format!("unix://{}/shim.sock", folder.path().display()));
        command.args(options).envs(variables.iter().copied());
        let output = output(&mut command);
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let other = ["--nomad-addr", "http://192.0.2.1:4646"];
    let words = refused(&[&other[..], &token].concat(), &[]);
    assert!(
        words.contains("`http://192.0.2.1:4646` is another machine"),
        "{words}"
    );
    assert!(!words.contains("secret"), "{words}");
    let words = refused(&[], &[("NOMAD_SKIP_VERIFY", "true")]);
    assert!(words.contains("NOMAD_SKIP_VERIFY is set"), "{words}");
    let words = refused(&["--nomad-ca-cert", token[1]], &[]);
    assert!(words.contains("contains no certificate"), "{words}");
    let words = refused(&["--nomad-client-cert", token[1]], &[]);
    assert!(words.contains("--nomad-client-key"), "{words}");
    let words = refused(&["--nomad-token-file", "/nowhere"], &[]);
    assert!(
        words.contains("cannot read --nomad-token-file `/nowhere`"),
        "{words}"
    );
}
