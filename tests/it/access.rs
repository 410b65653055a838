//! Remote callers: their certificates identify them, and their roles limit them.

use std::{
    fs,
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use polydev_proto::runtime::{
    DeleteCredentialRequest, ListCredentialsRequest, ListPoolsRequest, ListRunsRequest,
    PutCredentialRequest, RotateCredentialsRequest, RunStart, ScalePoolRequest, SubmitJobRequest,
};
use polydev_tests::{
    client::{Client, api_key, shell},
    folder::Folder,
    process::{output, succeed},
    program,
    shim::Shim,
    wait_until,
};
use polydev_transport::tls::Files;
use rcgen::{CertificateParams, Issuer, KeyPair, SanType};
use tonic::{Code, Status};
use tonic_types::StatusExt;

/// A set of certificates in a folder.
fn certificates(folder: &Path) {
    let mut command = Command::new(program("polydev-shim"));
    let printed = succeed(command.args(["certs", "dev"]).arg(folder));
    assert!(printed.contains("--roles"), "{printed}");
}

fn free_port() -> u16 {
    let socket = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr());
    socket.expect("there is a free port").port()
}

/// The certificate of `name` from one folder, with the authority of another folder.
fn files(own: &Path, name: &str, trusted: &Path) -> Files {
    Files {
        certificate: own.join(format!("{name}.pem")),
        key: own.join(format!("{name}-key.pem")),
        authority: trusted.join("ca.pem"),
        revoked: None,
    }
}

fn options<'a>(url: &'a str, files: &'a [String; 4]) -> Vec<&'a str> {
    let [certificate, key, authority, roles] = files;
    vec![
        "--listen",
        url,
        "--tls-cert",
        certificate,
        "--tls-key",
        key,
        "--tls-ca",
        authority,
        "--roles",
        roles,
    ]
}

fn paths(folder: &Path) -> [String; 4] {
    ["shim.pem", "shim-key.pem", "ca.pem", "roles.toml"]
        .map(|name| folder.join(name).display().to_string())
}

/// The roles of the controller, root and the user 1000 of this machine.
const ROLES: &str = r#"
    [[role]]
    members = ["spiffe://polydev.test/controller"]
    may = ["run"]
    users = ["team-*"]
    providers = ["anthropic"]

    [[role]]
    members = ["uid:0"]
    may = ["run", "scale", "credentials"]

    [[role]]
    members = ["uid:1000"]
    may = ["run", "credentials"]
    providers = ["codex"]
"#;

/// A shim with [`ROLES`] that listens at `url` with a certificate, and two sets of certificates:
/// the shim trusts the authority of `ours` and not that of `others`.
struct Remote {
    // Dropped before the folder with the shim's certificates.
    shim: Shim,
    url: String,
    ours: PathBuf,
    others: PathBuf,
    _folder: Folder,
}

impl Remote {
    fn start(pools: &[&str]) -> Self {
        let folder = Folder::new("pdtls-");
        let (ours, others) = (folder.path().join("ours"), folder.path().join("others"));
        certificates(&ours);
        certificates(&others);
        fs::write(ours.join("roles.toml"), ROLES).expect("a file can be written");
        let url = format!("https://127.0.0.1:{}", free_port());
        Self {
            shim: Shim::dev_with(pools, &options(&url, &paths(&ours))),
            url,
            ours,
            others,
            _folder: folder,
        }
    }

    /// The certificate of `name`, signed by our authority.
    fn files(&self, name: &str) -> Files {
        files(&self.ours, name, &self.ours)
    }

    /// A client that is the controller.
    fn connect(&self) -> Client {
        Client::connect_as(&self.url, self.files("controller")).expect("an accepted caller")
    }
}

/// A run that does nothing, for that user.
fn run_of(user: &str, provider: &str) -> RunStart {
    RunStart {
        user_id: user.into(),
        ..shell(provider, "true")
    }
}

#[track_caller]
fn is_denied<T>(answer: Result<T, Status>) {
    let status = answer.map(drop).expect_err("a denial");
    let details = status.get_error_details();
    let reason = details.error_info().map(|info| info.reason.clone());
    assert_eq!(status.code(), Code::PermissionDenied, "{status}");
    assert_eq!(reason.as_deref(), Some("NOT_ALLOWED"));
}

fn list_pools(client: &Client) -> Result<(), Status> {
    let pools = client.call(async |mut shim| shim.list_pools(ListPoolsRequest::default()).await);
    pools.map(drop)
}

#[track_caller]
fn is_refused(connected: Result<Client, String>) {
    let asked =
        connected.and_then(|client| list_pools(&client).map_err(|status| status.to_string()));
    assert!(asked.is_err(), "the caller was accepted");
}

#[test]
fn calls_about_runs_that_no_role_allows_are_denied() {
    let remote = Remote::start(&["anthropic=1"]);
    let client = remote.connect();
    client.run(run_of("team-a", "anthropic")).unwrap();
    let alices = run_of("alice", "anthropic");
    let run = remote.shim.client().run(alices.clone()).unwrap();
    let run_id = run.accepted.run_id;
    let request = SubmitJobRequest {
        start: Some(alices.clone()),
    };
    is_denied(client.call(async |mut shim| shim.submit_job(request).await));
    is_denied(client.run(alices));
    is_denied(client.attach_as("alice", &run_id, [0; 2]));
    is_denied(client.cancel_as("alice", &run_id));
    is_denied(client.get_run_as("alice", &run_id));
    is_denied(client.list_runs(ListRunsRequest::default()));
    let teams = ListRunsRequest {
        user_id: "team-a".into(),
        provider: "anthropic".into(),
        ..Default::default()
    };
    assert_eq!(client.list_runs(teams).unwrap().runs.len(), 1);
}

#[test]
fn calls_about_pools_and_credentials_that_no_role_allows_are_denied() {
    let remote = Remote::start(&["anthropic=1"]);
    let client = remote.connect();
    let request = ScalePoolRequest {
        provider: "anthropic".into(),
        size: 0,
    };
    is_denied(client.call(async |mut shim| shim.scale_pool(request).await));
    let request = PutCredentialRequest {
        user_id: "team-a".into(),
        provider: "anthropic".into(),
        credential: Some(api_key("k")),
        keep_refreshed: false,
    };
    is_denied(client.call(async |mut shim| shim.put_credential(request).await));
    let request = ListCredentialsRequest::default();
    is_denied(client.call(async |mut shim| shim.list_credentials(request).await));
    let request = DeleteCredentialRequest {
        user_id: "team-a".into(),
        provider: "anthropic".into(),
    };
    is_denied(client.call(async |mut shim| shim.delete_credential(request).await));
    let request = RotateCredentialsRequest::default();
    is_denied(client.call(async |mut shim| shim.rotate_credentials(request).await));
    list_pools(&client).unwrap();
    remote.shim.client().wait_idle("anthropic", 1);
}

#[test]
fn a_role_for_one_provider_allows_nothing_with_the_runs_of_another() {
    let remote = Remote::start(&["anthropic=1", "openai=1"]);
    let (client, local) = (remote.connect(), remote.shim.client());
    let run = |provider: &str| {
        let run = local.run(run_of("team-a", provider)).unwrap();
        run.accepted.run_id
    };
    let (of_openai, of_anthropic) = (run("openai"), run("anthropic"));
    is_denied(client.attach_as("team-a", &of_openai, [0; 2]));
    is_denied(client.get_run_as("team-a", &of_openai));
    is_denied(client.cancel_as("team-a", &of_openai));
    client.get_run_as("team-a", &of_anthropic).unwrap();
    client.cancel_as("team-a", &of_anthropic).unwrap();
}

#[test]
fn another_user_of_the_machine_is_held_to_its_roles() {
    let remote = Remote::start(&["anthropic=0", "openai=0"]);
    // With roles, the shim opens its socket to all users of the machine.
    let socket = Path::new(remote.shim.address.trim_start_matches("unix://"));
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(socket.parent().unwrap(), open).unwrap();
    let as_runtime = |arguments: &[&str]| {
        let mut command = remote.shim.command(arguments);
        std::os::unix::process::CommandExt::uid(&mut command, 1000);
        let output = output(&mut command);
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    };
    let (code, words) = as_runtime(&["runs", "list", "--provider", "openai"]);
    assert_eq!(code, Some(0), "{words}");
    for denied in [
        &["runs", "list"][..],
        &["runs", "list", "--provider", "google"],
        &["credentials", "list"],
        &["credentials", "rotate"],
        &["pool", "scale", "openai", "0"],
        &["run", "anthropic", "--", "true"],
    ] {
        let (code, words) = as_runtime(denied);
        assert_eq!(code, Some(125), "{denied:?}");
        assert!(words.contains("caller `uid:1000` has no role"), "{words}");
    }
}

#[test]
fn callers_without_a_valid_certificate_of_ours_are_refused() {
    let remote = Remote::start(&["anthropic=0"]);
    let (ours, others) = (&remote.ours, &remote.others);
    let refused = |files: Files| is_refused(Client::connect_as(&remote.url, files));
    refused(files(others, "controller", ours));
    refused(files(ours, "controller", others));
    expired(ours);
    refused(remote.files("expired"));
    nameless(ours);
    refused(remote.files("nameless"));
    is_refused(Client::try_connect(&remote.url.replace("https", "http")));
    list_pools(&remote.connect()).unwrap();
}

#[test]
fn callers_that_say_nothing_keep_nobody_out_and_are_disconnected() {
    let remote = Remote::start(&["anthropic=0"]);
    let address = remote.url.trim_start_matches("https://").to_owned();
    let silent: Vec<_> = (0..100)
        .map(|_| TcpStream::connect(&address).unwrap())
        .collect();
    let before = Instant::now();
    remote.connect();
    assert!(before.elapsed() < Duration::from_secs(5));
    for stream in &silent {
        stream
            .set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        let ended = std::io::Read::read(&mut &*stream, &mut [0; 1]);
        assert_eq!(ended.unwrap(), 0);
    }
}

#[test]
fn new_certificates_hold_for_new_connections_without_a_restart() {
    let remote = Remote::start(&["anthropic=0"]);
    let (ours, others) = (&remote.ours, &remote.others);
    let client = remote.connect();
    list_pools(&client).unwrap();
    for name in ["shim.pem", "shim-key.pem", "ca.pem"] {
        fs::copy(others.join(name), ours.join(name)).unwrap();
    }
    let connect = || Client::connect_as(&remote.url, files(others, "controller", others));
    wait_until("the new certificates", Duration::from_secs(20), || {
        connect().map(drop)
    });
    is_refused(Client::connect_as(
        &remote.url,
        files(ours, "controller", others),
    ));
    list_pools(&client).unwrap();

    // A certificate that is not valid changes nothing.
    fs::write(ours.join("shim.pem"), "nonsense").unwrap();
    wait_until("the warning", Duration::from_secs(20), || {
        connect().unwrap();
        let log = remote.shim.process.log();
        match log.contains("cannot use the new certificates") {
            true => Ok(()),
            false => Err(log),
        }
    });
}

/// A controller's certificate of yesterday.
fn expired(folder: &Path) {
    let yesterday = time::OffsetDateTime::now_utc() - time::Duration::days(1);
    sign(folder, "expired", |params| {
        params.not_before = yesterday - time::Duration::days(1);
        params.not_after = yesterday;
        let uri = "spiffe://polydev.test/controller"
            .try_into()
            .expect("a valid URI");
        params.subject_alt_names.push(SanType::URI(uri));
    });
}

/// A certificate without a name.
fn nameless(folder: &Path) {
    sign(folder, "nameless", |params| {
        params.distinguished_name = rcgen::DistinguishedName::new();
    });
}

fn sign(folder: &Path, name: &str, change: impl FnOnce(&mut CertificateParams)) {
    let read = |name: &str| fs::read_to_string(folder.join(name)).expect("an existing file");
    let key = KeyPair::from_pem(&read("ca-key.pem")).expect("a valid key");
    let issuer = Issuer::from_ca_cert_pem(&read("ca.pem"), key).expect("an authority");
    let own = KeyPair::generate().expect("there is randomness");
    let mut params = CertificateParams::default();
    change(&mut params);
    let signed = params.signed_by(&own, &issuer).expect("a certificate");
    let write = |name: String, text: String| fs::write(folder.join(name), text);
    write(format!("{name}.pem"), signed.pem()).expect("a file can be written");
    write(format!("{name}-key.pem"), own.serialize_pem()).expect("a file can be written");
}
