//! A script as a run: `python FILE [ARGUMENT...]`, with its files and its artifacts, and the run's
//! events as the script's result.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use polydev_proto::{
    exec,
    provider::Provider,
    runtime::{
        Argv, Artifact, ArtifactRules, ExitReason, Exited, ExpectedOutput, InputFile, LeftOut,
        OutputKind, RunEvent, RunScriptRequest, RunScriptResponse, RunStart, ScriptOutput,
        ScriptStatus, input_file, run_event::Event, run_start::Command, script_output::Content,
    },
    workspace,
};
use prost_types::Duration;

use super::request::Invalid;

/// Most bytes of all outputs together, so that the answer stays below gRPC's usual limit.
const MAX_OUTPUTS: u64 = 2 << 20;
/// Most bytes of stdout, and of stderr, that the answer has.
const MAX_STREAM: usize = 256 << 10;
const NAME: &str = "script.py";

/// What is known of a script's result.
#[derive(Debug, Default)]
pub struct Outcome {
    expected: Vec<ExpectedOutput>,
    response: RunScriptResponse,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    files: Vec<Artifact>,
    left_out: Vec<LeftOut>,
    /// The contents of the files, one after the other, up to the first byte that was lost.
    contents: Vec<u8>,
}

/// The run of a script, and its outcome before anything has happened.
///
/// # Errors
/// [`Invalid`] for what only scripts have. The run is checked as any other.
pub fn start(request: RunScriptRequest) -> Result<(RunStart, Outcome), Invalid> {
    let RunScriptRequest {
        user_id,
        script,
        script_name,
        args,
        files,
        expected_outputs: expected,
        env,
        timeout,
        queue_timeout,
    } = request;
    if script.trim().is_empty() {
        return Err(Invalid::Value {
            field: "script",
            given: script,
            allowed: "the text of a script",
        });
    }
    let name = match script_name.is_empty() {
        true => NAME.to_owned(),
        false => script_name,
    };
    let invalid =
        |field: String, problem: String| Invalid::Command(exec::Invalid { field, problem });
    workspace::check_path(&name).map_err(|problem| invalid("script_name".into(), problem))?;
    if expected.len() > workspace::MAX_PATTERNS {
        let (given, most) = (expected.len(), workspace::MAX_PATTERNS);
        let problem = format!("has {given} entries; at most {most} are allowed");
        return Err(invalid("expected_outputs".into(), problem));
    }
    let mut paths = BTreeSet::new();
    for (index, output) in expected.iter().enumerate() {
        let field = |name: &str| format!("expected_outputs[{index}].{name}");
        workspace::check_path(&output.path).map_err(|problem| invalid(field("path"), problem))?;
        if !paths.insert(&output.path) {
            let problem = format!("is `{}`, which is there twice", output.path);
            return Err(invalid(field("path"), problem));
        }
        if OutputKind::try_from(output.kind).is_err() {
            let problem = format!(
                "is {}; must be OUTPUT_KIND_TEXT or OUTPUT_KIND_BINARY",
                output.kind
            );
            return Err(invalid(field("kind"), problem));
        }
    }
    let file = InputFile {
        path: name.clone(),
        mode: 0,
        source: Some(input_file::Source::Content(script.into())),
    };
    // A name that begins with `-` would be an option.
    let argv = ["python".to_owned(), format!("{}/{name}", workspace::PATH)];
    let patterns: Vec<_> = expected
        .iter()
        .map(|output| workspace::literal(&output.path))
        .collect();
    let start = RunStart {
        provider: Provider::Python.name().into(),
        user_id,
        command: Some(Command::Argv(Argv {
            text: argv.into_iter().chain(args).collect(),
            args: Vec::new(),
        })),
        // A file of the caller's keeps its number in errors.
        files: files.into_iter().chain([file]).collect(),
        env: env.into_iter().collect(),
        timeout,
        queue_timeout,
        artifacts: (!patterns.is_empty()).then_some(ArtifactRules {
            patterns,
            max_bytes: MAX_OUTPUTS,
            max_files: 0,
        }),
        work_dir: workspace::PATH.into(),
        ..RunStart::default()
    };
    let outcome = Outcome {
        expected,
        ..Outcome::default()
    };
    Ok((start, outcome))
}

impl Outcome {
    /// Takes the next event of the run.
    pub fn take(&mut self, event: RunEvent) {
        let response = &mut self.response;
        match event.event {
            Some(Event::Accepted(accepted)) => response.run_id = accepted.run_id,
            Some(Event::Started(started)) => response.started = Some(started),
            Some(Event::Stdout(output)) => append(&mut self.stdout, &output.data),
            Some(Event::Stderr(output)) => append(&mut self.stderr, &output.data),
            Some(Event::Artifacts(artifacts)) => {
                self.files = artifacts.files;
                self.left_out = artifacts.left_out;
            }
            // What follows a gap is of no use: nobody knows whose it is.
            Some(Event::ArtifactData(output)) if output.offset == self.contents.len() as u64 => {
                self.contents.extend_from_slice(&output.data);
            }
            Some(Event::Exited(exited)) => self.end(exited),
            // What is lost is missing at the end, and a script has no model.
            _ => {}
        }
    }

    fn end(&mut self, exited: Exited) {
        let response = &mut self.response;
        response.duration = duration(&exited);
        response.reason = exited.reason;
        response.signal = exited.signal;
        response.exit_code = (exited.reason() == ExitReason::Exited).then_some(exited.exit_code);
        (response.stdout_bytes, response.stderr_bytes) = (exited.stdout_bytes, exited.stderr_bytes);
        response.run_exit_code = exited.exit_code;
        response.oom_kills = exited.oom_kills;
        response.message = match (exited.reason(), exited.exit_code, exited.oom_kills) {
            (ExitReason::Exited, 0, _) => String::new(),
            (ExitReason::Exited, status, 0) => format!("the script ended with status {status}"),
            (ExitReason::Exited, status, killed) => format!(
                "the script ended with status {status}; its memory was used up, and the kernel killed {killed} of its processes"
            ),
            _ => exited.message,
        };
    }

    /// The result, once the run's events have ended.
    #[must_use]
    pub fn result(mut self) -> RunScriptResponse {
        let mut contents = Bytes::from(std::mem::take(&mut self.contents));
        let mut found = BTreeMap::new();
        for Artifact { path, size, .. } in std::mem::take(&mut self.files) {
            let size = usize::try_from(size).unwrap_or(usize::MAX);
            let whole = (size <= contents.len()).then(|| contents.split_to(size));
            if whole.is_none() {
                contents.clear();
            }
            found.insert(path, whole);
        }
        self.response.stdout = std::mem::take(&mut self.stdout).into();
        self.response.stderr = std::mem::take(&mut self.stderr).into();
        for expected in std::mem::take(&mut self.expected) {
            let path = expected.path.clone();
            match self.output(expected, &found) {
                Ok(output) => self.response.outputs.push(output),
                Err(reason) => self.response.refused_outputs.push(LeftOut { path, reason }),
            }
        }
        let response = &mut self.response;
        if let (true, Some(refused)) = (
            response.message.is_empty(),
            response.refused_outputs.first(),
        ) {
            response.message = format!(
                "the output `{}` is refused: {}",
                refused.path, refused.reason
            );
        }
        let status = match (response.reason(), response.exit_code) {
            (ExitReason::Deadline, _) => ScriptStatus::Timeout,
            (_, Some(0)) if response.refused_outputs.is_empty() => ScriptStatus::Success,
            _ => ScriptStatus::Failure,
        };
        response.set_status(status);
        self.response
    }

    /// An expected output, or why it is not there.
    fn output(
        &self,
        expected: ExpectedOutput,
        found: &BTreeMap<String, Option<Bytes>>,
    ) -> Result<ScriptOutput, String> {
        let kind = expected.kind();
        let path = expected.path;
        let Some(content) = found.get(&path) else {
            let pattern = workspace::literal(&path);
            let mut left_out = self.left_out.iter();
            let why = left_out.find(|left_out| [&path, &pattern].contains(&&left_out.path));
            return Err(match why {
                Some(left_out) => left_out.reason.clone(),
                None => "the run ended before it could be fetched".into(),
            });
        };
        let Some(content) = content else {
            return Err("its content was lost".into());
        };
        let content = match kind {
            OutputKind::Text => match String::from_utf8(content.to_vec()) {
                Ok(text) => Content::Text(text),
                Err(_) => return Err("it is not UTF-8, and was asked for as text".into()),
            },
            OutputKind::Binary | OutputKind::Unspecified => Content::Binary(content.clone()),
        };
        Ok(ScriptOutput {
            path,
            content: Some(content),
        })
    }
}

fn append(stream: &mut Vec<u8>, data: &[u8]) {
    let room = MAX_STREAM.saturating_sub(stream.len()).min(data.len());
    stream.extend_from_slice(&data[..room]);
}

/// From the command's start to its end.
fn duration(exited: &Exited) -> Option<Duration> {
    let at = |name: &str| {
        let stage = exited.timeline.iter().find(|stage| stage.name == name);
        std::time::Duration::try_from(stage?.at?).ok()
    };
    at("exited")?.checked_sub(at("started")?)?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use polydev_proto::runtime::{Artifacts, Output};

    use super::*;

    fn expects(paths: &[&str]) -> Outcome {
        let expected = paths.iter().map(|path| ExpectedOutput {
            path: (*path).to_owned(),
            kind: 0,
        });
        let request = RunScriptRequest {
            script: "1".into(),
            expected_outputs: expected.collect(),
            ..RunScriptRequest::default()
        };
        start(request).unwrap().1
    }

    fn result(mut outcome: Outcome, events: Vec<Event>) -> RunScriptResponse {
        for event in events {
            outcome.take(RunEvent { event: Some(event) });
        }
        outcome.result()
    }

    fn artifacts(files: &[(&str, u64)]) -> Event {
        let file = |(path, size): &(&str, u64)| Artifact {
            path: (*path).to_owned(),
            size: *size,
            mode: 0,
        };
        Event::Artifacts(Artifacts {
            files: files.iter().map(file).collect(),
            ..Artifacts::default()
        })
    }

    fn data(offset: u64, data: &'static str) -> Event {
        Event::ArtifactData(Output {
            offset,
            data: data.into(),
        })
    }

    fn exited(reason: ExitReason, exit_code: i32) -> Event {
        Event::Exited(Exited {
            reason: reason.into(),
            exit_code,
            ..Exited::default()
        })
    }

    #[test]
    fn a_success_has_ended_with_zero_and_left_all_that_is_expected() {
        let events = vec![
            artifacts(&[("a", 2), ("b", 3)]),
            data(0, "aab"),
            data(3, "bb"),
            exited(ExitReason::Exited, 0),
        ];
        let found = result(expects(&["b", "a"]), events);
        assert_eq!(found.status(), ScriptStatus::Success, "{found:?}");
        let output = |path: &str, content: &'static str| ScriptOutput {
            path: path.into(),
            content: Some(Content::Binary(content.into())),
        };
        assert_eq!(found.outputs, [output("b", "bbb"), output("a", "aa")]);
        assert_eq!((found.message.as_str(), found.exit_code), ("", Some(0)));
    }

    #[test]
    fn an_output_of_which_bytes_are_lost_is_no_output() {
        for lost in [
            vec![data(0, "aab")],
            vec![data(0, "aa"), data(3, "bb")],
            vec![],
        ] {
            let last = exited(ExitReason::Exited, 0);
            let events = [vec![artifacts(&[("a", 2), ("b", 3)])], lost, vec![last]];
            let found = result(expects(&["b"]), events.concat());
            assert_eq!(found.status(), ScriptStatus::Failure);
            assert_eq!(found.refused_outputs[0].reason, "its content was lost");
        }
    }

    #[test]
    fn what_is_not_the_scripts_end_has_no_status_of_its_own() {
        for (reason, code, status) in [
            (ExitReason::Deadline, 124, ScriptStatus::Timeout),
            (ExitReason::NotStarted, 127, ScriptStatus::Failure),
            (ExitReason::OutOfMemory, 137, ScriptStatus::Failure),
            (ExitReason::Cancelled, 143, ScriptStatus::Failure),
        ] {
            let found = result(expects(&[]), vec![exited(reason, code)]);
            assert_eq!((found.status(), found.exit_code), (status, None));
            assert_eq!(found.run_exit_code, code);
        }
        let own = result(expects(&[]), vec![exited(ExitReason::Exited, 126)]);
        assert_eq!(
            (own.status(), own.exit_code),
            (ScriptStatus::Failure, Some(126))
        );
        // A stream that ends before the run.
        let broken = result(expects(&["a"]), vec![]);
        assert_eq!(broken.status(), ScriptStatus::Failure);
    }

    #[test]
    fn streams_and_expectations_are_bounded() {
        let letters = || {
            Event::Stdout(Output {
                offset: 0,
                data: vec![b'x'; 100_000].into(),
            })
        };
        let found = result(expects(&[]), (0..9).map(|_| letters()).collect());
        assert_eq!(found.stdout.len(), MAX_STREAM);
        for (paths, field) in [
            (
                vec!["a".to_owned(), "a".to_owned()],
                "expected_outputs[1].path",
            ),
            (
                (0..101).map(|number| number.to_string()).collect(),
                "expected_outputs",
            ),
            (vec!["../a".to_owned()], "expected_outputs[0].path"),
        ] {
            let expected = paths
                .into_iter()
                .map(|path| ExpectedOutput { path, kind: 0 });
            let request = RunScriptRequest {
                script: "1".into(),
                expected_outputs: expected.collect(),
                ..RunScriptRequest::default()
            };
            assert_eq!(start(request).unwrap_err().field(), field);
        }
    }
}
