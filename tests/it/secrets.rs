//! A search for a key in every place where the key must not be. A test plants a key in each of
//! the places, and shows that the search finds it.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use nix::unistd::Pid;
use polydev_tests::{docker, nomad::Nomad, process::output, shim::Shim};
use procfs::process::MMPermissions;

/// What others could see of running containers and processes, at several moments.
#[derive(Default)]
pub(crate) struct Seen {
    /// The name of the place, and its contents.
    places: Vec<(String, Vec<u8>)>,
    /// How often a process had the key in its environment. Only these moments count.
    pub(crate) alive: usize,
}

impl Seen {
    /// Records once what others can see of a run with `key` while it runs.
    pub(crate) fn look(&mut self, label: &str, key: &str) {
        for id in docker::containers(label) {
            let inspect = output(docker::command().args(["inspect", &id])).stdout;
            self.places
                .push((format!("docker inspect of a run {id}"), inspect));
            let logs = output(docker::command().args(["logs", &id]));
            self.places.push((
                format!("docker logs of a run {id}"),
                [logs.stdout, logs.stderr].concat(),
            ));
        }
        for process in processes() {
            let environ = fs::read(process.join("environ")).unwrap_or_default();
            self.alive += usize::from(contains(&environ, key.as_bytes()));
            let line = fs::read(process.join("cmdline")).unwrap_or_default();
            self.places
                .push((process.join("cmdline").display().to_string(), line));
        }
    }
}

fn processes() -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir("/proc")
        .expect("there is a /proc")
        .filter_map(Result::ok);
    let numeric = |entry: &fs::DirEntry| {
        entry
            .file_name()
            .to_string_lossy()
            .bytes()
            .all(|byte| byte.is_ascii_digit())
    };
    entries.filter(numeric).map(|entry| entry.path())
}

/// The names of the places that contain `key` as plain text, base64 at any alignment, or hex.
pub(crate) fn find(key: &str, nomad: &Nomad, shim: &Shim, seen: &Seen) -> Vec<String> {
    let needles = needles(key);
    let mut places = Vec::new();
    let mut look = |place: String, bytes: &[u8]| {
        if needles.iter().any(|needle| contains(bytes, needle)) {
            places.push(place);
        }
    };

    // The agent's data and configuration, the driver's state folder and Nomad's log.
    for file in files(nomad.folder()) {
        look(
            format!("file {}", file.display()),
            &fs::read(&file).unwrap_or_default(),
        );
    }
    look("the shim's log".into(), shim.process.log().as_bytes());

    for path in api_paths(nomad) {
        look(
            format!("Nomad's API {path}"),
            nomad.get(&path).to_string().as_bytes(),
        );
    }

    let ids = output(docker::command().args(["ps", "--all", "--quiet"])).stdout;
    for id in String::from_utf8_lossy(&ids).lines() {
        let inspect = output(docker::command().args(["inspect", id])).stdout;
        look(format!("docker inspect {id}"), &inspect);
        let logs = output(docker::command().args(["logs", id]));
        look(
            format!("docker logs {id}"),
            &[logs.stdout, logs.stderr].concat(),
        );
    }

    for (place, bytes) in &seen.places {
        look(place.clone(), bytes);
    }
    places
}

/// Whether the bytes contain `key` in any of its encodings.
pub(crate) fn holds(key: &str, bytes: &[u8]) -> bool {
    needles(key).iter().any(|needle| contains(bytes, needle))
}

/// Whether the written memory of a process contains `key` in any of its encodings.
pub(crate) fn is_in_memory(key: &str, pid: Pid) -> bool {
    memory_holds(key, pid).expect("a live process, which root may read")
}

/// The same, or `None` for a process that has ended.
pub(crate) fn memory_holds(key: &str, pid: Pid) -> Option<bool> {
    let process = procfs::process::Process::new(pid.as_raw()).ok()?;
    let memory = process.mem().ok()?;
    let maps = process.maps().ok()?;
    let written = maps
        .into_iter()
        .filter(|map| map.perms.contains(MMPermissions::WRITE));
    let needles = needles(key);
    let pages = File::open(format!("/proc/{pid}/pagemap")).ok()?;
    let mut ranges = written.flat_map(|map| {
        // A runtime may reserve far more than it uses.
        let step = usize::try_from(RANGE).expect("it is 64-bit");
        (map.address.0..map.address.1)
            .step_by(step)
            .map(move |from| {
                let until = map.address.1.min(from + RANGE + OVERLAP);
                (from, until)
            })
    });
    // Memory that the process gives back during the read belongs to nobody.
    Some(ranges.any(|(from, until)| {
        if !is_used(&pages, from, until) {
            return false;
        }
        let mut bytes = vec![0; usize::try_from(until - from).expect("it is 64-bit")];
        let read = memory.read_at(&mut bytes, from).unwrap_or_default();
        needles
            .iter()
            .any(|needle| contains(&bytes[..read], needle))
    }))
}

/// How much of a process's memory is read at once.
const RANGE: u64 = 4 << 20;
/// More than any key has, for one that lies in two ranges.
const OVERLAP: u64 = 4096;

/// Whether any page of the range is in memory or swapped out
/// (Documentation/admin-guide/mm/pagemap.rst).
fn is_used(pages: &File, from: u64, until: u64) -> bool {
    const PAGE: u64 = 4096;
    const PRESENT_OR_SWAPPED: u8 = 0b1100_0000;
    let count = usize::try_from((until - from).div_ceil(PAGE)).expect("it is small");
    let mut entries = vec![0; count * 8];
    let read = pages
        .read_at(&mut entries, from / PAGE * 8)
        .unwrap_or_default();
    // The two highest bits of each number, which is in this machine's order.
    let mut highest = entries[..read].iter().skip(7).step_by(8);
    highest.any(|byte| byte & PRESENT_OR_SWAPPED != 0)
}

/// The API's answers about jobs, allocations, evaluations, variables, nodes and events.
fn api_paths(nomad: &Nomad) -> Vec<String> {
    let mut paths: Vec<String> = [
        "/v1/jobs?meta=true",
        "/v1/allocations?resources=true",
        "/v1/evaluations",
        "/v1/deployments",
        "/v1/nodes?resources=true",
        "/v1/vars",
        "/v1/metrics",
        "/v1/agent/self",
    ]
    .map(str::to_owned)
    .into();
    let mut each = |list: &str, field: &str, prefix: &str| {
        let list = nomad.get(list);
        for item in list.as_array().into_iter().flatten() {
            if let Some(id) = item[field].as_str() {
                paths.push(format!("{prefix}/{id}"));
            }
        }
    };
    each("/v1/jobs", "ID", "/v1/job");
    each("/v1/allocations", "ID", "/v1/allocation");
    each("/v1/nodes", "ID", "/v1/node");
    each("/v1/vars", "Path", "/v1/var");
    paths
}

pub(crate) fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .filter_map(Result::ok);
    entries
        .flat_map(|entry| match entry.file_type() {
            Ok(kind) if kind.is_dir() => files(&entry.path()),
            Ok(kind) if kind.is_file() => vec![entry.path()],
            _ => vec![],
        })
        .collect()
}

/// The key as text, hex in upper and lower case, and base64 at each of the three alignments. The
/// base64 lacks the ends that depend on the neighbouring bytes.
fn needles(key: &str) -> Vec<Vec<u8>> {
    let hex = hex::encode(key);
    let mut needles = vec![key.to_owned(), hex.to_uppercase(), hex];
    for shift in 0..3 {
        let padded = [&vec![0; shift][..], key.as_bytes()].concat();
        let whole = &padded[..padded.len() / 3 * 3];
        needles.push(BASE64_STANDARD.encode(whole)[4 * usize::from(shift > 0)..].to_owned());
    }
    needles.into_iter().map(String::into_bytes).collect()
}

fn contains(bytes: &[u8], needle: &[u8]) -> bool {
    memchr::memmem::find(bytes, needle).is_some()
}

#[test]
fn a_key_is_found_in_each_of_its_disguises() {
    let key = polydev_tests::fresh_key();
    let disguises = [
        key.clone(),
        hex::encode(&key),
        hex::encode(&key).to_uppercase(),
        BASE64_STANDARD.encode(&key),
        BASE64_STANDARD.encode(format!("a{key}")),
        BASE64_STANDARD.encode(format!("ab{key}c")),
    ];
    for disguise in disguises {
        let text = format!("before {disguise} after");
        assert!(
            needles(&key)
                .iter()
                .any(|needle| contains(text.as_bytes(), needle)),
            "{text}"
        );
    }
    assert!(
        !needles(&key)
            .iter()
            .any(|needle| contains(b"nothing of the kind", needle))
    );
}
