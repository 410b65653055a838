//! The cgroup files of one container, version 1 and 2.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read},
    os::{fd::OwnedFd, unix::fs::FileExt},
    path::{Path, PathBuf},
    time::Duration,
};

use procfs::process::Process;
use rustix::fs::{CWD, Mode, OFlags, openat};

use super::{CPU_PERIOD, Error, Limits};

/// What a container uses, from its cgroup.
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
    /// Bytes counted against the limit, and their most so far.
    pub memory: u64,
    pub memory_max: u64,
}

/// 2 where the memory controller is in the unified hierarchy, else 1.
#[must_use]
pub fn version() -> u8 {
    let controllers = std::fs::read_to_string("/sys/fs/cgroup/cgroup.controllers");
    let unified =
        controllers.is_ok_and(|list| list.split_whitespace().any(|name| name == "memory"));
    if unified { 2 } else { 1 }
}

/// Open files of one container. Which ones depends on the cgroup version.
#[derive(Debug)]
pub(super) struct Cgroup {
    files: Files,
    memory: Folder,
    cpu: Folder,
    cpuacct: Folder,
}

/// A folder of one controller, held open: its files are a step away.
#[derive(Debug)]
struct Folder(OwnedFd);

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
            // The mount may show only a part of the hierarchy, as in a nested engine.
            let path = Path::new(&group.pathname);
            let below = path.strip_prefix(&mount.root).unwrap_or(path);
            Ok(mount
                .mount_point
                .join(below.strip_prefix("/").unwrap_or(below)))
        };

        let (memory, cpu, pids) = (folder("memory")?, folder("cpu")?, folder("pids")?);
        let files = if memory.join("memory.max").exists() {
            Files::V2 {
                cpu: open(cpu.join("cpu.max"))?,
                memory: open(memory.join("memory.max"))?,
                pids: open(pids.join("pids.max"))?,
            }
        } else {
            // Absent where the kernel does not account for swap.
            let swap = memory.join("memory.memsw.limit_in_bytes");
            Files::V1 {
                cpu: open(cpu.join("cpu.cfs_quota_us"))?,
                memory: open(memory.join("memory.limit_in_bytes"))?,
                swap: swap.exists().then(|| open(swap)).transpose()?,
                pids: open(pids.join("pids.max"))?,
            }
        };
        let cpuacct = folder("cpuacct").unwrap_or_else(|_| cpu.clone());
        Ok(Self {
            files,
            memory: Folder::open(memory)?,
            cpu: Folder::open(cpu)?,
            cpuacct: Folder::open(cpuacct)?,
        })
    }

    pub(super) fn set(&self, limits: &Limits) -> Result<(), Error> {
        let quota = limits.cpu_quota().as_micros();
        let memory = limits.memory_bytes();
        match &self.files {
            Files::V1 {
                cpu,
                memory: limit,
                swap,
                pids,
            } => {
                write(cpu, "cpu.cfs_quota_us", quota)?;
                let alone = || write(limit, "memory.limit_in_bytes", memory);
                match swap {
                    // Memory with swap may never be below memory alone.
                    Some(swap) => {
                        let with_swap = || write(swap, "memory.memsw.limit_in_bytes", memory);
                        if memory < self.memory.number("memory.limit_in_bytes") {
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
                cpu,
                memory: limit,
                pids,
            } => {
                write(
                    cpu,
                    "cpu.max",
                    format!("{quota} {}", CPU_PERIOD.as_micros()),
                )?;
                write(limit, "memory.max", memory)?;
                write(pids, "pids.max", limits.pids)
            }
        }
    }

    pub(super) fn oom_kills(&self) -> u64 {
        let file = match self.files {
            Files::V1 { .. } => "memory.oom_control",
            Files::V2 { .. } => "memory.events",
        };
        field(&self.memory.read(file), "oom_kill")
    }

    pub(super) fn usage(&self) -> Usage {
        let throttling = self.cpu.read("cpu.stat");
        let throttled_periods = field(&throttling, "nr_throttled");
        // The dearest of them all: the kernel adds up the whole group.
        let memory = self.memory.read("memory.stat");
        match self.files {
            Files::V1 { .. } => {
                let [user, system] = user_and_system(&self.cpuacct.read("cpuacct.usage_all"));
                Usage {
                    // Exact, where the table has what the clock's ticks happened to see.
                    cpu: Duration::from_nanos(self.cpuacct.number("cpuacct.usage")),
                    cpu_user: user,
                    cpu_system: system,
                    throttled_periods,
                    throttled: Duration::from_nanos(field(&throttling, "throttled_time")),
                    rss: field(&memory, "total_rss"),
                    cache: field(&memory, "total_cache"),
                    swap: field(&memory, "total_swap"),
                    memory: self.memory.number("memory.usage_in_bytes"),
                    memory_max: self.memory.number("memory.max_usage_in_bytes"),
                }
            }
            Files::V2 { .. } => Usage {
                cpu: Duration::from_micros(field(&throttling, "usage_usec")),
                cpu_user: Duration::from_micros(field(&throttling, "user_usec")),
                cpu_system: Duration::from_micros(field(&throttling, "system_usec")),
                throttled_periods,
                throttled: Duration::from_micros(field(&throttling, "throttled_usec")),
                rss: field(&memory, "anon"),
                cache: field(&memory, "file"),
                swap: self.memory.number("memory.swap.current"),
                memory: self.memory.number("memory.current"),
                memory_max: self.memory.number("memory.peak"),
            },
        }
    }
}

fn open(path: PathBuf) -> Result<File, Error> {
    OpenOptions::new()
        .write(true)
        .open(&path)
        .map_err(|source| Error::Open { path, source })
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

impl Folder {
    fn open(path: PathBuf) -> Result<Self, Error> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = openat(CWD, &path, flags, Mode::empty());
        opened.map(Self).map_err(|source| Error::Open {
            path,
            source: source.into(),
        })
    }

    /// A file's text, of a page or two; empty once the container is gone.
    fn read(&self, file: &str) -> String {
        let mut text = String::with_capacity(4096);
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let read = openat(&self.0, file, flags, Mode::empty())
            .map_err(io::Error::from)
            .and_then(|file| File::from(file).take(64 << 10).read_to_string(&mut text));
        if read.is_err() {
            text.clear();
        }
        text
    }

    /// The number in a file that holds one; 0 once the container is gone.
    fn number(&self, file: &str) -> u64 {
        self.read(file).trim().parse().unwrap_or(0)
    }
}

/// The number behind `key` in lines of `key number`; 0 if there is none.
fn field(text: &str, key: &str) -> u64 {
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
    value
        .and_then(|value| value.trim().parse().ok())
        .unwrap_or(0)
}

/// The sums of a table of nanoseconds: a heading, then `cpu user system` for each CPU.
fn user_and_system(table: &str) -> [Duration; 2] {
    let mut sums = [Duration::ZERO; 2];
    for row in table.lines().skip(1) {
        for (sum, column) in sums.iter_mut().zip(row.split_whitespace().skip(1)) {
            *sum += Duration::from_nanos(column.parse().unwrap_or(0));
        }
    }
    sums
}
