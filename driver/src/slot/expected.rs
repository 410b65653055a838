//! The one run that a slot on demand expects.

use std::time::{Duration, Instant};

use tokio::time::sleep;

use super::{Slot, Slots};

/// How long a slot on demand waits for its run.
const RUN_TIMEOUT: Duration = Duration::from_secs(60);
/// How often to check whether that run has found another slot.
const RUN_INTERVAL: Duration = Duration::from_secs(1);

/// Waits until it is clear that the run of a slot on demand will not come; returns the
/// reason.
pub(super) async fn not_needed(slots: &Slots, slot: &Slot) -> String {
    let Some(run_id) = slot.config.run_id else {
        return std::future::pending().await;
    };
    let begun = Instant::now();
    while begun.elapsed() < RUN_TIMEOUT {
        if slots.runs.has_run(run_id) && !slot.is_claimed() {
            return "Its run found another slot".into();
        }
        sleep(RUN_INTERVAL).await;
    }
    format!("Its run did not come within {} s", RUN_TIMEOUT.as_secs())
}
