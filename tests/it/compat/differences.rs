//! What differs on purpose, with the reason. `docs/from-docker-driver.md` has the same rows.

/// Fields of jobs, and why they differ.
pub(super) struct Difference {
    /// `JOB.FIELD`; `*` stands for any job or task.
    pub(super) field: &'static str,
    pub(super) reason: &'static str,
}

impl Difference {
    pub(super) fn covers(&self, place: &str) -> bool {
        wildmatch::WildMatch::new(self.field).matches(place)
    }
}

const SIGNAL: &str = "the command is not process 1, so that SIGTERM ends it at once; with Nomad's Docker driver it ends at the kill timeout if it does not handle SIGTERM";

pub(super) const DIFFERENCES: &[Difference] = &[
    Difference {
        field: "exec.CpuStats",
        reason: "more is measured",
    },
    Difference {
        field: "exec.open.ends",
        reason: SIGNAL,
    },
    Difference {
        field: "memory.memory.ends",
        reason: "the signal is told",
    },
    Difference {
        field: "memory.memory.said",
        reason: "an event tells how many processes the kernel killed",
    },
    Difference {
        field: "old-port.old.said",
        reason: "an event tells of the older form",
    },
    Difference {
        field: "s6.s6.said",
        reason: "an event tells that the image's program is process 1",
    },
    Difference {
        field: "sidecar.front.ends",
        reason: SIGNAL,
    },
    Difference {
        field: "signal.signal.ends",
        reason: SIGNAL,
    },
    Difference {
        field: "static-port.fixed.ends",
        reason: SIGNAL,
    },
    Difference {
        field: "system.agent.ends",
        reason: SIGNAL,
    },
    Difference {
        field: "web.web.ends",
        reason: SIGNAL,
    },
];
