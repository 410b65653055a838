//! Removes a container even if Docker cannot do so immediately.

use std::time::Duration;

use polydev_transport::backoff::Backoff;
use tokio::time::sleep;

use super::Docker;

/// Most attempts to remove one container, over some minutes. The reaper removes what is
/// left then.
pub(crate) const MAX_ATTEMPTS: u32 = 20;
const FIRST_INTERVAL: Duration = Duration::from_millis(500);
const MAX_INTERVAL: Duration = Duration::from_secs(15);

/// Removes a container that is no longer needed. If Docker cannot, the driver tries again
/// in the background.
pub(crate) async fn remove(docker: &Docker, container: &str) {
    let Err(error) = docker.remove(container).await else {
        return;
    };
    tracing::warn!(
        container,
        error = crate::chain(&error),
        "cannot remove a container yet"
    );
    let (docker, container) = (docker.clone(), container.to_owned());
    tokio::spawn(async move {
        let mut backoff = Backoff::new(FIRST_INTERVAL, MAX_INTERVAL);
        for _ in 0..MAX_ATTEMPTS {
            sleep(backoff.next_wait()).await;
            if docker.remove(&container).await.is_ok() {
                return;
            }
        }
    });
}

/// Removes the container of this name if Docker creates it later: it was requested, but
/// Docker has not responded.
pub(crate) fn remove_if_made(docker: &Docker, name: &str) {
    let (docker, name) = (docker.clone(), name.to_owned());
    tokio::spawn(async move {
        let mut backoff = Backoff::new(FIRST_INTERVAL, MAX_INTERVAL);
        for _ in 0..MAX_ATTEMPTS {
            // A container that is missing now may be created later.
            let _done_or_not = docker.remove(&name).await;
            sleep(backoff.next_wait()).await;
        }
    });
}
