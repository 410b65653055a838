//! What a container may use, and how the driver raises the limits of a running one.
//!
//! Docker sets the idle limits when it creates a container. At a claim the driver writes
//! the run limits directly to the cgroup files and token buckets, which a [`Handle`] holds
//! open since the fill. This takes microseconds and does not need dockerd.

mod cgroup;
mod frames;
mod traffic;

pub use cgroup::{Usage, version as cgroup_version};

use std::{sync::Arc, time::Duration};

/// The CFS period of every slot's container: Docker's default.
pub const CPU_PERIOD: Duration = Duration::from_millis(100);

/// A set of hard limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Limits {
    /// CPU time: 1,000 MHz stand for one core.
    pub cpu_mhz: u32,
    /// Memory in MiB, without additional swap.
    pub memory_mb: u32,
    /// Megabits (10^6 bits) per second, in each direction.
    pub mbits: u32,
    /// Processes and threads.
    pub pids: u32,
}

impl Limits {
    /// Bytes per second, in each direction.
    #[must_use]
    pub fn bytes_per_second(&self) -> u64 {
        u64::from(self.mbits) * 1_000_000 / 8
    }

    /// The default limits of a run, unless the plugin configuration sets others.
    pub const RUN: Self = Self {
        cpu_mhz: 500,
        memory_mb: 512,
        mbits: 10,
        pids: 256,
    };
    /// The same for a script: it computes, and has nothing to wait for.
    pub const SCRIPT: Self = Self {
        cpu_mhz: 2000,
        memory_mb: 2048,
        mbits: 10,
        pids: 256,
    };
    /// The limits of an idle slot; its CPU and memory come from the job.
    pub const IDLE: Self = Self {
        cpu_mhz: 100,
        memory_mb: 256,
        mbits: 5,
        pids: 64,
    };

    /// CPU time in each [`CPU_PERIOD`].
    #[must_use]
    pub fn cpu_quota(&self) -> Duration {
        CPU_PERIOD * self.cpu_mhz / 1000
    }

    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        u64::from(self.memory_mb) << 20
    }
}

/// Bandwidth of a container's interface; `None` is unlimited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct Rates {
    /// Megabits (10^6 bits) per second that the container may receive.
    pub ingress_mbits: Option<u32>,
    /// Megabits per second that the container may send.
    pub egress_mbits: Option<u32>,
    /// Bytes that pass at full speed after a pause.
    pub burst: u32,
}

/// The host's segmented packets have up to 64 KiB.
pub const BURST: u32 = 64 << 10;

impl Limits {
    fn rates(&self) -> Rates {
        Rates {
            ingress_mbits: Some(self.mbits),
            egress_mbits: Some(self.mbits),
            burst: BURST,
        }
    }
}

impl std::fmt::Display for Limits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            cpu_mhz,
            memory_mb,
            mbits,
            pids,
        } = self;
        write!(
            f,
            "{cpu_mhz} MHz, {memory_mb} MiB, {mbits} Mbit/s, {pids} pids"
        )
    }
}

/// Why limits could not be opened or set.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot find the cgroups of pid {pid}")]
    Locate { pid: u32, source: procfs::ProcError },
    #[error("pid {pid} has no `{controller}` cgroup")]
    NoController { pid: u32, controller: &'static str },
    #[error("cannot open `{path}`")]
    Open {
        path: std::path::PathBuf,
        source: std::io::Error,
    },
    #[error("cannot set `{file}` to `{value}`")]
    Write {
        file: &'static str,
        value: String,
        source: std::io::Error,
    },
    #[error("cannot enter the network of pid {pid}")]
    EnterNetwork { pid: u32, source: std::io::Error },
    #[error("the network of pid {pid} has no interface with a peer")]
    NoInterface { pid: u32 },
    #[error("cannot shape {direction} traffic")]
    Shape {
        direction: &'static str,
        source: std::io::Error,
    },
    #[error("cannot isolate the container's port of the bridge")]
    Isolate(#[source] std::io::Error),
}

/// The limits of one running container, open for writing.
#[derive(Debug)]
pub struct Handle {
    cgroup: cgroup::Cgroup,
    /// The rates that were set when it was opened.
    rates: Option<Rates>,
    /// `None` if the traffic is not shaped.
    traffic: Option<Arc<traffic::Shaper>>,
}

impl Handle {
    /// Opens the limits of the container whose first process is `pid`, and shapes its
    /// traffic to `limits`. CPU, memory and pids were set when it was created. Blocks for a
    /// few milliseconds.
    ///
    /// # Errors
    /// [`Error`]; the container must not be used then.
    pub fn open(pid: u32, limits: &Limits) -> Result<Self, Error> {
        Self::open_shaped(pid, Some(&limits.rates()))
    }

    /// Like [`Handle::open`], for a container that may have no network interface: then there is
    /// no traffic to shape.
    ///
    /// # Errors
    /// [`Error`]
    pub fn open_again(pid: u32, limits: &Limits) -> Result<Self, Error> {
        match Self::open(pid, limits) {
            Err(Error::NoInterface { .. }) => Self::open_shaped(pid, None),
            opened => opened,
        }
    }

    /// Like [`Handle::open`], for a container with `rates` or without a limit on its
    /// traffic.
    ///
    /// # Errors
    /// [`Error`]; the container must not be used then.
    pub fn open_shaped(pid: u32, rates: Option<&Rates>) -> Result<Self, Error> {
        let cgroup = cgroup::Cgroup::open(pid)?;
        let traffic = rates.map(|rates| {
            let traffic = traffic::Shaper::open(pid)?;
            traffic.shape(rates)?;
            Ok(Arc::new(traffic))
        });
        Ok(Self {
            cgroup,
            rates: rates.copied(),
            traffic: traffic.transpose()?,
        })
    }

    /// Keeps what the container sends from other isolated containers of its bridge, whatever the
    /// rules of the firewall are.
    ///
    /// # Errors
    /// [`Error`]; the container must not be used then.
    pub fn isolate(&self) -> Result<(), Error> {
        self.traffic
            .as_ref()
            .map_or(Ok(()), |traffic| traffic.isolate())
    }

    /// Raises or lowers CPU, memory and pids to `limits`. Takes tens of microseconds; only
    /// the kernel may block, to reclaim memory for a lower limit.
    ///
    /// # Errors
    /// [`Error`]; some limits may be set, and the container must not be used. With cgroup
    /// v1 the memory limit cannot go below current use; with v2 the kernel kills processes
    /// to do so.
    pub fn set(&self, limits: &Limits) -> Result<(), Error> {
        self.cgroup.set(limits)
    }

    /// Sets the CPU quota alone.
    ///
    /// # Errors
    /// [`Error`]
    pub fn set_cpu(&self, limits: &Limits) -> Result<(), Error> {
        self.cgroup.set_cpu(limits)
    }

    /// Whether the bandwidth of `limits` is lower than when it was opened.
    #[must_use]
    pub fn is_lowered_by(&self, limits: &Limits) -> bool {
        let set = self.rates.and_then(|rates| rates.ingress_mbits);
        self.traffic.is_some() && set.is_none_or(|mbits| limits.mbits < mbits)
    }

    /// Returns a function that sets the bandwidth to the one of `limits`. The function
    /// blocks while the kernel creates or removes a container's interfaces: tens of
    /// milliseconds on a busy node. If it fails, the container must not be used.
    #[must_use = "nothing is shaped until it is called"]
    pub fn shaping(
        &self,
        limits: &Limits,
    ) -> impl FnOnce() -> Result<(), Error> + Send + 'static + use<> {
        let (traffic, rates) = (self.traffic.clone(), limits.rates());
        move || match traffic {
            Some(traffic) => traffic.shape(&rates),
            None => Ok(()),
        }
    }

    /// How many processes the kernel has killed for lack of memory.
    #[must_use]
    pub fn oom_kills(&self) -> u64 {
        self.cgroup.oom_kills()
    }

    /// What the container uses now.
    #[must_use]
    pub fn usage(&self) -> Usage {
        self.cgroup.usage()
    }
}
