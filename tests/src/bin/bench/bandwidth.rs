//! Bandwidth of plain tasks: what passes a limit, and how fast a change of it takes effect.

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use polydev_driver::limits::{BURST, Handle, Limits};
use polydev_tests::{
    docker,
    job::{merge, service, shell, task},
    nomad::Nomad,
    wait_until,
};
use serde_json::{Value, json};

/// What the bucket lets through at once is gone by then.
const SETTLE: Duration = Duration::from_secs(1);
const WINDOW: Duration = Duration::from_secs(3);
/// For a slow one longer: what passes at once is up to 64 KiB.
const WINDOW_MBITS: Duration = Duration::from_secs(20);
/// Ethernet, IP and TCP with timestamps, of a frame of 1,514 bytes.
const HEADERS: f64 = 66.0;
const FRAME: f64 = 1514.0;

pub(super) fn figures(nomad: &Nomad) -> anyhow::Result<Vec<Value>> {
    let mut figures = Vec::new();
    for mbits in [1, 5, 10, 100, 1000] {
        let server = Server::start(nomad, mbits)?;
        figures.extend(server.rates()?);
        if mbits == 10 {
            figures.extend(server.changes()?);
        }
        nomad.run(&["job", "stop", "-purge", "-yes", &server.job]);
    }
    Ok(figures)
}

/// A task that takes all it is sent at one port and sends all it can at another.
struct Server {
    job: String,
    mbits: u32,
    pid: u32,
    address: String,
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
        let address = container["NetworkSettings"]["IPAddress"].as_str();
        Ok(Self {
            job,
            mbits,
            pid: u32::try_from(container["State"]["Pid"].as_u64().context("a pid")?)?,
            address: address.unwrap_or_default().to_owned(),
        })
    }

    fn connect(&self, port: u16) -> TcpStream {
        wait_until("the server in the task", Duration::from_secs(10), || {
            TcpStream::connect((&*self.address, port)).map_err(|error| error.to_string())
        })
    }

    /// Megabits a second that pass, each way.
    fn rates(&self) -> anyhow::Result<Vec<Value>> {
        let mut upload = self.connect(9000);
        let sender = upload.try_clone()?;
        let writer = thread::spawn(move || while upload.write_all(&[0; 64 << 10]).is_ok() {});
        let received = self.passing(0)?;
        sender.shutdown(std::net::Shutdown::Both)?;
        drop(writer.join());

        let mut download = self.connect(9001);
        let receiver = download.try_clone()?;
        let reader = thread::spawn(move || {
            let mut buffer = vec![0; 256 << 10];
            while download.read(&mut buffer).is_ok_and(|len| len > 0) {}
        });
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

    /// Megabits a second on the wire, from the counters of the container's interface.
    fn passing(&self, direction: usize) -> anyhow::Result<f64> {
        thread::sleep(SETTLE);
        let (begin, before) = (Instant::now(), self.counters(direction)?);
        thread::sleep(WINDOW.max(WINDOW_MBITS / self.mbits));
        let (time, after) = (begin.elapsed(), self.counters(direction)?);
        // Segments that pass as one packet are counted with the headers of one.
        let payload = (after.0 - before.0) - (after.1 - before.1) * HEADERS;
        Ok(payload * FRAME / (FRAME - HEADERS) * 8.0 / 1e6 / time.as_secs_f64())
    }

    /// Bytes and packets that have been received (0) or sent (1).
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

    /// A connection under way while its limit is raised tenfold, and lowered again.
    fn changes(&self) -> anyhow::Result<Vec<Value>> {
        const LOOK: Duration = Duration::from_millis(5);
        let class = |mbits| Limits {
            mbits,
            ..Limits::RUN
        };
        let handle = Handle::open(self.pid, &class(self.mbits))?;
        let mut download = self.connect(9001);
        let reader = thread::spawn(move || -> std::io::Result<Vec<(Instant, usize)>> {
            let (mut buffer, mut seen) = (vec![0; 256 << 10], Vec::new());
            let begin = Instant::now();
            while begin.elapsed() < 4 * SETTLE {
                let len = download.read(&mut buffer)?;
                ensure_open(len)?;
                seen.push((Instant::now(), len));
            }
            Ok(seen)
        });
        thread::sleep(SETTLE);
        let raised = Instant::now();
        handle.set(&class(10 * self.mbits))?;
        let took = raised.elapsed();
        thread::sleep(SETTLE);
        let lowered = Instant::now();
        handle.set(&class(self.mbits))?;
        let seen = reader.join().expect("reading does not panic")?;

        #[expect(clippy::cast_precision_loss, reason = "a few million bytes")]
        let rate = |from: Instant, time: Duration| {
            let bytes: usize = seen
                .iter()
                .filter(|(at, _)| (from..from + time).contains(at))
                .map(|(_, len)| len)
                .sum();
            bytes as f64 * 8.0 / 1e6 / time.as_secs_f64()
        };
        let quickly = rate(raised, LOOK);
        let least = f64::from(5 * self.mbits);
        // One bucket full passes after each change.
        let most = f64::from(self.mbits) + f64::from(BURST) * 8.0 / 1e6 / 0.5;
        let slowly = rate(lowered + LOOK, SETTLE / 2);
        let from_to = |from: u32, to: u32| format!("{from} to {to} Mbit/s on a live connection");
        Ok(vec![
            json!({
                "name": format!("{}: in the first 5 ms", from_to(self.mbits, 10 * self.mbits)),
                "unit": "Mbit/s", "n": 1, "value": quickly, "bound": format!("at least {least}"), "holds": quickly >= least,
            }),
            json!({
                "name": format!("{}: from the 5th ms on", from_to(10 * self.mbits, self.mbits)),
                "unit": "Mbit/s", "n": 1, "value": slowly, "bound": format!("at most {most:.1}, the bucket included"), "holds": slowly <= most,
            }),
            json!({
                "name": "the change itself", "unit": "ms", "n": 1, "value": took.as_secs_f64() * 1e3,
                "bound": "<= 5 ms", "holds": took <= LOOK,
            }),
        ])
    }
}

fn ensure_open(len: usize) -> std::io::Result<()> {
    if len == 0 {
        return Err(std::io::Error::other("the connection was dropped"));
    }
    Ok(())
}
