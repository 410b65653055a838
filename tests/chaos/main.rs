//! `make chaos MINUTES=n [SEED=s]`: kills parts of a real cluster under load, in an order that
//! the seed gives. The cluster has a server, two shims and two nodes, each with a Nomad agent, a
//! dockerd and a driver. Each run puts its id into a ledger outside its container, and prints
//! lines that only this run prints; a prompt goes to a real CLI that waits, and its node's model
//! is the ledger. [`check`] compares these with what callers received, and then
//! looks for leftovers on the machine.
//!
//! Ends with status 1 if a run ran twice, was lost without an error or had a wrong byte, or if
//! something was left behind.

mod caller;
mod check;
mod faults;
mod ledger;
mod model;
mod spec;

use std::{
    io::{Write, stderr, stdout},
    net::SocketAddr,
    path::PathBuf,
    process::ExitCode,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context;
use clap::Parser;
use polydev_tests::{client::Client, cluster::Cluster, wait_until};
use rand::{Rng, SeedableRng, rngs::StdRng};

use caller::Call;
use check::Forgotten;
use faults::{Fault, Parts};
use ledger::Ledger;
use model::Models;
use spec::Spec;

/// The pool for scripts. Its slots have busybox alone, and no agents.
const PROVIDER: &str = "anthropic";
const SLOTS: u32 = 8;
/// The pool for prompts. Its slots have agents.
const AGENTS: &str = "openai";
const AGENT_SLOTS: u32 = 2;
/// The warm pools, and their sizes.
const POOLS: [(&str, u32); 2] = [(PROVIDER, SLOTS), (AGENTS, AGENT_SLOTS)];
/// How many findings are printed. Further findings are only counted.
const SHOWN: usize = 40;
/// Callers at the same time. They are more than the slots, so that some runs wait and some get
/// slots on demand.
const CALLERS: u64 = 10;

#[derive(Parser)]
enum Arguments {
    /// Break things for a while, and look what has become of the runs.
    Run {
        #[arg(long, default_value_t = 10)]
        minutes: u64,
        /// Decides what is run and what is killed. [default: random]
        #[arg(long)]
        seed: Option<u64>,
        /// From one fault's recovery to the next fault.
        #[arg(long, default_value_t = 10)]
        pause: u64,
    },
    /// Where commands put their ids: a part of `run`.
    Ledger { listen: SocketAddr, file: PathBuf },
}

fn main() -> anyhow::Result<ExitCode> {
    match Arguments::parse() {
        Arguments::Run {
            minutes,
            seed,
            pause,
        } => run(
            Duration::from_secs(minutes * 60),
            seed.unwrap_or_else(rand::random),
            Duration::from_secs(pause),
        ),
        Arguments::Ledger { listen, file } => {
            ledger::serve(listen, &file)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn run(time: Duration, seed: u64, pause: Duration) -> anyhow::Result<ExitCode> {
    say(&format!("seed {seed}, {} minutes", time.as_secs() / 60));
    let cluster = Cluster::start();
    let traces = check::traces(&cluster);
    let ledger = Ledger::start(&cluster);
    let models = Models::start(&cluster);
    for engine in &cluster.engines {
        engine.load(&format!("polydev-{AGENTS}-runtime:latest"));
    }
    let pool = format!("jobspecs/pool-{PROVIDER}.nomad.hcl");
    let count = format!("count={SLOTS}");
    let ahead = "prepare_ahead=true";
    cluster.run(&[
        "job", "run", "-detach", "-var", &count, "-var", ahead, &pool,
    ]);
    let agents = format!("jobspecs/pool-{AGENTS}.nomad.hcl");
    let count = format!("count={AGENT_SLOTS}");
    let model = format!("base_url={}", model::URL);
    cluster.run(&[
        "job",
        "run",
        "-detach",
        "-var",
        &count,
        "-var",
        "agent=true",
        "-var",
        &model,
        &agents,
    ]);
    let on_demand = format!("jobspecs/on-demand-{PROVIDER}.nomad.hcl");
    cluster.run(&["job", "run", "-detach", &on_demand]);
    let mut parts = Parts::start(cluster);
    wait_warm(&parts);

    let over = Arc::new(AtomicBool::new(false));
    let calls: Arc<Mutex<Vec<Call>>> = Arc::default();
    let load = {
        let (shims, over, calls) = (parts.addresses(), over.clone(), calls.clone());
        let ledger = ledger.address;
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Runtime::new().context("no runtime")?;
            runtime.block_on(async {
                let callers = (0..CALLERS).map(|number| {
                    let (shims, over, calls) = (shims.clone(), over.clone(), calls.clone());
                    tokio::spawn(async move {
                        let mut rng = StdRng::seed_from_u64(seed ^ (number + 1));
                        while !over.load(Ordering::Relaxed) {
                            let spec = Spec::random(&mut rng, ledger);
                            let call = caller::call(&shims, spec, &mut rng).await;
                            let mut calls = calls.lock().unwrap_or_else(PoisonError::into_inner);
                            calls.push(call);
                        }
                    })
                });
                futures_util::future::try_join_all(callers).await
            })?;
            anyhow::Ok(())
        })
    };

    let begun = Instant::now();
    let mut rng = StdRng::seed_from_u64(seed);
    let mut killed = Vec::new();
    while begun.elapsed() + pause < time && !load.is_finished() {
        std::thread::park_timeout(pause);
        let fault = Fault::random(&mut rng);
        let recovered = parts.inject(fault, &mut rng);
        killed.push(fault);
        let ran = calls.lock().unwrap_or_else(PoisonError::into_inner).len();
        say(&format!(
            "{:>4} s  {ran:>5} runs  {} recovered in {:.1} s",
            begun.elapsed().as_secs(),
            fault.name(),
            recovered.as_secs_f64()
        ));
    }
    over.store(true, Ordering::Relaxed);
    match load.join() {
        Ok(ended) => ended?,
        Err(panic) => std::panic::resume_unwind(panic),
    }
    let took = begun.elapsed();
    let last = Instant::now();

    let calls = std::mem::take(&mut *calls.lock().unwrap_or_else(PoisonError::into_inner));
    let containers = killed
        .iter()
        .filter(|fault| **fault == Fault::Container)
        .count();
    let mut entries = ledger.entries()?;
    entries.extend(models.entries(&parts.cluster, &calls)?);
    let mut findings = check::runs(&calls, &entries, containers);
    let dockerds = killed.iter().filter(|fault| **fault == Fault::Dockerd);
    let (left, forgotten) = check::leftovers(parts, &traces, last, dockerds.count());
    findings.extend(left);
    report(seed, took, &calls, &killed, &findings)?;
    let Forgotten {
        containers,
        interfaces,
    } = forgotten;
    writeln!(
        stdout(),
        "dockerd forgot     {containers} containers and {interfaces} interfaces"
    )?;
    Ok(match findings.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

fn wait_warm(parts: &Parts) {
    let address = parts.addresses().any(0);
    let client = Client::connect(&address);
    for (provider, slots) in POOLS {
        wait_until("a warm pool", Duration::from_secs(120), || {
            let pool = client.pool(provider);
            match pool.idle == slots {
                true => Ok(()),
                false => Err(format!("{pool:?}")),
            }
        });
    }
}

fn report(
    seed: u64,
    took: Duration,
    calls: &[Call],
    killed: &[Fault],
    findings: &[String],
) -> std::io::Result<()> {
    let mut out = stdout();
    let count = |kind: &str| {
        calls
            .iter()
            .filter(|call| call.outcome.kind() == kind)
            .count()
    };
    let whole = count("whole");
    writeln!(out, "seed               {seed}")?;
    writeln!(out, "minutes            {:.1}", took.as_secs_f64() / 60.0)?;
    writeln!(
        out,
        "runs, whole        {whole}, {:.2} a second",
        whole as f64 / took.as_secs_f64()
    )?;
    for kind in ["lost", "refused", "told", "stuck"] {
        writeln!(out, "runs, {kind:<12} {}", count(kind))?;
    }
    let prompts = calls.iter().filter(|call| call.spec.prompt().is_some());
    writeln!(
        out,
        "prompts            {}, of which {} found their agent waiting",
        prompts.clone().count(),
        prompts.filter(|call| call.parked).count()
    )?;
    let of = |what: fn(&Call) -> u32| calls.iter().map(what).sum::<u32>();
    writeln!(
        out,
        "on demand          {}",
        calls.iter().filter(|call| call.on_demand).count()
    )?;
    writeln!(
        out,
        "tried again        {}",
        of(|call| call.attempts.saturating_sub(1))
    )?;
    writeln!(out, "attached           {}", of(|call| call.attached))?;
    for fault in Fault::ALL {
        let times = killed.iter().filter(|killed| **killed == fault).count();
        writeln!(out, "{:<18} {times}", fault.name())?;
    }
    writeln!(out, "findings           {}", findings.len())?;
    for finding in findings.iter().take(SHOWN) {
        writeln!(out, "  {finding}")?;
    }
    Ok(())
}

fn say(line: &str) {
    let _nobody_looks = writeln!(stderr(), "chaos: {line}");
}

/// A random number up to `end`. Small numbers are more frequent.
fn small(rng: &mut StdRng, end: u32) -> u32 {
    (0..3).fold(end, |most, _| rng.random_range(0..=most))
}
