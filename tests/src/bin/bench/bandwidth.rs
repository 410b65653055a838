//! Bandwidth of plain tasks: the rate under a limit, and how fast a changed limit takes effect.

use std::{
    fs,
    io::{Read, Write},
    net::{TcpStream, UdpSocket},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use super::Summary;
use anyhow::{Context, ensure};
use polydev_driver::limits::{BURST, Handle, Limits};
use polydev_tests::{
    docker,
    job::{merge, service, shell, task},
    nomad::Nomad,
    wait_until,
};
use serde_json::{Value, json};

/// The time after which the burst of the bucket has passed.
const SETTLE: Duration = Duration::from_secs(1);
const WINDOW: Duration = Duration::from_secs(3);
/// A longer time for a slow limit, because the burst is up to 64 KiB.
const WINDOW_MBITS: Duration = Duration::from_secs(20);
/// Bytes of the Ethernet, IP and TCP headers with timestamps, in a frame of 1,514 bytes.
const HEADERS: f64 = 66.0;
const FRAME: f64 = 1514.0;

pub(super) fn figures(nomad: &Nomad) -> anyhow::Result<Vec<Value>> {
    let mut figures = Vec::new();
    for mbits in [1, 5, 10, 100, 1000] {
        let server = Server::start(nomad, mbits)?;
        figures.extend(server.rates()?);
        if mbits == 1 {
            figures.extend(server.changes()?);
        }
        nomad.run(&["job", "stop", "-purge", "-yes", &server.job]);
    }
    Ok(figures)
}

/// A task that receives all data at one port, and sends as much as it can at another.
struct Server {
    job: String,
    mbits: u32,
    pid: u32,
    container: String,
    address: String,
    gateway: String,
}

impl Server {
    fn start(nomad: &Nomad, mbits: u32) -> anyhow::Result<Self> {
        let job = format!("rate-{mbits}");
        let script = "nc -ll -p 9000 -e dd of=/dev/null bs=1M & nc -ll -p 9001 -e dd if=/dev/zero bs=1M & wait";
        let mut config = shell(script);
        let limits = json!({ "egress_mbits": mbits, "ingress_mbits": mbits });
        merge(&mut config, json!({ "bandwidth": limits }));
        let mut spec = service(&job, config);
        task(&mut spec)["Resources"]["CPU"] = 1000.into();
        nomad.submit(&spec);
        let alloc = nomad.wait_started(&job);
        let ids = docker::containers(&format!("dev.polydev.alloc_id={alloc}"));
        let container = docker::inspect(ids.first().context("the task has a container")?);
        let network = |name: &str| {
            container["NetworkSettings"][name]
                .as_str()
                .unwrap_or_default()
                .to_owned()
        };
        Ok(Self {
            job,
            mbits,
            pid: u32::try_from(container["State"]["Pid"].as_u64().context("a pid")?)?,
            container: ids[0].clone(),
            address: network("IPAddress"),
            gateway: network("Gateway"),
        })
    }

    fn connect(&self, port: u16) -> TcpStream {
        wait_until("the server in the task", Duration::from_secs(10), || {
            TcpStream::connect((&*self.address, port)).map_err(|error| error.to_string())
        })
    }

    /// The rate in megabits per second, in each direction.
    fn rates(&self) -> anyhow::Result<Vec<Value>> {
        let mut upload = self.connect(9000);
        let sender = upload.try_clone()?;
        let writer = thread::spawn(move || while upload.write_all(&[0; 64 << 10]).is_ok() {});
        let received = self.passing(0)?;
        sender.shutdown(std::net::Shutdown::Both)?;
        drop(writer.join());

        let download = self.connect(9001);
        let receiver = download.try_clone()?;
        let reader = drain(download);
        let sent = self.passing(1)?;
        receiver.shutdown(std::net::Shutdown::Both)?;
        drop(reader.join());

        let wanted = f64::from(self.mbits);
        let figure = |direction: &str, rate: f64| {
            json!({
                "name": format!("{wanted} Mbit/s, what the task {direction}"), "unit": "Mbit/s",
                "n": 1, "value": rate, "bound": "within 5 %", "holds": (rate / wanted - 1.0).abs() <= 0.05,
            })
        };
        Ok(vec![figure("receives", received), figure("sends", sent)])
    }

    /// The rate on the wire in megabits per second, from the counters of the container's interface.
    fn passing(&self, direction: usize) -> anyhow::Result<f64> {
        thread::sleep(SETTLE);
        let (begin, before) = (Instant::now(), self.counters(direction)?);
        thread::sleep(WINDOW.max(WINDOW_MBITS / self.mbits));
        let (time, after) = (begin.elapsed(), self.counters(direction)?);
        // The interface counts segments that pass as one packet with the headers of one packet.
        let payload = (after.0 - before.0) - (after.1 - before.1) * HEADERS;
        Ok(payload * FRAME / (FRAME - HEADERS) * 8.0 / 1e6 / time.as_secs_f64())
    }

    /// The number of bytes and packets received (direction 0) or sent (direction 1).
    fn counters(&self, direction: usize) -> anyhow::Result<(f64, f64)> {
        let text = fs::read_to_string(
            Path::new("/proc")
                .join(self.pid.to_string())
                .join("net/dev"),
        )?;
        let line = text
            .lines()
            .find_map(|line| line.trim().strip_prefix("eth0:"));
        let numbers: Vec<f64> = line
            .context("the task has no eth0")?
            .split_whitespace()
            .map(str::parse)
            .collect::<Result<_, _>>()?;
        let at = direction * 8;
        ensure!(numbers.len() > at + 1, "`{text}` has too few columns");
        Ok((numbers[at], numbers[at + 1]))
    }

    /// Raises the limit tenfold during a connection, and lowers it again.
    fn changes(&self) -> anyhow::Result<Vec<Value>> {
        const LOOK: Duration = Duration::from_millis(5);
        let class = |mbits| Limits {
            mbits,
            ..Limits::RUN
        };
        let (low, high) = (self.mbits, 10 * self.mbits);
        let handle = Handle::open(self.pid, &class(low))?;
        let download = self.connect(9001);
        let receiver = download.try_clone()?;
        let reader = drain(download);
        // Packets without congestion control. Nobody reads them.
        let sink = UdpSocket::bind((&*self.gateway, 0))?;
        let flood = format!(
            "nc -u {} {} </dev/zero",
            self.gateway,
            sink.local_addr()?.port()
        );
        docker::docker(&["exec", "--detach", &self.container, "sh", "-c", &flood]);
        // The rate of the container's interface in megabits per second, from now or from before
        // `change` until so long after it.
        let sent =
            |change: &dyn Fn() -> anyhow::Result<()>, time: Duration| -> anyhow::Result<f64> {
                let (begin, before) = (Instant::now(), self.counters(1)?.0);
                change()?;
                while begin.elapsed() < time {
                    std::hint::spin_loop();
                }
                let (time, after) = (begin.elapsed(), self.counters(1)?.0);
                Ok((after - before) * 8.0 / 1e6 / time.as_secs_f64())
            };
        let (mut took, mut quickly, mut slowly) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..10 {
            thread::sleep(SETTLE);
            let change = || Ok(handle.shaping(&class(high))()?);
            quickly.push(sent(&change, LOOK)?);
            thread::sleep(SETTLE);
            let begin = Instant::now();
            handle.shaping(&class(low))()?;
            took.push(begin.elapsed().as_secs_f64() * 1e3);
            thread::sleep(LOOK);
            slowly.push(sent(&|| Ok(()), SETTLE)?);
        }
        ensure!(!reader.is_finished(), "the connection was dropped");
        receiver.shutdown(std::net::Shutdown::Both)?;
        drop(reader.join());

        // One bucket full passes after each change.
        let most = f64::from(low) + f64::from(BURST) * 8.0 / 1e6 / SETTLE.as_secs_f64();
        let least = f64::from(high) * 0.95;
        let figure = |name: String, unit: &str, samples: &[f64], bound: String, holds: bool| {
            let summary = Summary::of(samples);
            json!({
                "name": name, "unit": unit, "n": samples.len(), "p50": summary.p50, "p90": summary.p90,
                "p99": summary.p99, "bound": bound, "holds": holds,
            })
        };
        Ok(vec![
            figure(
                format!("{low} to {high} Mbit/s, live: what passes in the first 5 ms"),
                "Mbit/s",
                &quickly,
                format!("at least {least} each time"),
                quickly.iter().all(|rate| *rate >= least),
            ),
            figure(
                format!("{high} to {low} Mbit/s, live: what passes in a second from the 5th ms on"),
                "Mbit/s",
                &slowly,
                format!("at most {most:.2} each time, the bucket included"),
                slowly.iter().all(|rate| *rate <= most * 1.05),
            ),
            figure(
                "the change itself".to_owned(),
                "ms",
                &took,
                "<= 5 ms".to_owned(),
                took.iter().all(|took| *took <= 5.0),
            ),
        ])
    }
}

/// Reads until the end, or an error.
fn drain(mut from: TcpStream) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        let mut buffer = vec![0; 256 << 10];
        while from.read(&mut buffer).is_ok_and(|len| len > 0) {}
    })
}
