//! Plain tasks on the network, and what warm slots cannot reach.

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    process::Command,
    time::{Duration, Instant},
};

use polydev_tests::{
    client::shell as run_shell,
    docker,
    host::Host,
    job::{self, merge, service, shell},
    nomad::Nomad,
    process::output,
    program,
    shim::Shim,
    wait_until,
};
use serde_json::{Value, json};

/// The answer of a task's container to a GET from this machine.
fn fetch(address: &str) -> Result<String, String> {
    let mut command = Command::new("curl");
    let answer = output(command.args([
        "--silent",
        "--show-error",
        "--noproxy",
        "*",
        "--max-time",
        "5",
        address,
    ]));
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    if answer.status.success() {
        Ok(text(answer.stdout))
    } else {
        Err(text(answer.stderr))
    }
}

const SERVER: &str =
    "mkdir /tmp/www; echo hello >/tmp/www/index.html; exec httpd -f -p 8080 -h /tmp/www";

#[test]
fn ports_are_published_and_the_groups_network_is_shared() {
    let nomad = Nomad::start();
    // Docker's bridge, and a port of the host.
    let mut config = shell(SERVER);
    merge(
        &mut config,
        json!({ "ports": ["http"], "dns_servers": ["192.0.2.53"], "extra_hosts": ["db:192.0.2.1"] }),
    );
    let mut bridged = service("bridged", config);
    bridged["TaskGroups"][0]["Networks"] =
        json!([{ "DynamicPorts": [{ "Label": "http", "To": 8080 }] }]);
    nomad.submit(&bridged);
    let id = nomad.wait_started("bridged");
    let port = |id: &str| {
        nomad.get(&format!("/v1/allocation/{id}"))["AllocatedResources"]["Shared"]["Ports"][0]["Value"].to_string()
    };
    let address = format!("http://127.0.0.1:{}", port(&id));
    wait_until("the published port", Duration::from_secs(20), || {
        fetch(&address)
    });
    let seen = nomad
        .exec(&id, &["cat", "/etc/hosts", "/etc/resolv.conf"], false, b"")
        .stdout;
    assert!(
        seen.contains("192.0.2.1\tdb") && seen.contains("nameserver 192.0.2.53"),
        "{seen}"
    );

    // A group's own namespace: two tasks, one loopback, a port through CNI.
    let mut group = service("grouped", shell(SERVER));
    group["TaskGroups"][0]["Networks"] = json!([{
        "Mode": "bridge",
        "DynamicPorts": [{ "Label": "http", "To": 8080 }],
        "DNS": { "Servers": ["192.0.2.54"] },
    }]);
    let mut beside = group["TaskGroups"][0]["Tasks"][0].clone();
    merge(
        &mut beside,
        json!({ "Name": "beside", "Config": shell(
        "until wget -q -O - http://127.0.0.1:8080 | grep hello; do sleep 0.2; done; cat /etc/resolv.conf; sleep 1000",
    ) }),
    );
    group["TaskGroups"][0]["Tasks"]
        .as_array_mut()
        .unwrap()
        .push(beside);
    nomad.submit(&group);
    let id = nomad.wait_started("grouped");
    let logs = format!("/v1/client/fs/logs/{id}?task=beside&type=stdout&plain=true&origin=start");
    wait_until("the neighbour", Duration::from_secs(30), || {
        let text = String::from_utf8(nomad.get_raw(&logs)).unwrap();
        if text.contains("hello") && text.contains("nameserver 192.0.2.54") {
            Ok(())
        } else {
            Err(text)
        }
    });
    let status = nomad.get(&format!("/v1/allocation/{id}"))["NetworkStatus"]["Address"].clone();
    assert_eq!(
        fetch(&format!("http://{}:8080", status.as_str().unwrap())).unwrap(),
        "hello\n"
    );
    nomad.run(&["job", "stop", "-detach", "-yes", "grouped"]);
    wait_until("no network container", Duration::from_secs(40), || {
        let left = docker::containers("dev.polydev.network");
        if left.is_empty() {
            Ok(())
        } else {
            Err(format!("{left:?}"))
        }
    });
}

fn container(id: &str) -> Value {
    let ids = docker::containers(&format!("dev.polydev.alloc_id={id}"));
    let [container] = &ids[..] else {
        panic!("{ids:?}")
    };
    docker::inspect(container)
}

/// Sends or fetches 2.5 MB. At 10 Mbit/s that takes 2 s, less the burst of 64 KiB.
#[test]
fn bandwidth_is_held_both_ways() {
    let nomad = Nomad::start();
    let mut config =
        shell("nc -ll -p 9000 -e wc -c & nc -ll -p 9001 -e head -c 2500000 /dev/zero & wait");
    merge(
        &mut config,
        json!({ "bandwidth": { "egress_mbits": 10, "ingress_mbits": 10 } }),
    );
    nomad.submit(&service("shaped", config));
    let id = nomad.wait_started("shaped");
    let address = container(&id)["NetworkSettings"]["IPAddress"]
        .as_str()
        .unwrap()
        .to_owned();
    let connect = |port: u16| {
        wait_until("the server in the task", Duration::from_secs(10), || {
            TcpStream::connect((&*address, port)).map_err(|error| error.to_string())
        })
    };
    let held = |what: &str, begin: Instant| {
        let seconds = begin.elapsed().as_secs_f64();
        assert!(
            (1.7..4.0).contains(&seconds),
            "2.5 MB were {what} in {seconds} s"
        );
    };
    let mut upload = connect(9000);
    let begin = Instant::now();
    upload.write_all(&vec![0; 2_500_000]).unwrap();
    upload.shutdown(Shutdown::Write).unwrap();
    let mut count = String::new();
    upload.read_to_string(&mut count).unwrap();
    assert_eq!(count.trim(), "2500000");
    held("received", begin);
    let mut download = connect(9001);
    let begin = Instant::now();
    let mut data = Vec::new();
    download.read_to_end(&mut data).unwrap();
    assert_eq!(data.len(), 2_500_000);
    held("sent", begin);

    // The driver cannot limit an interface that the task does not own.
    let mut config = shell("true");
    merge(
        &mut config,
        json!({ "bandwidth": { "egress_mbits": 1 }, "network_mode": "host" }),
    );
    nomad.submit(&job::batch("refused", config));
    let told = job::events(&nomad.wait_dead("refused"));
    assert!(told.contains("`bandwidth` is set"), "{told}");
}

#[test]
fn a_warm_slot_reaches_neither_the_hosts_services_nor_the_metadata_address() {
    let shim = Shim::dev(&["anthropic=1"]);
    let client = shim.client();
    let service = TcpListener::bind("0.0.0.0:0").unwrap();
    let port = service.local_addr().unwrap().port();
    let network = shim.label().replace("dev.polydev.instance=", "polydev-");
    let gateway = docker::docker(&[
        "network",
        "inspect",
        "--format",
        "{{ (index .IPAM.Config 0).Gateway }}",
        &network,
    ]);
    let gateway = gateway.trim();
    assert!(
        TcpStream::connect((gateway, port)).is_ok(),
        "the service is there"
    );
    for (target, end) in [
        // curl's status for a time-out: the packets were dropped, so a route exists.
        (format!("{gateway}:{port}"), 28),
        (format!("{gateway}:22"), 28),
        // The rules answer for what is beyond the host.
        ("169.254.169.254:80".into(), 7),
    ] {
        let script = format!(
            "curl --silent --noproxy '*' --connect-timeout 2 --max-time 3 --output /dev/null --write-out '%{{time_connect}}' http://{target}/"
        );
        let outcome = client.run(run_shell("anthropic", &script)).unwrap();
        assert_eq!(outcome.stdout(), "0.000000", "{target} answered");
        assert_eq!(outcome.exited.exit_code, end, "{target}");
    }
}

#[test]
fn a_warm_slot_reaches_a_private_network_only_if_the_operator_opens_it() {
    let serve = |second| {
        Host::serve_in([10, second], |address| {
            let mut command = Command::new(program("stand-in"));
            command.arg(format!("{address}:80"));
            command
        })
    };
    let (closed, open) = (serve(98), serve(99));
    let nomad = Nomad::start_with("private_networks = [\"10.99.0.0/16\"]");
    nomad.submit_pool("anthropic", 1);
    let shim = Shim::serve(&nomad.address);
    let client = shim.client();
    client.wait_idle("anthropic", 1);
    let script = format!(
        "curl --silent --max-time 10 --output /dev/null --write-out '%{{http_code}} ' {}/requests; \
         curl --silent --max-time 2 --output /dev/null --write-out '%{{time_connect}}' {}/requests",
        open.url, closed.url
    );
    let outcome = client.run(run_shell("anthropic", &script)).unwrap();
    assert_eq!(outcome.stdout(), "200 0.000000");
    // curl's status for a connection that is refused.
    assert_eq!(outcome.exited.exit_code, 7);
}
