//! What a run of a chaos test does, and what its caller should receive.

use std::net::SocketAddr;

use bytes::Bytes;
use polydev_proto::runtime::{Argv, Prompt, RunStart, run_start::Command};
use polydev_tests::client::api_key;
use rand::{Rng, rngs::StdRng};
use uuid::Uuid;

use crate::{AGENTS, PROVIDER, caller::USER, small};

/// What a run does. All of it is known in advance.
#[derive(Debug, Clone)]
pub(crate) struct Spec {
    pub(crate) run_id: String,
    work: Work,
    /// The caller goes away once at so many bytes, and comes back.
    pub(crate) leaves_at: Option<u64>,
}

#[derive(Debug, Clone)]
enum Work {
    Script {
        ledger: SocketAddr,
        /// Lines on stdout before the pause, and again after it.
        lines: u32,
        /// Lines on stderr.
        errors: u32,
        pause: f32,
        status: i32,
    },
    /// A prompt for a real CLI that waits in its slot. Its text contains the run's id.
    Prompt,
}

/// Puts the run's id into the ledger, then prints lines that only this run prints. After the
/// pause, the broker still knows the run: it refuses another provider, and not the run.
const SCRIPT: &str = r#"
[ "$(echo "$3" | nc "$1" "$2")" = written ] || exit 97
seq 1 "$4" | sed "s/^/$3 /"
seq 1 "$5" | sed "s/^/$3 error /" >&2
sleep "$6"
known=
for try in 1 2 3 4 5 6 7 8 9; do
    if { printf 'GET /openai/v1/models HTTP/1.1\r\nhost: broker\r\nconnection: close\r\n\r\n'; sleep 1; } |
        nc 127.0.0.1 8319 | grep -q 'no key for openai'; then known=1; break; fi
done
[ "$known" ] || exit 98
seq "$(($4 + 1))" "$(($4 + $4))" | sed "s/^/$3 /"
exit "$7"
"#;

impl Spec {
    /// One of ten is a prompt.
    pub(crate) fn random(rng: &mut StdRng, ledger: SocketAddr) -> Self {
        let run_id = Uuid::now_v7().to_string();
        if rng.random_bool(0.1) {
            return Self {
                run_id,
                work: Work::Prompt,
                leaves_at: rng.random_bool(0.1).then_some(0),
            };
        }
        let pause = match rng.random_range(0..10) {
            0..6 => 0.0,
            _ => rng.random_range(0.1..3.0),
        };
        Self {
            run_id,
            work: Work::Script {
                ledger,
                lines: 1 + small(rng, 20_000),
                errors: small(rng, 2_000),
                pause,
                status: rng.random_range(0..90),
            },
            leaves_at: rng.random_bool(0.1).then(|| rng.random_range(0..10_000)),
        }
    }

    /// The text of a prompt.
    pub(crate) fn prompt(&self) -> Option<String> {
        matches!(self.work, Work::Prompt).then(|| format!("What is {}?", self.run_id))
    }

    pub(crate) fn status(&self) -> i32 {
        match self.work {
            Work::Script { status, .. } => status,
            Work::Prompt => 0,
        }
    }

    /// The complete stdout and stderr. A CLI that starts cold says much on stderr.
    pub(crate) fn expected(&self) -> [Option<Vec<u8>>; 2] {
        let id = &self.run_id;
        match self.work {
            Work::Script { lines, errors, .. } => {
                let stdout = (1..=2 * lines).map(|line| format!("{id} {line}\n"));
                let stderr = (1..=errors).map(|line| format!("{id} error {line}\n"));
                [stdout.collect::<String>(), stderr.collect::<String>()]
                    .map(|text| Some(text.into_bytes()))
            }
            Work::Prompt => {
                let text = self.prompt().unwrap_or_default();
                let answer = format!("{}\n", polydev_stand_in::answer(&text));
                [Some(answer.into_bytes()), None]
            }
        }
    }

    pub(crate) fn start(&self, attempt: u32) -> RunStart {
        let seconds = |seconds| Some(prost_types::Duration { seconds, nanos: 0 });
        let (provider, command) = match &self.work {
            Work::Prompt => {
                let text = self.prompt().unwrap_or_default();
                let prompt = Prompt {
                    text,
                    ..Default::default()
                };
                (AGENTS, Command::Prompt(prompt))
            }
            Work::Script {
                ledger,
                lines,
                errors,
                pause,
                status,
            } => {
                let words = [
                    "sh",
                    "-c",
                    SCRIPT,
                    "chaos",
                    &ledger.ip().to_string(),
                    &ledger.port().to_string(),
                    &self.run_id,
                    &lines.to_string(),
                    &errors.to_string(),
                    &pause.to_string(),
                    &status.to_string(),
                ];
                let args = words.map(|word| Bytes::copy_from_slice(word.as_bytes()));
                let argv = Argv {
                    args: args.into(),
                    text: vec![],
                };
                (PROVIDER, Command::Argv(argv))
            }
        };
        RunStart {
            provider: provider.into(),
            user_id: USER.into(),
            run_id: self.run_id.clone(),
            attempt,
            command: Some(command),
            credential: Some(api_key(&polydev_tests::fresh_key())),
            timeout: seconds(120),
            queue_timeout: seconds(60),
            ..Default::default()
        }
    }
}
