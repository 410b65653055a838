//! Nomad as careful operators run it: mutual TLS, and tokens.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use polydev_proto::runtime::ScalePoolRequest;
use polydev_tests::{
    folder::Folder,
    free_ports,
    nomad::nomad_program,
    process::{Process, output, succeed},
    program,
    shim::Shim,
    wait_until,
};
use serde_json::Value;
use tonic::{Code, Status};

/// A server alone: no pool is needed to see whether it answers.
struct Agent {
    url: String,
    tls: PathBuf,
    _process: Process,
}

impl Agent {
    fn start(folder: &Path) -> Self {
        let tls = folder.join("tls");
        succeed(
            Command::new(program("polydev-shim"))
                .args(["certs", "dev"])
                .arg(&tls)
                .args(["--name", "nomad.test"]),
        );
        let [http, rpc, serf] = free_ports();
        let config = folder.join("agent.hcl");
        let file = |name: &str| tls.join(name).display().to_string();
        let text = format!(
            r#"
            bind_addr = "127.0.0.1"
            ports {{
              http = {http}
              rpc  = {rpc}
              serf = {serf}
            }}
            client {{
              network_interface = "lo"
              options = {{ "fingerprint.denylist" = "env_aws,env_gce,env_azure,env_digitalocean" }}
            }}
            acl {{ enabled = true }}
            tls {{
              http                = true
              verify_https_client = true
              ca_file             = "{}"
              cert_file           = "{}"
              key_file            = "{}"
            }}
            "#,
            file("ca.pem"),
            file("node.pem"),
            file("node-key.pem"),
        );
        fs::write(&config, text).expect("a file can be written");
        let mut command = Command::new(nomad_program());
        command.args(["agent", "-dev", "-config"]).arg(&config);
        Self {
            _process: Process::start(&mut command, &folder.join("log")),
            url: format!("https://127.0.0.1:{http}"),
            tls,
        }
    }

    /// The first token, which may do everything.
    fn bootstrap(&self) -> String {
        let mut token = String::new();
        wait_until("the first token", Duration::from_secs(60), || {
            let mut command = Command::new("curl");
            command.args([
                "--silent",
                "--show-error",
                "--request",
                "POST",
                "--noproxy",
                "*",
            ]);
            let port = self.url.rsplit(':').next().unwrap_or_default();
            command.args([
                "--connect-to",
                &format!("nomad.test:{port}:127.0.0.1:{port}"),
            ]);
            for (option, name) in [
                ("--cacert", "ca.pem"),
                ("--cert", "shim.pem"),
                ("--key", "shim-key.pem"),
            ] {
                command.arg(option).arg(self.tls.join(name));
            }
            let answer = output(command.arg(format!("https://nomad.test:{port}/v1/acl/bootstrap")));
            let made: Value = serde_json::from_slice(&answer.stdout).unwrap_or_default();
            match made["SecretID"].as_str() {
                Some(secret) => token = secret.to_owned(),
                None => return Err(format!("{answer:?}")),
            }
            Ok(())
        });
        token
    }
}

#[test]
fn a_nomad_with_certificates_and_tokens_is_asked_with_them() {
    let folder = Folder::new("pdtest-");
    let agent = Agent::start(folder.path());
    let token = folder.path().join("token");
    fs::write(&token, "00000000-0000-0000-0000-000000000000\n").unwrap();
    let file = |name: &str| agent.tls.join(name).display().to_string();
    let (ca, cert, key) = (file("ca.pem"), file("shim.pem"), file("shim-key.pem"));
    let (secret, token) = (agent.bootstrap(), token.display().to_string());
    let known = [
        "--nomad-ca-cert",
        &ca,
        "--nomad-tls-server-name",
        "nomad.test",
        "--nomad-token-file",
        &token,
    ];
    let certified = ["--nomad-client-cert", &cert, "--nomad-client-key", &key];
    let scale = |shim: &Shim| -> Status {
        let request = ScalePoolRequest {
            provider: "anthropic".into(),
            size: 1,
        };
        let steps = shim.client().call(async |mut shim| {
            let mut steps = shim.scale_pool(request).await?.into_inner();
            steps.message().await.map(tonic::Response::new)
        });
        steps.expect_err("there is no pool")
    };

    let nobody = Shim::serve_with(&agent.url, &known);
    let refused = scale(&nobody);
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    drop(nobody);

    let shim = Shim::serve_with(&agent.url, &[&known[..], &certified].concat());
    let refused = scale(&shim);
    assert!(refused.message().contains("403 Forbidden"), "{refused}");
    // The file is read again.
    fs::write(&token, format!("{secret}\n")).unwrap();
    let answered = scale(&shim);
    let words = "Nomad has no job `polydev-pool-anthropic`";
    assert!(answered.message().contains(words), "{answered}");
    assert!(!shim.process.log().contains(&secret));
}
