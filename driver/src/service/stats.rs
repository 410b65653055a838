//! Usage samples from cgroup files, for a task or for all containers of a slot.

use std::time::{Duration, Instant, SystemTime};

use futures_util::Stream;
use polydev_proto::driver::{
    CpuUsage, MemoryUsage, TaskResourceUsage, TaskStats, TaskStatsResponse, cpu_usage, memory_usage,
};
use tonic::Status;

use super::Work;
use crate::{limits::Usage, ticks::ticks};

/// Sends one sample per interval until the task ends; `mhz` is the speed of one core.
pub(super) fn samples(
    work: Work,
    mhz: f64,
    every: Option<prost_types::Duration>,
) -> impl Stream<Item = Result<TaskStatsResponse, Status>> {
    let every = every.and_then(|every| Duration::try_from(every).ok());
    let every = every
        .filter(|every| !every.is_zero())
        .unwrap_or(Duration::from_secs(1));
    let ticks = ticks(every);
    let last = (Instant::now(), work.usage());
    futures_util::stream::unfold(
        (work, ticks, last),
        move |(work, mut ticks, last)| async move {
            ticks.tick().await;
            if work.has_ended() {
                return None;
            }
            let now = (Instant::now(), work.usage());
            let sample = encode(work.task_id(), mhz, last, now);
            Some((
                Ok(TaskStatsResponse {
                    stats: Some(sample),
                }),
                (work, ticks, now),
            ))
        },
    )
}

fn encode(task_id: &str, mhz: f64, last: (Instant, Usage), now: (Instant, Usage)) -> TaskStats {
    let usage = now.1;
    let wall = (now.0 - last.0).as_secs_f64().max(f64::EPSILON);
    // One fully used core is 100 percent, and as many ticks as it has MHz.
    let part =
        |now: Duration, last: Duration| now.saturating_sub(last).as_secs_f64() / wall * 100.0;
    let percent = part(usage.cpu, last.1.cpu);
    let cpu = CpuUsage {
        percent,
        total_ticks: percent / 100.0 * mhz,
        user_mode: part(usage.cpu_user, last.1.cpu_user),
        system_mode: part(usage.cpu_system, last.1.cpu_system),
        throttled_periods: usage.throttled_periods,
        throttled_time: u64::try_from(usage.throttled.as_nanos()).unwrap_or(u64::MAX),
        measured_fields: vec![
            cpu_usage::Fields::Percent.into(),
            cpu_usage::Fields::TotalTicks.into(),
            cpu_usage::Fields::UserMode.into(),
            cpu_usage::Fields::SystemMode.into(),
            cpu_usage::Fields::ThrottledPeriods.into(),
            cpu_usage::Fields::ThrottledTime.into(),
        ],
    };
    let memory = MemoryUsage {
        rss: usage.rss,
        cache: usage.cache,
        swap: usage.swap,
        usage: usage.memory,
        max_usage: usage.memory_max,
        measured_fields: vec![
            memory_usage::Fields::Rss.into(),
            memory_usage::Fields::Cache.into(),
            memory_usage::Fields::Swap.into(),
            memory_usage::Fields::Usage.into(),
            memory_usage::Fields::MaxUsage.into(),
        ],
        ..Default::default()
    };
    TaskStats {
        id: task_id.to_owned(),
        timestamp: Some(SystemTime::now().into()),
        agg_resource_usage: Some(TaskResourceUsage {
            cpu: Some(cpu),
            memory: Some(memory),
        }),
        resource_usage_by_pid: Default::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_core_is_a_hundred_percent() {
        let begin = Instant::now();
        let cpu = |used: u64, seconds: u64| {
            let usage = |millis| Usage {
                cpu: Duration::from_millis(millis),
                cpu_user: Duration::from_millis(millis / 2),
                ..Usage::default()
            };
            let (last, now) = (usage(1000), usage(1000 + used));
            let later = begin + Duration::from_secs(seconds);
            let sample = encode("task", 2000.0, (begin, last), (later, now));
            let cpu = sample.agg_resource_usage.unwrap().cpu.unwrap();
            (cpu.percent, cpu.total_ticks, cpu.user_mode)
        };
        assert_eq!(cpu(1000, 1), (100.0, 2000.0, 50.0));
        assert_eq!(cpu(0, 1), (0.0, 0.0, 0.0));
        assert_eq!(cpu(4000, 2), (200.0, 4000.0, 100.0));
        // Two samples at the same moment: no use in no time.
        assert_eq!(cpu(0, 0).0, 0.0);
    }
}
