//! Decides whether a chaos test passed: compares what commands wrote with what callers received,
//! and looks for leftovers on the machine.

use std::{
    collections::{HashMap, HashSet},
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use polydev_proto::runtime::ExitReason;
use polydev_tests::{
    client::Client,
    cluster::{Cluster, NODES},
    job::events,
};
use sha2::{Digest, Sha256};
use tonic::Code;

use crate::{
    POOLS, PROVIDER,
    caller::{Call, Outcome},
    faults::Parts,
};

/// How long the removal of everything may take.
const GONE: Duration = Duration::from_secs(10);

/// How long an init may take to end by itself after its dockerd has forgotten it.
const FORSAKEN: Duration = Duration::from_secs(40);

/// How long the pool may take to recover. If a driver dies twice while it starts a task, Nomad
/// gives up the task, and replaces it after at most two minutes. If a shim dies before it
/// withdraws a slot on demand, the slot ends after one minute.
const BACK: Duration = Duration::from_secs(150);

/// The problems of the runs, one line each. `containers` is the number of killed containers.
pub(crate) fn runs(
    calls: &[Call],
    ledger: &HashMap<String, u32>,
    containers: usize,
) -> Vec<String> {
    let mut findings = Vec::new();
    for call in calls {
        let times = ledger.get(&call.spec.run_id).copied().unwrap_or(0);
        let problem = problem(call, times);
        findings.extend(problem.map(|problem| {
            let (id, kind) = (&call.spec.run_id, call.outcome.kind());
            format!("{id}, {kind}: {problem}; {}", call.outcome.words())
        }));
    }
    let lost = calls
        .iter()
        .filter(|call| call.outcome.kind() == "lost")
        .count();
    if lost > containers {
        findings.push(format!(
            "{lost} runs lost their containers, of which {containers} were killed"
        ));
    }
    let known: HashSet<&String> = calls.iter().map(|call| &call.spec.run_id).collect();
    let unknown = ledger.keys().filter(|id| !known.contains(id));
    findings.extend(unknown.map(|id| format!("{id} is nobody's")));
    findings
}

fn problem(call: &Call, times: u32) -> Option<String> {
    if times > 1 {
        return Some(format!("it ran {times} times"));
    }
    if call.gaps > 0 {
        return Some(format!("{} gaps in its output", call.gaps));
    }
    let expected = call.spec.expected();
    match &call.outcome {
        Outcome::Whole(exited) => {
            let is_right = |stream: usize| {
                let (length, hash) = call.received[stream];
                let Some(expected) = &expected[stream] else {
                    return true;
                };
                let hash_expected: [u8; 32] = Sha256::digest(expected).into();
                length == expected.len() as u64 && hash == hash_expected
            };
            if times != 1 {
                Some("it is not in the ledger".into())
            } else if exited.exit_code != call.spec.status() {
                Some(format!("its status should be {}", call.spec.status()))
            } else if !is_right(0) || !is_right(1) {
                Some(format!(
                    "its output should have {:?} bytes",
                    expected.map(|whole| whole.map(|whole| whole.len()))
                ))
            } else {
                None
            }
        }
        Outcome::Lost(exited)
            if matches!(
                exited.reason(),
                ExitReason::Cancelled | ExitReason::Deadline
            ) =>
        {
            Some("nobody ended it".into())
        }
        // A part of the output may be missing, and the caller knows that.
        Outcome::Lost(_) => {
            let is_prefix = |stream: usize| {
                let (length, hash) = call.received[stream];
                let Some(expected) = &expected[stream] else {
                    return true;
                };
                let part = usize::try_from(length).ok();
                let part = part.and_then(|length| expected.get(..length));
                part.is_some_and(|part| <[u8; 32]>::from(Sha256::digest(part)) == hash)
            };
            (!is_prefix(0) || !is_prefix(1)).then(|| "its output is not its own".into())
        }
        Outcome::Refused(_) => (times > 0).then(|| "it ran".into()),
        // The caller was told that the run may have run, and nobody can know.
        Outcome::Told(status) if status.code() == Code::Aborted => None,
        Outcome::Told(status) => Some(format!("its caller was told {:?}", status.code())),
        Outcome::Stuck(_) => Some("its caller was told nothing".into()),
    }
}

/// What dockerds have forgotten. A dockerd that is killed while it starts a container does not
/// know the container after a restart, and leaves its control groups and interfaces. The
/// processes in them end by themselves.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Forgotten {
    pub(crate) containers: usize,
    pub(crate) interfaces: usize,
}

impl Forgotten {
    fn of(traces: &[String]) -> Self {
        let groups = traces.iter().filter_map(|trace| container_of(trace));
        let interfaces = traces.iter().filter(|trace| trace.starts_with(INTERFACE));
        Self {
            containers: groups.collect::<HashSet<_>>().len(),
            interfaces: interfaces.count(),
        }
    }

    /// Whether there is more than killed dockerds can have forgotten. Each dockerd starts at most
    /// as many containers at a time as its driver makes.
    fn is_too_much(&self, dockerds_killed: usize) -> bool {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        self.containers.max(self.interfaces) > 2 * cores * dockerds_killed
    }
}

/// Finds and removes leftovers. Also returns what dockerds have forgotten.
pub(crate) fn leftovers(
    parts: Parts,
    traces: &HashSet<String>,
    last_recovery: Instant,
    dockerds_killed: usize,
) -> (Vec<String>, Forgotten) {
    let client = Client::connect(&parts.addresses().any(0));
    let cluster = &parts.cluster;
    let mut findings = settle(last_recovery, GONE, || {
        let pools = POOLS.map(|(provider, _)| client.pool(provider));
        let containers = containers(cluster, "{{.ID}}");
        // Slots that Nomad has not replaced yet have no container.
        let known = pools.iter().map(|pool| pool.idle + pool.on_demand);
        if containers.len() == known.sum::<u32>() as usize {
            vec![]
        } else {
            vec![format!("containers of nothing: {pools:?}, {containers:?}")]
        }
    });
    findings.extend(settle(last_recovery, BACK, || {
        let pools = POOLS.map(|(provider, slots)| (client.pool(provider), slots));
        let changed = pools
            .iter()
            .filter(|(pool, slots)| pool.idle != *slots || pool.on_demand != 0);
        changed
            .map(|(pool, _)| format!("the pool is not what it was: {pool:?}"))
            .collect()
    }));
    if !findings.is_empty() {
        for (provider, _) in POOLS {
            let path = format!("/v1/job/polydev-pool-{provider}/allocations");
            let allocations = cluster.get(&path);
            findings.extend(allocations.as_array().into_iter().flatten().map(|alloc| {
                let (id, status) = (&alloc["ID"], &alloc["ClientStatus"]);
                format!("allocation {id}, {status}: {}", events(alloc))
            }));
        }
    }
    let pools = POOLS.map(|(provider, _)| format!("polydev-pool-{provider}"));
    for job in pools
        .into_iter()
        .chain([format!("polydev-on-demand-{PROVIDER}")])
    {
        cluster.run(&["job", "stop", "-detach", "-yes", &job]);
    }
    let new = || -> Vec<String> {
        let now = self::traces(cluster);
        now.difference(traces).cloned().collect()
    };
    let limit = match dockerds_killed {
        0 => GONE,
        _ => FORSAKEN,
    };
    findings.extend(settle(Instant::now(), GONE, || {
        let format = r#"container {{.Names}} of slot {{.Label "dev.polydev.slot"}}, {{.Status}}"#;
        let mut left = containers(cluster, format);
        for node in 0..NODES {
            for folder in ["link", "idle"] {
                let entries = below(&cluster.state_dir(node).join(folder));
                left.extend(entries);
            }
        }
        left
    }));
    findings.extend(settle(Instant::now(), limit, || {
        let mut left = new();
        if !Forgotten::of(&left).is_too_much(dockerds_killed) {
            left.retain(|trace| has_processes(trace));
        }
        left
    }));
    findings.extend(settle(Instant::now(), GONE, || {
        let mut left = Vec::new();
        let prefix = format!("/v1/jobs?prefix=polydev-on-demand-{PROVIDER}/");
        let jobs = cluster.get(&prefix);
        let open = jobs
            .as_array()
            .into_iter()
            .flatten()
            .filter(|job| job["Status"] != "dead");
        left.extend(open.map(|job| format!("job {}", job["ID"])));
        left
    }));
    (findings, Forgotten::of(&new()))
}

/// The leftovers after everything should have been removed.
fn settle(since: Instant, limit: Duration, look: impl Fn() -> Vec<String>) -> Vec<String> {
    loop {
        let left = look();
        if left.is_empty() || since.elapsed() > limit {
            return left;
        }
        std::thread::park_timeout(Duration::from_millis(100));
    }
}

fn containers(cluster: &Cluster, format: &str) -> Vec<String> {
    let listed = (0..NODES).flat_map(|node| cluster.containers(node, format));
    listed.collect()
}

fn below(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.path().display().to_string())
        .collect()
}

/// What Docker makes for containers: their network interfaces in the node's namespace, and their
/// control groups.
pub(crate) fn traces(cluster: &Cluster) -> HashSet<String> {
    let links = |node: usize| {
        let links = cluster.engines[node]
            .namespace()
            .ip(&["-oneline", "link", "show"]);
        let names = links.lines().filter_map(|line| line.split(": ").nth(1));
        let names: Vec<String> = names
            .map(|name| format!("{INTERFACE}{name} of node {node}"))
            .collect();
        names
    };
    let mut traces: HashSet<String> = (0..NODES).flat_map(links).collect();
    let mut folders = vec![PathBuf::from("/sys/fs/cgroup")];
    while let Some(folder) = folders.pop() {
        // A control group that has been removed meanwhile has nothing below it.
        let below = fs::read_dir(folder).into_iter().flatten().flatten();
        let below = below.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        for entry in below {
            let path = entry.path().display().to_string();
            if container_of(&path).is_some() {
                traces.insert(format!("{CONTROL_GROUP}{path}"));
            } else {
                folders.push(entry.path());
            }
        }
    }
    traces
}

const CONTROL_GROUP: &str = "control group ";
const INTERFACE: &str = "interface ";

/// The container in a control group's name, which is the id or `docker-ID.scope`.
fn container_of(path: &str) -> Option<String> {
    let name = path.rsplit('/').next()?;
    let is_id = |part: &&str| part.len() == 64 && part.bytes().all(|byte| byte.is_ascii_hexdigit());
    name.split(['-', '.']).find(is_id).map(str::to_owned)
}

fn has_processes(trace: &str) -> bool {
    let group = trace.strip_prefix(CONTROL_GROUP);
    group.is_some_and(|path| {
        let processes = fs::read_to_string(Path::new(path).join("cgroup.procs"));
        processes.is_ok_and(|processes| !processes.is_empty())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_is_excused_than_dockerds_can_have_forgotten() {
        let group = |number: usize, kind: &str| {
            format!("{CONTROL_GROUP}/sys/fs/cgroup/{kind}/docker/{number:064x}")
        };
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let most = 2 * cores;
        let groups = |count: usize| {
            let both =
                (0..count).flat_map(|number| ["cpu", "memory"].map(|kind| group(number, kind)));
            both.collect::<Vec<_>>()
        };
        let some = Forgotten::of(&groups(most));
        assert_eq!((some.containers, some.interfaces), (most, 0));
        assert!(!some.is_too_much(1) && some.is_too_much(0));
        assert!(Forgotten::of(&groups(most + 1)).is_too_much(1));
        let links = (0..=most).map(|number| format!("{INTERFACE}veth{number} of node 0"));
        assert!(Forgotten::of(&links.collect::<Vec<_>>()).is_too_much(1));
        assert!(!Forgotten::of(&[]).is_too_much(0));
    }
}
