//! A script as a run: `python FILE [ARGUMENT...]`, with its files and its artifacts, and the run's
//! events as the script's result.

use std::collections::BTreeMap;

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
/// As the systems before this one.
const TIMEOUT: Duration = Duration {
    seconds: 60,
    nanos: 0,
};
const NAME: &str = "script.py";

/// What is known of a script's result.
#[derive(Debug, Default)]
pub struct Outcome {
    expected: Vec<ExpectedOutput>,
    response: RunScriptResponse,
    files: Vec<Artifact>,
    left_out: Vec<LeftOut>,
    /// The contents of the files, one after the other.
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
    for (index, output) in expected.iter().enumerate() {
        let field = |name: &str| format!("expected_outputs[{index}].{name}");
        workspace::check_path(&output.path).map_err(|problem| invalid(field("path"), problem))?;
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
        files: [file].into_iter().chain(files).collect(),
        env: env.into_iter().collect(),
        timeout: Some(timeout.unwrap_or(TIMEOUT)),
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
            Some(Event::Stdout(output)) => append(&mut response.stdout, output.data),
            Some(Event::Stderr(output)) => append(&mut response.stderr, output.data),
            Some(Event::Artifacts(artifacts)) => {
                self.files = artifacts.files;
                self.left_out = artifacts.left_out;
            }
            Some(Event::ArtifactData(output)) => self.contents.extend_from_slice(&output.data),
            Some(Event::Exited(exited)) => self.end(exited),
            // Nothing is lost of a run whose caller waits for all of it, and it has no model.
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
        response.message = match exited.reason() {
            ExitReason::Exited if exited.exit_code != 0 => {
                format!("the script ended with status {}", exited.exit_code)
            }
            _ => exited.message,
        };
    }

    /// The result, once the run's events have ended.
    #[must_use]
    pub fn result(mut self) -> RunScriptResponse {
        let mut contents = Bytes::from(std::mem::take(&mut self.contents));
        let mut found = BTreeMap::new();
        for Artifact { path, size, .. } in std::mem::take(&mut self.files) {
            let size = usize::try_from(size)
                .unwrap_or(usize::MAX)
                .min(contents.len());
            found.insert(path, contents.split_to(size));
        }
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
                "the output `{}` is missing: {}",
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
        found: &BTreeMap<String, Bytes>,
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

fn append(stream: &mut Bytes, data: Bytes) {
    let room = MAX_STREAM.saturating_sub(stream.len()).min(data.len());
    if room > 0 {
        *stream = [&stream[..], &data[..room]].concat().into();
    }
}

/// From the command's start to its end.
fn duration(exited: &Exited) -> Option<Duration> {
    let at = |name: &str| {
        let stage = exited.timeline.iter().find(|stage| stage.name == name);
        std::time::Duration::try_from(stage?.at?).ok()
    };
    at("exited")?.checked_sub(at("started")?)?.try_into().ok()
}
