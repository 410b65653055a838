//! The cgroup files of one container, for versions 1 and 2.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::Duration,
};

use procfs::process::Process;

use super::{CPU_PERIOD, Error, Limits};

/// A container's usage, from its cgroup.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Usage {
    /// CPU time since the container started.
    pub cpu: Duration,
    pub cpu_user: Duration,
    pub cpu_system: Duration,
    pub throttled_periods: u64,
    pub throttled: Duration,
    /// Bytes of anonymous memory.
    pub rss: u64,
    /// Bytes of page cache.
    pub cache: u64,
    /// Bytes swapped out.
    pub swap: u64,
    /// Bytes counted against the limit, now and at the peak.
    pub memory: u64,
    pub memory_max: u64,
}

/// 2 if the memory controller is in the unified hierarchy, else 1.
#[must_use]
pub fn version() -> u8 {
    let controllers = std::fs::read_to_string("/sys/fs/cgroup/cgroup.controllers");
    let unified =
        controllers.is_ok_and(|list| list.split_whitespace().any(|name| name == "memory"));
    if unified { 2 } else { 1 }
}

/// Open files of one container; which ones depends on the cgroup version. They stay open
/// because opening a file takes longer than reading it.
#[derive(Debug)]
pub(super) struct Cgroup {
    limits: Files,
    figures: Figures,
}

#[derive(Debug)]
enum Files {
    V1 {
        cpu: File,
        memory: File,
        swap: Option<File>,
        pids: File,
    },
    V2 {
        cpu: File,
        memory: File,
        pids: File,
    },
}

/// The files that report usage.
#[derive(Debug)]
struct Figures {
    /// `cpu.stat`
    cpu: File,
    /// Version 1 only: `cpuacct.usage` and `cpuacct.usage_all`.
    cpuacct: Option<[File; 2]>,
    /// `memory.stat`
    memory: File,
    memory_now: File,
    /// Missing in kernels that are older than this file.
    memory_most: Option<File>,
    /// Version 2 only, if the kernel accounts for swap.
    swap: Option<File>,
    oom: File,
}

impl Cgroup {
    pub(super) fn open(pid: u32) -> Result<Self, Error> {
        let locate = |source| Error::Locate { pid, source };
        let process = Process::new(pid.cast_signed()).map_err(locate)?;
        let groups = process.cgroups().map_err(locate)?.0;
        let mounts = Process::myself()
            .and_then(|me| me.mountinfo())
            .map_err(locate)?
            .0;

        let folder = |controller: &'static str| -> Result<PathBuf, Error> {
            let missing = || Error::NoController { pid, controller };
            let v1 = |group: &&procfs::ProcessCGroup| {
                group.controllers.iter().any(|name| name == controller)
            };
            let unified = |group: &&procfs::ProcessCGroup| group.hierarchy == 0;
            let group = groups
                .iter()
                .find(v1)
                .or_else(|| groups.iter().find(unified));
            let group = group.ok_or_else(missing)?;
            let mount = mounts.iter().find(|mount| {
                if group.hierarchy == 0 {
                    mount.fs_type == "cgroup2"
                } else {
                    mount.fs_type == "cgroup" && mount.super_options.contains_key(controller)
                }
            });
            let mount = mount.ok_or_else(missing)?;
            // The mount may show only part of the hierarchy, as in a nested engine.
            let path = Path::new(&group.pathname);
            let below = path.strip_prefix(&mount.root).unwrap_or(path);
            Ok(mount
                .mount_point
                .join(below.strip_prefix("/").unwrap_or(below)))
        };

        let (memory, cpu, pids) = (folder("memory")?, folder("cpu")?, folder("pids")?);
        if memory.join("memory.max").exists() {
            let limit = open(memory.join("memory.max"))?;
            without_swap(&memory, &limit)?;
            return Ok(Self {
                limits: Files::V2 {
                    cpu: open(cpu.join("cpu.max"))?,
                    memory: limit,
                    pids: open(pids.join("pids.max"))?,
                },
                figures: Figures {
                    cpu: read_only(cpu.join("cpu.stat"))?,
                    cpuacct: None,
                    memory: read_only(memory.join("memory.stat"))?,
                    memory_now: read_only(memory.join("memory.current"))?,
                    memory_most: if_there(memory.join("memory.peak"), read_only)?,
                    swap: if_there(memory.join("memory.swap.current"), read_only)?,
                    oom: read_only(memory.join("memory.events"))?,
                },
            });
        }
        let cpuacct = folder("cpuacct")?;
        Ok(Self {
            limits: Files::V1 {
                cpu: open(cpu.join("cpu.cfs_quota_us"))?,
                memory: open(memory.join("memory.limit_in_bytes"))?,
                // Missing if the kernel does not account for swap.
                swap: if_there(memory.join("memory.memsw.limit_in_bytes"), open)?,
                pids: open(pids.join("pids.max"))?,
            },
            figures: Figures {
                cpu: read_only(cpu.join("cpu.stat"))?,
                cpuacct: Some([
                    read_only(cpuacct.join("cpuacct.usage"))?,
                    read_only(cpuacct.join("cpuacct.usage_all"))?,
                ]),
                memory: read_only(memory.join("memory.stat"))?,
                memory_now: read_only(memory.join("memory.usage_in_bytes"))?,
                memory_most: Some(read_only(memory.join("memory.max_usage_in_bytes"))?),
                swap: None,
                oom: read_only(memory.join("memory.oom_control"))?,
            },
        })
    }

    pub(super) fn set_cpu(&self, limits: &Limits) -> Result<(), Error> {
        let quota = limits.cpu_quota().as_micros();
        match &self.limits {
            Files::V1 { cpu, .. } => write(cpu, "cpu.cfs_quota_us", quota),
            Files::V2 { cpu, .. } => {
                let quota = format!("{quota} {}", CPU_PERIOD.as_micros());
                write(cpu, "cpu.max", quota)
            }
        }
    }

    pub(super) fn set(&self, limits: &Limits) -> Result<(), Error> {
        self.set_cpu(limits)?;
        let memory = limits.memory_bytes();
        match &self.limits {
            Files::V1 {
                memory: limit,
                swap,
                pids,
                ..
            } => {
                let alone = || write(limit, "memory.limit_in_bytes", memory);
                match swap {
                    // The limit for memory with swap may never be below the one for memory alone.
                    Some(swap) => {
                        let with_swap = || write(swap, "memory.memsw.limit_in_bytes", memory);
                        if memory < number(limit) {
                            alone().and_then(|()| with_swap())?;
                        } else {
                            with_swap().and_then(|()| alone())?;
                        }
                    }
                    None => alone()?,
                }
                write(pids, "pids.max", limits.pids)
            }
            Files::V2 {
                memory: limit,
                pids,
                ..
            } => {
                write(limit, "memory.max", memory)?;
                write(pids, "pids.max", limits.pids)
            }
        }
    }

    pub(super) fn oom_kills(&self) -> u64 {
        field(&read(&self.figures.oom), "oom_kill")
    }

    pub(super) fn usage(&self) -> Usage {
        let Figures {
            cpu,
            cpuacct,
            memory,
            memory_now,
            memory_most,
            swap,
            ..
        } = &self.figures;
        let throttling = read(cpu);
        // The most expensive read of all: the kernel adds up the whole group.
        let stat = read(memory);
        let usage = Usage {
            throttled_periods: field(&throttling, "nr_throttled"),
            memory: number(memory_now),
            memory_max: memory_most.as_ref().map(number).unwrap_or_default(),
            ..Usage::default()
        };
        match cpuacct {
            Some([total, by_cpu]) => {
                let [user, system] = user_and_system(&read(by_cpu));
                Usage {
                    // Exact; the table has only what the kernel sampled at clock ticks.
                    cpu: Duration::from_nanos(number(total)),
                    cpu_user: user,
                    cpu_system: system,
                    throttled: Duration::from_nanos(field(&throttling, "throttled_time")),
                    rss: field(&stat, "total_rss"),
                    cache: field(&stat, "total_cache"),
                    swap: field(&stat, "total_swap"),
                    ..usage
                }
            }
            None => Usage {
                cpu: Duration::from_micros(field(&throttling, "usage_usec")),
                cpu_user: Duration::from_micros(field(&throttling, "user_usec")),
                cpu_system: Duration::from_micros(field(&throttling, "system_usec")),
                throttled: Duration::from_micros(field(&throttling, "throttled_usec")),
                rss: field(&stat, "anon"),
                cache: field(&stat, "file"),
                swap: swap.as_ref().map(number).unwrap_or_default(),
                ..usage
            },
        }
    }
}

/// A memory limit is one without swap. If dockerd is in the root group of version 2, where the
/// kernel has no file for swap, it takes the kernel for one that cannot limit it, and leaves the
/// limit out (Docker 26.1.5).
fn without_swap(folder: &Path, limit: &File) -> Result<(), Error> {
    const SWAP: &str = "memory.swap.max";
    let swap = if_there(folder.join(SWAP), open)?;
    match swap.filter(|_| read(limit).trim() != "max") {
        Some(swap) => write(&swap, SWAP, 0),
        None => Ok(()),
    }
}

fn open(path: PathBuf) -> Result<File, Error> {
    let opened = OpenOptions::new().read(true).write(true).open(&path);
    opened.map_err(|source| Error::Open { path, source })
}

fn read_only(path: PathBuf) -> Result<File, Error> {
    File::open(&path).map_err(|source| Error::Open { path, source })
}

/// Opens a file that not every kernel has.
fn if_there(
    path: PathBuf,
    open: impl FnOnce(PathBuf) -> Result<File, Error>,
) -> Result<Option<File>, Error> {
    match open(path) {
        Err(Error::Open { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        opened => opened.map(Some),
    }
}

fn write(file: &File, name: &'static str, value: impl ToString) -> Result<(), Error> {
    let value = value.to_string();
    file.write_all_at(value.as_bytes(), 0)
        .map_err(|source| Error::Write {
            file: name,
            value,
            source,
        })
}

/// The current text of a file; empty once the container is gone. The kernel returns such a
/// file in one read if the buffer is large enough.
fn read(file: &File) -> String {
    let mut text = vec![0; 16 << 10];
    let length = file.read_at(&mut text, 0).unwrap_or(0);
    text.truncate(length);
    String::from_utf8(text).unwrap_or_default()
}

/// The number in a file; 0 once the container is gone.
fn number(file: &File) -> u64 {
    read(file).trim().parse().unwrap_or(0)
}

/// The number after `key`, in lines of the form `key number`; 0 if missing.
fn field(text: &str, key: &str) -> u64 {
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
    value
        .and_then(|value| value.trim().parse().ok())
        .unwrap_or(0)
}

/// Sums over a table of nanoseconds: a heading, then `cpu user system` for each CPU.
fn user_and_system(table: &str) -> [Duration; 2] {
    let mut sums = [Duration::ZERO; 2];
    for row in table.lines().skip(1) {
        for (sum, column) in sums.iter_mut().zip(row.split_whitespace().skip(1)) {
            *sum += Duration::from_nanos(column.parse().unwrap_or(0));
        }
    }
    sums
}
