//! Container output that dockerd keeps, for tasks whose output goes through Docker.

use bollard::{container::LogOutput, query_parameters::LogsOptionsBuilder};
use futures_util::{Stream, StreamExt, TryStreamExt};

use super::{Docker, Error, PING_TIMEOUT, Piece, within};

impl Docker {
    /// The last lines of a container's process 1, for an error message.
    pub(super) async fn last_words(&self, id: &str) -> String {
        let options = LogsOptionsBuilder::new()
            .stdout(true)
            .stderr(true)
            .tail("5")
            .build();
        let Ok(api) = self.api() else {
            return String::new();
        };
        let lines = api
            .logs(id, Some(options))
            .take(16)
            .map_ok(|line| line.to_string());
        let lines = within(PING_TIMEOUT, "read logs", lines.try_collect::<String>()).await;
        lines.unwrap_or_default().trim().to_owned()
    }

    /// All output of a container from `since` (Unix seconds) on. With `follow` the stream
    /// continues until the container ends.
    ///
    /// # Errors
    /// [`Error`] if the connection fails; later errors are part of the stream.
    pub fn output(
        &self,
        id: &str,
        since: i32,
        follow: bool,
    ) -> Result<impl Stream<Item = Result<Piece, Error>> + Send + 'static, Error> {
        let options = LogsOptionsBuilder::new()
            .follow(follow)
            .stdout(true)
            .stderr(true)
            .since(since)
            .build();
        let id = id.to_owned();
        let pieces = self.api()?.logs(&id, Some(options));
        Ok(pieces.map(move |piece| match piece {
            Ok(LogOutput::StdErr { message }) => Ok(Piece::Stderr(message)),
            Ok(output) => Ok(Piece::Stdout(output.into_bytes())),
            Err(source) => Err(Error::Call {
                operation: format!("read the output of container `{id}`"),
                source,
            }),
        }))
    }
}
