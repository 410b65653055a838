//! Usage samples of a slot: the sum of its containers, read from cgroup files.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use futures_util::Stream;
use polydev_proto::driver::{
    CpuUsage, MemoryUsage, TaskResourceUsage, TaskStats, TaskStatsResponse, cpu_usage, memory_usage,
};
use tokio::time::{MissedTickBehavior, interval};
use tonic::Status;

use crate::{limits::Usage, slot::Slot};

/// One sample each interval until the slot has ended.
pub(super) fn samples(
    slot: Arc<Slot>,
    every: Option<prost_types::Duration>,
) -> impl Stream<Item = Result<TaskStatsResponse, Status>> {
    let every = every.and_then(|every| Duration::try_from(every).ok());
    let every = every
        .filter(|every| !every.is_zero())
        .unwrap_or(Duration::from_secs(1));
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let last = (Instant::now(), slot.usage());
    futures_util::stream::unfold((slot, ticks, last), |(slot, mut ticks, last)| async move {
        ticks.tick().await;
        if slot.end().is_some() {
            return None;
        }
        let now = (Instant::now(), slot.usage());
        let sample = encode(&slot.identity.task_id, last, now);
        Some((
            Ok(TaskStatsResponse {
                stats: Some(sample),
            }),
            (slot, ticks, now),
        ))
    })
}

fn encode(task_id: &str, last: (Instant, Usage), now: (Instant, Usage)) -> TaskStats {
    let usage = now.1;
    let wall = (now.0 - last.0).as_secs_f64().max(f64::EPSILON);
    // One full core is 100.
    let percent = usage.cpu.saturating_sub(last.1.cpu).as_secs_f64() / wall * 100.0;
    let cpu = CpuUsage {
        percent,
        throttled_periods: usage.throttled_periods,
        throttled_time: u64::try_from(usage.throttled.as_nanos()).unwrap_or(u64::MAX),
        measured_fields: vec![
            cpu_usage::Fields::Percent.into(),
            cpu_usage::Fields::ThrottledPeriods.into(),
            cpu_usage::Fields::ThrottledTime.into(),
        ],
        ..Default::default()
    };
    let memory = MemoryUsage {
        rss: usage.rss,
        cache: usage.cache,
        usage: usage.memory,
        measured_fields: vec![
            memory_usage::Fields::Rss.into(),
            memory_usage::Fields::Cache.into(),
            memory_usage::Fields::Usage.into(),
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
