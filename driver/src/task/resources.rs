//! CPU and memory of a plain task, calculated like in Nomad's Docker driver.

use polydev_proto::driver::{Resources as Given, TaskConfig};

use crate::{config::Task, docker::Resources};

/// The shares that the kernel accepts in `cpu.shares` of cgroup v1.
const SHARES: (i64, i64) = (2, 262_144);
const MIB: i64 = 1 << 20;

/// Why the resources are not valid.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("the task has no `resources`")]
    Missing,
    #[error(
        "`memory_hard_limit` is {hard} MiB; must be at least the {reserved} MiB of `resources {{ memory }}`"
    )]
    ReservedAboveLimit { hard: i64, reserved: i64 },
}

/// The values for Docker. `compute` is the node's CPU in MHz, all cores together.
pub(super) fn resources(
    task: &TaskConfig,
    options: &Task,
    compute: i64,
    cores: i64,
) -> Result<Resources, Error> {
    let given = task.resources.as_ref().ok_or(Error::Missing)?;
    let linux = given.linux_resources.as_ref().ok_or(Error::Missing)?;
    let (hard, reserved) = memory(given, options.memory_hard_limit.into())?;
    let period = i64::try_from(options.cpu_cfs_period.as_micros()).unwrap_or(i64::MAX);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_precision_loss,
        reason = "a part of a node's time in a period of at most a second"
    )]
    let quota = (linux.percent_ticks * period as f64) as i64 * cores;
    Ok(Resources {
        cpu_shares: shares(linux.cpu_shares, compute),
        cpu_period: period,
        // The kernel does not accept a quota below a millisecond.
        cpu_quota: if options.cpu_hard_limit {
            quota.max(1000)
        } else {
            0
        },
        cpuset: linux.cpuset_cpus.clone(),
        memory: hard * MIB,
        memory_reservation: reserved * MIB,
    })
}

/// One share per MHz, scaled down if the node has more MHz than the kernel has shares
/// (C076).
fn shares(mhz: i64, compute: i64) -> i64 {
    let scaled = if compute > SHARES.1 {
        let scaled = i128::from(mhz) * i128::from(SHARES.1) / i128::from(compute);
        i64::try_from(scaled).unwrap_or(SHARES.1)
    } else {
        mhz
    };
    scaled.clamp(SHARES.0, SHARES.1)
}

/// Limit and reservation in MiB, 0 for none (C073). A `memory_max` of -1 means no limit.
fn memory(given: &Given, driver: i64) -> Result<(i64, i64), Error> {
    let memory = given
        .allocated_resources
        .as_ref()
        .and_then(|given| given.memory.as_ref());
    let memory = memory.ok_or(Error::Missing)?;
    let (request, most) = (memory.memory_mb, memory.memory_max_mb);
    let hard = if most < 0 { 0 } else { most.max(driver) };
    let (hard, reserved) = match (most < 0, hard) {
        (true, _) => (0, request),
        (false, 0) => (request, 0),
        (false, hard) => (hard, request),
    };
    if hard > 0 && reserved > hard {
        return Err(Error::ReservedAboveLimit { hard, reserved });
    }
    Ok((hard, reserved))
}

#[cfg(test)]
mod tests {
    use super::*;
    use polydev_proto::driver::{AllocatedMemoryResources, AllocatedTaskResources, LinuxResources};
    use std::time::Duration;

    fn task(request: i64, most: i64) -> TaskConfig {
        TaskConfig {
            resources: Some(Given {
                allocated_resources: Some(AllocatedTaskResources {
                    memory: Some(AllocatedMemoryResources {
                        memory_mb: request,
                        memory_max_mb: most,
                    }),
                    ..Default::default()
                }),
                linux_resources: Some(LinuxResources {
                    cpu_shares: 500,
                    percent_ticks: 0.125,
                    cpuset_cpus: "0,2".into(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    /// C073; rows with an unlimited `memory_max` keep the request as reservation.
    #[test]
    fn memory_is_limited_by_the_larger_of_both_limits() {
        for (request, most, driver, hard, reserved) in [
            (10, 0, 0, 10, 0),
            (10, 0, 20, 20, 10),
            (10, 20, 20, 20, 10),
            (10, 20, 30, 30, 10),
            (10, 30, 20, 30, 10),
            (10, -1, 20, 0, 10),
            (0, 0, 0, 0, 0),
            (0, 0, 20, 20, 0),
            (0, 30, 0, 30, 0),
            (0, 30, 20, 30, 0),
            (0, -1, 0, 0, 0),
            (0, -1, 50, 0, 0),
        ] {
            let given = task(request, most).resources.unwrap();
            assert_eq!(
                memory(&given, driver),
                Ok((hard, reserved)),
                "{request} {most} {driver}"
            );
        }
        let refused = memory(&task(17, 0).resources.unwrap(), 6);
        assert_eq!(
            refused,
            Err(Error::ReservedAboveLimit {
                hard: 6,
                reserved: 17
            })
        );
    }

    /// C076.
    #[test]
    fn shares_are_mhz_unless_the_node_has_more_than_there_are_shares() {
        let most = SHARES.1;
        for (compute, mhz, expected) in [
            (12_000, most, most),
            (12_000, 1000, 1000),
            (most + 1, most, most - 1),
            (most + 1, 2, 2),
            (most + 1, 1, 2),
            (2 * most, 1000, 500),
            (2 * most, most, most / 2),
        ] {
            assert_eq!(shares(mhz, compute), expected, "{mhz} of {compute}");
        }
    }

    /// C071, C074, C075.
    #[test]
    fn a_hard_limit_is_the_tasks_part_of_the_node() {
        let options = Task {
            cpu_hard_limit: true,
            cpu_cfs_period: Duration::from_millis(100),
            ..Default::default()
        };
        let given = resources(&task(10, 0), &options, 8000, 4).unwrap();
        assert_eq!((given.cpu_period, given.cpu_quota), (100_000, 50_000));
        assert_eq!((given.cpu_shares, &*given.cpuset), (500, "0,2"));
        let soft = Task {
            cpu_hard_limit: false,
            ..options
        };
        assert_eq!(
            resources(&task(10, 0), &soft, 8000, 4).unwrap().cpu_quota,
            0
        );
    }
}
