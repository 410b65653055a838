//! Many slots and live runs on one node: the cost of an idle slot, the time until streams
//! continue after a kill of the driver, and the memory for a caller that reads slowly.

use std::{
    fs,
    os::unix::net::UnixStream,
    path::Path,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use polydev_proto::runtime::{RunStart, run_event::Event};
use polydev_tests::{
    client::{Client, Run, argv, shell},
    docker,
    nomad::Nomad,
    shim::{Shim, instance_label},
    wait_until,
};
use procfs::process::Process;
use serde_json::{Value, json};

use super::{Summary, millis, resident};

const SLOTS: u32 = 50;
/// Prints five lines a second, without a process for each.
const TICKS: &str = "exec 3<> <(:); while :; do echo $EPOCHREALTIME; read -t 0.2 -u 3; done";
/// How many bytes the slow caller reads per second.
const SLOWLY: usize = 1_000_000;
const SLOW_TIME: Duration = Duration::from_secs(15);

/// When the next driver listened.
type Listening = OnceLock<(Instant, SystemTime)>;

pub(super) fn figures() -> anyhow::Result<Vec<Value>> {
    let nomad = Nomad::start_with("run_headroom {\n cpu = 25000\n memory = 16384\n}");
    let shim = Shim::serve(&nomad.address);
    let client = shim.client();
    let state = nomad.state_dir();
    nomad.submit_pool("anthropic", 1);
    client.wait_idle("anthropic", 1);
    let one = memory(&state, &shim)?;
    nomad.submit_pool("anthropic", SLOTS);
    client.wait_idle("anthropic", SLOTS);
    let all = memory(&state, &shim)?;
    let for_each = (all - one).max(0.0) * 1e3 / f64::from(SLOTS - 1);

    let resumed = Summary::of(&resumed(&client, &state)?);
    client.wait_idle("anthropic", SLOTS);
    let (held, taken) = held(&nomad, &shim, &client)?;
    Ok(vec![
        json!({
            "name": format!("driver and shim, resident for each of {SLOTS} idle slots"),
            "unit": "kB", "n": 1, "value": for_each,
            "bound": "<= 262", "holds": for_each <= 262.0,
        }),
        json!({
            "name": format!("from the new driver's listening to the streams of {SLOTS} runs"),
            "unit": "ms", "n": SLOTS,
            "p50": resumed.p50, "p90": resumed.p90, "p99": resumed.p99,
            "bound": "all <= 1000 ms", "holds": resumed.p99 <= 1000.0,
        }),
        json!({
            "name": "1 GiB to a caller that reads 1 MB/s: not yet given to it",
            "unit": "MB", "n": 1, "value": held,
            "bound": "<= 8.4 (8 MiB)", "holds": held <= 8.4,
        }),
        json!({
            "name": "the same: memory that driver, shim and window have taken for it",
            "unit": "MB", "n": 1, "value": taken,
            "bound": "<= 8.4 (8 MiB), and 4.2 that can be asked for again",
            "holds": taken <= 12.6,
        }),
    ])
}

fn driver(state: &Path) -> anyhow::Result<i32> {
    Ok(fs::read_to_string(state.join("driver.lock"))?
        .trim()
        .parse()?)
}

/// Resident MB of driver and shim.
fn memory(state: &Path, shim: &Shim) -> anyhow::Result<f64> {
    let shim = resident(shim.process.pid().as_raw().into())?;
    Ok(resident(driver(state)?.into())? + shim)
}

/// Kills the driver while every slot has a run. Returns the milliseconds from the moment when the
/// next driver listens until each stream continues at its offset.
fn resumed(client: &Client, state: &Path) -> anyhow::Result<Vec<f64>> {
    let (runs, _) = client.start_all(vec![shell_of_bash(TICKS); SLOTS as usize])?;
    let listening = Arc::new(Listening::new());
    let going = AtomicU32::new(0);
    let socket = state.join("node.sock");
    std::thread::scope(|scope| {
        let readers: Vec<_> = runs
            .into_iter()
            .map(|run| {
                let (listening, going) = (listening.clone(), &going);
                scope.spawn(move || first_after(client, run, &listening, going))
            })
            .collect();
        wait_until(
            "a line of each run",
            Duration::from_secs(30),
            || match going.load(Ordering::Relaxed) {
                SLOTS => Ok(()),
                some => Err(some.to_string()),
            },
        );
        let killed = driver(state)?;
        kill(Pid::from_raw(killed), Signal::SIGKILL)?;
        let limit = Instant::now() + Duration::from_secs(60);
        // The socket of the dead driver may accept a connection for a moment.
        while driver(state).is_ok_and(|now| now == killed) || UnixStream::connect(&socket).is_err()
        {
            if Instant::now() > limit {
                bail!("no driver listens");
            }
            std::thread::park_timeout(Duration::from_millis(1));
        }
        let _once = listening.set((Instant::now(), SystemTime::now()));
        let samples = readers.into_iter().map(|reader| {
            let (run_id, sample) = reader.join().ok().context("a reader panicked")??;
            client.cancel(&run_id)?;
            Ok(sample)
        });
        samples.collect()
    })
}

/// Reads until output arrives that was written after the next driver listened.
fn first_after(
    client: &Client,
    mut run: Run,
    listening: &Listening,
    going: &AtomicU32,
) -> anyhow::Result<(String, f64)> {
    let mut next = 0;
    loop {
        match client.next(&mut run)?.context("a stream ended")? {
            Event::Stdout(output) => {
                if output.offset != next {
                    bail!("{} instead of byte {next}", output.offset);
                }
                if next == 0 {
                    going.fetch_add(1, Ordering::Relaxed);
                }
                next += output.data.len() as u64;
                if let Some((since, clock)) = listening.get()
                    && written(&output.data)? > clock.duration_since(UNIX_EPOCH)?.as_secs_f64()
                {
                    return Ok((run.accepted.run_id, millis(since.elapsed())));
                }
            }
            Event::Exited(exited) => bail!("{exited:?}"),
            _ => {}
        }
    }
}

/// When the last whole line was written.
fn written(output: &[u8]) -> anyhow::Result<f64> {
    let text = String::from_utf8_lossy(output);
    let last = text.lines().rfind(|line| line.len() > 15);
    Ok(last.map_or(Ok(0.0), str::parse)?)
}

fn shell_of_bash(script: &str) -> RunStart {
    argv("anthropic", &["bash", "-c", script])
}

/// The largest number of MB that a command has written and its slow caller has not received, and
/// the growth in MB of driver, shim and the memory behind the window.
fn held(nomad: &Nomad, shim: &Shim, client: &Client) -> anyhow::Result<(f64, f64)> {
    let state = nomad.state_dir();
    let used = || -> anyhow::Result<f64> { Ok(memory(&state, shim)? + window(&state)?) };
    let before = used()?;
    let mut run = client.start(shell("anthropic", "exec head -c 1073741824 /dev/zero"))?;
    let command = command(nomad)?;
    let begun = Instant::now();
    let (mut read, mut held, mut taken) = (0, 0.0_f64, 0.0_f64);
    while begun.elapsed() < SLOW_TIME {
        let due = SLOWLY as f64 * begun.elapsed().as_secs_f64();
        if read as f64 > due {
            std::thread::park_timeout(Duration::from_millis(10));
            let written = Process::new(command)?.io()?.wchar as f64;
            held = held.max(written - read as f64);
            taken = taken.max(used()? - before);
            continue;
        }
        match client.next(&mut run)?.context("the stream ended")? {
            Event::Stdout(output) => read += output.data.len(),
            Event::Exited(exited) => bail!("{exited:?}"),
            _ => {}
        }
    }
    client.cancel(&run.accepted.run_id)?;
    Ok((held / 1e6, taken))
}

/// The MB of the runs' output.
fn window(state: &Path) -> anyhow::Result<f64> {
    let stat = nix::sys::statvfs::statvfs(&state.join("output"))?;
    let taken = stat.blocks() - stat.blocks_free();
    Ok((taken * stat.fragment_size()) as f64 / 1e6)
}

/// The process `head`, which one container has.
fn command(nomad: &Nomad) -> anyhow::Result<i32> {
    let label = instance_label(&nomad.state_dir());
    for id in docker::containers(&label) {
        let init = docker::inspect(&id)["State"]["Pid"].as_i64();
        let init = Process::new(i32::try_from(init.context("a container has a pid")?)?)?;
        for thread in init.tasks()?.flatten() {
            for child in thread.children()? {
                let child = i32::try_from(child)?;
                if Process::new(child)?.stat()?.comm == "head" {
                    return Ok(child);
                }
            }
        }
    }
    bail!("no container has the command")
}
