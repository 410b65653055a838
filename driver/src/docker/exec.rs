//! Runs another command in a running container.

use std::{pin::Pin, time::Duration};

use bollard::{
    container::LogOutput,
    exec::{CreateExecOptions, ResizeExecOptions, StartExecOptions, StartExecResults},
};
use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use tokio::{
    io::{AsyncWrite, AsyncWriteExt},
    time::timeout,
};

use super::{CALL_TIMEOUT, Docker, Error, within};

/// A piece of output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    Stdout(Bytes),
    Stderr(Bytes),
}

/// A started command.
#[derive(Debug, Clone)]
pub struct Exec {
    docker: Docker,
    id: String,
}

/// The command's output. Dropping it does not stop the command.
pub struct Output(Pin<Box<dyn Stream<Item = Result<LogOutput, bollard::errors::Error>> + Send>>);

/// The command's input.
pub struct Input(Pin<Box<dyn AsyncWrite + Send>>);

impl Docker {
    /// Starts `command` in a container.
    ///
    /// # Errors
    /// [`Error`] if the container is not running or does not have the program.
    pub async fn exec(
        &self,
        container: &str,
        command: Vec<String>,
        tty: bool,
    ) -> Result<(Exec, Output, Input), Error> {
        let options = CreateExecOptions {
            attach_stdin: Some(true),
            attach_stdout: Some(true),
            attach_stderr: Some(true),
            tty: Some(tty),
            cmd: Some(command),
            ..Default::default()
        };
        let operation = || format!("exec in container `{container}`");
        let created = within(
            CALL_TIMEOUT,
            operation(),
            self.api()?.create_exec(container, options),
        )
        .await?;
        let options = StartExecOptions {
            tty,
            output_capacity: Some(64 << 10),
            ..Default::default()
        };
        let start = self.api()?.start_exec(&created.id, Some(options));
        match within(CALL_TIMEOUT, operation(), start).await? {
            StartExecResults::Attached { output, input } => {
                let (docker, id) = (self.clone(), created.id);
                Ok((Exec { docker, id }, Output(output), Input(input)))
            }
            StartExecResults::Detached => unreachable!("`detach` was not requested"),
        }
    }
}

impl Output {
    /// The next output; `None` at the end.
    ///
    /// # Errors
    /// [`Error`] if the connection to dockerd breaks.
    ///
    /// # Cancel safety
    /// Loses nothing.
    pub async fn next(&mut self) -> Option<Result<Piece, Error>> {
        let piece = self.0.next().await?;
        Some(match piece {
            Ok(LogOutput::StdErr { message }) => Ok(Piece::Stderr(message)),
            Ok(output) => Ok(Piece::Stdout(output.into_bytes())),
            Err(source) => Err(Error::Call {
                operation: "read the output of an exec".into(),
                source,
            }),
        })
    }
}

impl Input {
    /// Writes to the command's stdin; false once the command no longer reads.
    pub async fn write(&mut self, data: &[u8]) -> bool {
        // A command that reads slowly is waited for; only its caller may end it.
        self.0.write_all(data).await.is_ok() && self.0.flush().await.is_ok()
    }

    /// Closes the command's stdin.
    pub async fn close(&mut self) {
        let _gone = timeout(CALL_TIMEOUT, self.0.shutdown()).await;
    }
}

impl Exec {
    /// Resizes the terminal; does nothing if the command has not started or has ended.
    pub async fn resize(&self, height: u16, width: u16) {
        let options = ResizeExecOptions { height, width };
        for _ in 0..20 {
            let Ok(api) = self.docker.api() else { return };
            let resize = api.resize_exec(&self.id, options);
            match within(CALL_TIMEOUT, "resize a terminal", resize).await {
                // The first size may arrive before the process exists.
                Err(_) if matches!(self.exit_code().await, Ok(None)) => {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                _ => return,
            }
        }
    }

    /// The command's exit code; `None` while it runs.
    ///
    /// # Errors
    /// [`Error`]
    pub async fn exit_code(&self) -> Result<Option<i64>, Error> {
        let inspect = self.docker.api()?.inspect_exec(&self.id);
        let exec = within(CALL_TIMEOUT, "inspect an exec", inspect).await?;
        let code = exec.exit_code.filter(|_| exec.running == Some(false));
        Ok(code)
    }

    /// The process on the host, for killing it when nobody waits for it any longer.
    pub async fn pid(&self) -> Option<u32> {
        let inspect = self.docker.api().ok()?.inspect_exec(&self.id);
        let exec = within(CALL_TIMEOUT, "inspect an exec", inspect)
            .await
            .ok()?;
        let pid = exec.pid.filter(|_| exec.running == Some(true))?;
        u32::try_from(pid).ok().filter(|pid| *pid > 0)
    }
}
