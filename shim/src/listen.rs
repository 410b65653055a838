//! Listens to what one driver reports, for as long as the driver is there.

use std::{convert::Infallible, future::pending, time::Duration};

use polydev_transport::backoff::Backoff;
use tokio::time::{Instant, sleep};
use tonic::{Code, Status};

/// How long a driver may take to accept the call.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The pause before the shim asks a driver again. Each try doubles the pause.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
const MAX_RETRY_INTERVAL: Duration = Duration::from_secs(30);

/// Listens again and again with `once`, which is given the pause after it. `what` names what the driver
/// reports.
pub async fn listen<F>(node_id: &str, what: &str, mut once: impl FnMut(Duration) -> F) -> Infallible
where
    F: Future<Output = Result<Infallible, Status>>,
{
    let mut retry = Backoff::new(RETRY_INTERVAL, MAX_RETRY_INTERVAL);
    loop {
        let begun = Instant::now();
        let wait = retry.next_wait();
        let Err(status) = once(wait).await;
        // This driver has an earlier version. A newer driver will have another connection.
        if status.code() == Code::Unimplemented {
            tracing::warn!(node_id, what, "the driver does not report this");
            return pending().await;
        }
        let reason = status.message();
        tracing::info!(node_id, what, reason, "asking the driver again");
        sleep(wait).await;
        if begun.elapsed() > 3 * MAX_RETRY_INTERVAL {
            retry.reset();
        }
    }
}
