//! A script's result in the fields `math.*` that callers of DeepResearch's sandbox read. All of them
//! are always there.

use base64::{Engine as _, prelude::BASE64_STANDARD};
use polydev_proto::runtime::{RunScriptResponse, ScriptStatus, script_output::Content};
use serde_json::{Value, json};

/// What became of a script, in the seed's words.
struct Told {
    status: &'static str,
    stdout: String,
    stderr: String,
    exit_code: Option<i32>,
    timed_out: bool,
    duration_ms: u64,
    outputs: Vec<Value>,
}

/// Of a script that has run.
pub(super) fn of(script_name: &str, result: &RunScriptResponse) -> Value {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let duration = result.duration.unwrap_or_default();
    let duration = std::time::Duration::try_from(duration).unwrap_or_default();
    let status = match result.status() {
        ScriptStatus::Success => "success",
        ScriptStatus::Timeout => "timeout",
        ScriptStatus::Failure | ScriptStatus::Unspecified => "failure",
    };
    let mut stderr = text(&result.stderr);
    // The script says why itself if it ended with a status of its own.
    if status == "failure" && result.exit_code.is_none_or(|code| code == 0) {
        if !stderr.is_empty() && !stderr.ends_with('\n') {
            stderr.push('\n');
        }
        stderr.push_str(&result.message);
    }
    let outputs = result.outputs.iter().map(|output| match &output.content {
        Some(Content::Text(text)) => json!({
            "path": output.path, "kind": "text", "bytes_len": text.len(), "text": text,
        }),
        content => {
            let bytes: &[u8] = match content {
                Some(Content::Binary(bytes)) => bytes,
                _ => &[],
            };
            json!({
                "path": output.path, "kind": "binary", "bytes_len": bytes.len(),
                "base64": BASE64_STANDARD.encode(bytes),
            })
        }
    });
    fields(
        script_name,
        Told {
            status,
            stdout: text(&result.stdout),
            stderr,
            exit_code: result.exit_code,
            timed_out: status == "timeout",
            duration_ms: u64::try_from(duration.as_millis()).unwrap_or(u64::MAX),
            outputs: outputs.collect(),
        },
    )
}

/// Of a script that could not be run: a failure, with the reason on stderr.
pub(super) fn failed(script_name: &str, reason: &str) -> Value {
    without(script_name, "failure", reason)
}

/// Of a script of nothing but spaces, which is not run.
pub(super) fn skipped(script_name: &str) -> Value {
    without(script_name, "skipped", "")
}

fn without(script_name: &str, status: &'static str, stderr: &str) -> Value {
    fields(
        script_name,
        Told {
            status,
            stdout: String::new(),
            stderr: stderr.to_owned(),
            exit_code: None,
            timed_out: false,
            duration_ms: 0,
            outputs: Vec::new(),
        },
    )
}

fn fields(script_name: &str, told: Told) -> Value {
    let is_bad = matches!(told.status, "failure" | "timeout");
    let note = match is_bad {
        true => format!(
            "Math tool {}. Falling back to non-numeric reasoning.",
            told.status
        ),
        false => String::new(),
    };
    let result = json!({
        "status": told.status, "stdout": told.stdout, "stderr": told.stderr,
        "exit_code": told.exit_code, "timed_out": told.timed_out,
        "duration_ms": told.duration_ms, "outputs": told.outputs,
    });
    json!({
        "math.result": result, "math.status": told.status, "math.script_name": script_name,
        "math.stdout": told.stdout, "math.stderr": told.stderr,
        "math.exit_code": told.exit_code, "math.timed_out": told.timed_out,
        "math.duration_ms": told.duration_ms, "math.outputs": told.outputs,
        "math.alert_required": is_bad, "math.retry_recommended": is_bad,
        "math.degradation_note": note,
        "analysis.math_alert_required": is_bad, "analysis.math_retry_recommended": is_bad,
    })
}

#[cfg(test)]
mod tests {
    use polydev_proto::runtime::ScriptOutput;

    use super::*;

    #[test]
    fn all_fields_are_there_whatever_became_of_the_script() {
        let success = RunScriptResponse {
            status: ScriptStatus::Success.into(),
            exit_code: Some(0),
            outputs: vec![ScriptOutput {
                path: "a.svg".into(),
                content: Some(Content::Text("<svg/>".into())),
            }],
            duration: Some(prost_types::Duration {
                seconds: 1,
                nanos: 5_000_000,
            }),
            ..RunScriptResponse::default()
        };
        let success = of("a.py", &success);
        assert_eq!(success["math.status"], "success");
        assert_eq!(success["math.duration_ms"], 1005);
        assert_eq!(success["math.outputs"][0]["bytes_len"], 6);
        assert_eq!(success["math.degradation_note"], "");
        assert_eq!(success["analysis.math_alert_required"], false);
        let keys =
            |value: &Value| -> Vec<String> { value.as_object().unwrap().keys().cloned().collect() };
        for other in [failed("a.py", "no slot"), skipped("a.py")] {
            assert_eq!(keys(&other), keys(&success));
        }
    }

    #[test]
    fn failures_and_timeouts_are_alerts_and_recommend_a_retry() {
        let timeout = RunScriptResponse {
            status: ScriptStatus::Timeout.into(),
            ..RunScriptResponse::default()
        };
        let timeout = of("a.py", &timeout);
        assert_eq!(timeout["math.timed_out"], true);
        assert_eq!(timeout["math.exit_code"], Value::Null);
        let note = "Math tool timeout. Falling back to non-numeric reasoning.";
        assert_eq!(timeout["math.degradation_note"], note);
        let failed = failed("a.py", "no slot");
        assert_eq!(failed["math.stderr"], "no slot");
        assert_eq!(failed["math.retry_recommended"], true);
        let skipped = skipped("a.py");
        assert_eq!(skipped["math.status"], "skipped");
        assert_eq!(skipped["math.alert_required"], false);
    }
}
