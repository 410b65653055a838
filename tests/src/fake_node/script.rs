//! Reads the arguments of a run. Each argument is one step:
//!
//! - `true` does nothing,
//! - `out:TEXT` and `err:TEXT` print the text,
//! - `lines:COUNT` prints the numbers from 1 to the count, each with a newline,
//! - `files` prints the bytes of the run's files,
//! - `cat` prints what it reads, until the end of stdin,
//! - `artifact:PATH=TEXT` leaves a file,
//! - `wait` waits until the run is cancelled,
//! - `exit:STATUS` ends the run.
//!
//! After the last step the run exits with 0. Any other argument is a missing program.

use bytes::Bytes;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    Stdout(Vec<u8>),
    Stderr(Vec<u8>),
    Files,
    Cat,
    Artifact { path: String, content: Vec<u8> },
    Wait,
    Exit(i32),
}

/// `None` if an argument is not a step.
pub(super) fn steps(argv: &[Bytes]) -> Option<Vec<Step>> {
    let mut steps = Vec::new();
    for word in argv {
        let word = std::str::from_utf8(word).ok()?;
        steps.extend(match word.split_once(':') {
            None if word == "true" => None,
            None if word == "files" => Some(Step::Files),
            None if word == "cat" => Some(Step::Cat),
            None if word == "wait" => Some(Step::Wait),
            Some(("out", text)) => Some(Step::Stdout(text.into())),
            Some(("err", text)) => Some(Step::Stderr(text.into())),
            Some(("lines", count)) => Some(Step::Stdout(lines(count.parse().ok()?))),
            Some(("exit", status)) => Some(Step::Exit(status.parse().ok()?)),
            Some(("artifact", file)) => {
                let (path, content) = file.split_once('=')?;
                Some(Step::Artifact {
                    path: path.to_owned(),
                    content: content.into(),
                })
            }
            _ => return None,
        });
    }
    Some(steps)
}

fn lines(count: usize) -> Vec<u8> {
    let lines = (1..=count).map(|line| format!("{line}\n"));
    lines.collect::<String>().into_bytes()
}
