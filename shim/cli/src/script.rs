//! `polydev-shim script`: runs a script in Python and fetches what it leaves.

mod math;

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::ExitCode,
    str::FromStr,
};

use anyhow::Context;
use base64::{Engine as _, prelude::BASE64_STANDARD};
use polydev_proto::runtime::{
    self, Artifact, Artifacts, ExitReason, ExpectedOutput, OutputKind, RunScriptRequest,
    RunScriptResponse, ScriptStatus, run_event::Event, script_output::Content,
};
use serde_json::json;

use super::{
    Client, FAILED,
    files::{Given, Opened, Receiver},
    print,
    run::{seconds, variable},
    told,
};

/// `PATH[:text|binary]`: a file that the script leaves.
#[derive(Clone)]
struct Wanted(ExpectedOutput);

impl FromStr for Wanted {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (path, kind) = match text.rsplit_once(':') {
            None => (text, OutputKind::Binary),
            Some((path, "text")) => (path, OutputKind::Text),
            Some((path, "binary")) => (path, OutputKind::Binary),
            Some((_, kind)) => return Err(format!("`{kind}` must be text or binary")),
        };
        Ok(Self(ExpectedOutput {
            path: path.to_owned(),
            kind: kind.into(),
        }))
    }
}

#[derive(clap::Args)]
pub struct Arguments {
    /// The script, a file on this machine.
    script: PathBuf,
    #[command(flatten)]
    client: Client,
    /// User that the run belongs to.
    #[arg(long, default_value = "local")]
    user: String,
    /// Copy a file into `/workspace`, where the script works, under its own name or as PATH; may
    /// be repeated. The script and its files have at most 4 MiB; `run python --file` takes more.
    #[arg(long, value_name = "SOURCE[:PATH]")]
    file: Vec<Given>,
    /// A file that the script must leave in `/workspace`: as text, which must be UTF-8, or as
    /// binary; may be repeated. [default: binary]
    #[arg(long = "output", value_name = "PATH[:KIND]")]
    outputs: Vec<Wanted>,
    /// Folder for these files. With `--json` and `--math` they are printed, not written.
    #[arg(long, value_name = "FOLDER", default_value = ".")]
    outputs_to: PathBuf,
    /// Set an environment variable of the script; may be repeated.
    #[arg(long, short, value_name = "NAME=VALUE", value_parser = variable)]
    env: Vec<(String, String)>,
    /// Seconds to wait for a slot, 0 to 1800.
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    queue_timeout: u32,
    /// Seconds until the script gets SIGTERM, 1 to 86400.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    timeout: u32,
    /// Print the result as a JSON object.
    #[arg(long)]
    json: bool,
    /// Print the result as a JSON object with the fields `math.*`, for callers of DeepResearch's
    /// sandbox.
    #[arg(long, conflicts_with = "json")]
    math: bool,
    /// Arguments of the script. Those that begin with `-` come after `--`.
    args: Vec<String>,
}

/// # Errors
/// If the script cannot be run, or its outputs cannot be written.
pub async fn execute(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let (json, is_math) = (arguments.json, arguments.math);
    let outputs_to = arguments.outputs_to.clone();
    let name = arguments.script.file_name().and_then(|name| name.to_str());
    let script_name = name.unwrap_or_default().to_owned();
    let result = match run(arguments, &script_name).await {
        Ok(Some(result)) => result,
        Ok(None) => {
            print(&format!("{}\n", math::skipped(&script_name)))?;
            return Ok(ExitCode::SUCCESS);
        }
        Err(error) => {
            if is_math {
                let failed = math::failed(&script_name, &format!("{error:#}"));
                print(&format!("{failed}\n"))?;
            }
            return Err(error);
        }
    };
    match (json, is_math) {
        (_, true) => print(&format!("{}\n", math::of(&script_name, &result)))?,
        (true, false) => print(&format!("{}\n", to_json(&result)))?,
        (false, false) => show(&result, &outputs_to)?,
    }
    Ok(exit_code(&result))
}

/// Runs the script; `None` if it is empty and need not be run.
async fn run(arguments: Arguments, script_name: &str) -> anyhow::Result<Option<RunScriptResponse>> {
    let script = &arguments.script;
    let text = std::fs::read_to_string(script);
    let text = text.with_context(|| format!("cannot read `{}`", script.display()))?;
    if arguments.math && text.trim().is_empty() {
        return Ok(None);
    }
    let request = RunScriptRequest {
        user_id: arguments.user,
        script: text,
        script_name: script_name.to_owned(),
        args: arguments.args,
        files: Opened::new(&arguments.file).await?.read().await?,
        expected_outputs: arguments
            .outputs
            .into_iter()
            .map(|wanted| wanted.0)
            .collect(),
        env: arguments.env.into_iter().collect(),
        timeout: seconds(arguments.timeout),
        queue_timeout: seconds(arguments.queue_timeout),
    };
    let mut shim = arguments.client.connect().await?.calls();
    let result = shim.run_script(request).await.map_err(told)?;
    Ok(Some(result.into_inner()))
}

/// As that of `run`.
fn exit_code(result: &RunScriptResponse) -> ExitCode {
    match (result.status(), result.reason()) {
        (_, ExitReason::Lost) => ExitCode::from(FAILED),
        // It ended well and left too little.
        (ScriptStatus::Failure, _) if result.run_exit_code == 0 => ExitCode::FAILURE,
        _ => ExitCode::from(u8::try_from(result.run_exit_code).unwrap_or(FAILED)),
    }
}

fn show(result: &RunScriptResponse, folder: &Path) -> anyhow::Result<()> {
    std::io::stdout().write_all(&result.stdout)?;
    std::io::stderr().write_all(&result.stderr)?;
    for (name, kept, whole) in [
        ("stdout", result.stdout.len() as u64, result.stdout_bytes),
        ("stderr", result.stderr.len() as u64, result.stderr_bytes),
    ] {
        if kept < whole {
            eprintln!("polydev-shim: {name} has {whole} bytes; only the first {kept} are shown");
        }
    }
    let contents = result.outputs.iter().map(|output| match &output.content {
        Some(Content::Text(text)) => text.as_bytes(),
        Some(Content::Binary(bytes)) => bytes,
        None => &[],
    });
    let artifact = |(output, content): (&runtime::ScriptOutput, &[u8])| Artifact {
        path: output.path.clone(),
        mode: 0o644,
        size: content.len() as u64,
    };
    let mut receiver = Receiver::new(folder);
    receiver.on(&Event::Artifacts(Artifacts {
        files: result
            .outputs
            .iter()
            .zip(contents.clone())
            .map(artifact)
            .collect(),
        ..Artifacts::default()
    }))?;
    let data = contents.collect::<Vec<_>>().concat().into();
    receiver.on(&Event::ArtifactData(runtime::Output { offset: 0, data }))?;
    for refused in &result.refused_outputs {
        let (path, reason) = (&refused.path, &refused.reason);
        eprintln!("polydev-shim: the output `{path}` is refused: {reason}");
    }
    // If it only has such outputs, the message is about the first.
    if !result.message.is_empty() && result.run_exit_code != 0 {
        eprintln!("polydev-shim: {}", result.message);
    }
    Ok(())
}

fn to_json(result: &RunScriptResponse) -> serde_json::Value {
    let outputs = result.outputs.iter().map(|output| match &output.content {
        Some(Content::Text(text)) => json!({ "path": output.path, "text": text }),
        Some(Content::Binary(bytes)) => {
            json!({ "path": output.path, "base64": BASE64_STANDARD.encode(bytes) })
        }
        None => json!({ "path": output.path }),
    });
    let refused = result.refused_outputs.iter();
    let refused = refused.map(|file| json!({ "path": file.path, "reason": file.reason }));
    let seconds = result.duration.as_ref().and_then(|duration| {
        let duration = std::time::Duration::try_from(*duration).ok()?;
        Some(duration.as_secs_f64())
    });
    json!({
        "run_id": result.run_id,
        "status": match result.status() {
            ScriptStatus::Success => "success",
            ScriptStatus::Timeout => "timeout",
            ScriptStatus::Failure | ScriptStatus::Unspecified => "failure",
        },
        "exit_code": result.exit_code,
        "signal": result.signal,
        "run_exit_code": result.run_exit_code,
        "oom_kills": result.oom_kills,
        "reason": result.reason().as_str_name().trim_start_matches("EXIT_REASON_"),
        "message": result.message,
        "duration_seconds": seconds,
        "parked": result.started.as_ref().is_some_and(|started| started.agent() == runtime::started::Agent::Parked),
        "cold_reason": result.started.as_ref().map(|started| started.cold_reason.as_str()).unwrap_or_default(),
        "outputs": outputs.collect::<Vec<_>>(),
        "refused_outputs": refused.collect::<Vec<_>>(),
        "stdout": String::from_utf8_lossy(&result.stdout),
        "stderr": String::from_utf8_lossy(&result.stderr),
        "stdout_bytes": result.stdout_bytes,
        "stderr_bytes": result.stderr_bytes,
    })
}
