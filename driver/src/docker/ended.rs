//! How a container ended that was still being started.

use std::time::Duration;

use tokio::time::sleep;

use super::{Docker, Error, State};

/// How often to check whether a container has ended.
const STATE_INTERVAL: Duration = Duration::from_millis(500);

/// A container's init ended before it was ready.
#[derive(Debug, thiserror::Error)]
#[error("init exited with status {exit_code} before it was ready: {words}")]
pub struct Ended {
    exit_code: i64,
    /// Its last lines of output.
    words: String,
}

impl Docker {
    /// Waits until a started container has ended. Looks for the first time after half a
    /// second, because most containers do not end.
    ///
    /// # Errors
    /// [`Error`] if dockerd does not say so.
    ///
    /// # Cancel safety
    /// Loses nothing.
    pub async fn ended(&self, id: &str) -> Result<Ended, Error> {
        loop {
            sleep(STATE_INTERVAL).await;
            let state = self.state(id).await?;
            if state.pid == 0 {
                return Ok(self.end(id, &state).await);
            }
        }
    }

    /// How a container ended that has this state.
    pub async fn end(&self, id: &str, state: &State) -> Ended {
        Ended {
            exit_code: state.exit_code,
            words: self.last_words(id).await,
        }
    }
}
