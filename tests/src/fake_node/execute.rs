//! Executes the steps of a run. A run has no process, and its deadline has no effect.

use std::future::pending;

use polydev_proto::{
    init::{Artifact, Artifacts},
    node::{Ended, ended::Reason},
};

use super::{
    run::{Run, wire},
    script::{Step, steps},
};

/// The mode of every artifact.
const MODE: u32 = 0o644;

impl Run {
    /// Does the steps of the run's arguments, until the run ends.
    pub(super) async fn execute(&self) {
        let ended = tokio::select! {
            ended = self.perform() => ended,
            () = self.until(|progress| progress.cancelled.is_some()) => self.cancelled(),
            () = self.until(|progress| progress.given_up) => return,
        };
        let after = wire(self.arrived.elapsed());
        self.progress.send_modify(|progress| {
            let [stdout, stderr, artifacts] = &progress.output;
            progress.ended = Some(Ended {
                after,
                first_output_after: progress.first_output_after.and_then(wire),
                stdout_bytes: stdout.len() as u64,
                stderr_bytes: stderr.len() as u64,
                artifact_bytes: artifacts.len() as u64,
                ..ended
            });
        });
        self.step();
    }

    async fn perform(&self) -> Ended {
        let files = self.files_bytes();
        self.until(|progress| progress.input.len() as u64 >= files)
            .await;
        let argv = self.claim.spec.as_ref().map(|spec| &*spec.argv);
        let Some(steps) = argv.and_then(steps) else {
            return Ended {
                reason: Reason::NotStarted.into(),
                exit_code: 127,
                message: "the program is missing".into(),
                ..Ended::default()
            };
        };
        let after = self.arrived.elapsed();
        self.progress
            .send_modify(|progress| progress.started_after = Some(after));
        self.step();
        let mut exit_code = 0;
        for step in steps {
            match step {
                Step::Stdout(text) => self.print(0, &text),
                Step::Stderr(text) => self.print(1, &text),
                Step::Files => {
                    let files = usize::try_from(files).unwrap_or(usize::MAX);
                    let text = self.read();
                    self.print(0, &text[..files.min(text.len())]);
                }
                Step::Cat => self.cat().await,
                Step::Artifact { path, content } => self.leave(path, &content),
                Step::Wait => pending().await,
                Step::Exit(status) => exit_code = status,
            }
        }
        self.send_artifacts();
        Ended {
            reason: Reason::Exited.into(),
            exit_code,
            ..Ended::default()
        }
    }

    fn cancelled(&self) -> Ended {
        let reason = self.progress.borrow().cancelled.clone();
        let message = match reason.unwrap_or_default() {
            reason if reason.is_empty() => "it was cancelled".to_owned(),
            reason => format!("it was cancelled: {reason}"),
        };
        Ended {
            reason: Reason::Cancelled.into(),
            exit_code: 143,
            signal: 15,
            message,
            ..Ended::default()
        }
    }

    fn print(&self, stream: usize, text: &[u8]) {
        let after = self.arrived.elapsed();
        self.progress.send_modify(|progress| {
            progress.output[stream].extend_from_slice(text);
            progress.first_output_after.get_or_insert(after);
        });
    }

    /// Prints stdin as it arrives.
    async fn cat(&self) {
        let mut changes = self.progress.subscribe();
        let mut at = usize::try_from(self.files_bytes()).unwrap_or(usize::MAX);
        loop {
            let (text, closed) = {
                let progress = changes.borrow_and_update();
                (progress.input[at..].to_vec(), progress.closed)
            };
            at += text.len();
            if !text.is_empty() {
                self.print(0, &text);
            } else if closed || changes.changed().await.is_err() {
                return;
            }
        }
    }

    fn wants_artifacts(&self) -> bool {
        let spec = self.claim.spec.as_ref();
        spec.is_some_and(|spec| spec.artifacts.is_some())
    }

    fn leave(&self, path: String, content: &[u8]) {
        if !self.wants_artifacts() {
            return;
        }
        let file = Artifact {
            path,
            mode: MODE,
            size: content.len() as u64,
        };
        self.progress.send_modify(|progress| {
            progress.files.push(file);
            progress.output[2].extend_from_slice(content);
        });
    }

    /// Sends every file that the run left, if its caller asked for artifacts.
    fn send_artifacts(&self) {
        if self.wants_artifacts() {
            self.progress.send_modify(|progress| {
                progress.artifacts = Some(Artifacts {
                    files: std::mem::take(&mut progress.files),
                    ..Artifacts::default()
                });
            });
        }
    }
}
