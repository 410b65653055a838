//! A model that wants to use tools: the shell of its CLI, once for each command.

use serde_json::{Value, json};

/// A prompt that begins so continues with commands.
const WISH: &str = "Please run: ";
/// Between two commands.
const AND: &str = " ;; ";
/// What a request has once the results are there.
const RESULTS: [&str; 3] = [
    "\"tool_result\"",
    "\"functionResponse\"",
    "\"custom_tool_call_output\"",
];

/// The events of an answer that runs the prompt's commands. `None` if the prompt has none, if the
/// results are there already, or if this is not the request to make it.
pub(crate) fn call(
    path: &str,
    texts: &[&str],
    request: &Value,
) -> Option<Vec<(&'static str, Value)>> {
    let commands = texts.iter().find_map(|text| text.strip_prefix(WISH))?;
    let commands: Vec<_> = commands.split(AND).collect();
    let said = request.to_string();
    if RESULTS.iter().any(|result| said.contains(result)) {
        return None;
    }
    if path.ends_with("/messages") {
        return Some(anthropic(&commands));
    }
    if path.ends_with("/responses") {
        return Some(openai(&commands));
    }
    path.ends_with(":streamGenerateContent")
        .then(|| google(&commands))
}

fn google(commands: &[&str]) -> Vec<(&'static str, Value)> {
    let call = |command: &&str| {
        let call = json!({ "name": "run_shell_command", "args": { "command": command } });
        json!({ "functionCall": call })
    };
    let parts: Vec<_> = commands.iter().map(call).collect();
    vec![(
        "",
        json!({
            "candidates": [{
                "content": { "role": "model", "parts": parts },
                "finishReason": "STOP", "index": 0,
            }],
            "usageMetadata": { "promptTokenCount": 1, "candidatesTokenCount": 1, "totalTokenCount": 2 },
            "modelVersion": "stand-in",
        }),
    )]
}

/// Codex 0.171 gives its model one tool, which runs JavaScript that calls the others.
fn openai(commands: &[&str]) -> Vec<(&'static str, Value)> {
    let script = format!(
        "for (const cmd of {}) {{ try {{ text(await tools.exec_command({{ cmd }})); }} \
         catch (error) {{ text(String(error)); }} }}",
        json!(commands)
    );
    let item = json!({
        "type": "custom_tool_call", "id": "ctc_1", "call_id": "call_1", "name": "exec",
        "input": script, "status": "completed",
    });
    let usage = json!({
        "input_tokens": 1, "output_tokens": 1, "total_tokens": 2,
        "input_tokens_details": { "cached_tokens": 0 },
        "output_tokens_details": { "reasoning_tokens": 0 },
    });
    let steps = [
        (
            "response.created",
            json!({ "response": { "id": "resp_1" } }),
        ),
        (
            "response.output_item.done",
            json!({ "output_index": 0, "item": item }),
        ),
        (
            "response.completed",
            json!({ "response": { "id": "resp_1", "status": "completed", "output": [item], "usage": usage } }),
        ),
    ];
    typed(steps)
}

fn anthropic(commands: &[&str]) -> Vec<(&'static str, Value)> {
    let usage = json!({ "input_tokens": 1, "output_tokens": 1 });
    let message = json!({
        "id": "msg_1", "type": "message", "role": "assistant", "model": "stand-in",
        "stop_reason": null, "stop_sequence": null, "content": [], "usage": usage,
    });
    let mut steps = vec![("message_start", json!({ "message": message }))];
    for (index, command) in commands.iter().enumerate() {
        let id = format!("toolu_{}", index + 1);
        let tool = json!({ "type": "tool_use", "id": id, "name": "Bash", "input": {} });
        let input = json!({ "command": command, "description": "As asked" }).to_string();
        let delta = json!({ "type": "input_json_delta", "partial_json": input });
        steps.extend([
            (
                "content_block_start",
                json!({ "index": index, "content_block": tool }),
            ),
            (
                "content_block_delta",
                json!({ "index": index, "delta": delta }),
            ),
            ("content_block_stop", json!({ "index": index })),
        ]);
    }
    let end = json!({ "stop_reason": "tool_use", "stop_sequence": null });
    steps.extend([
        ("message_delta", json!({ "delta": end, "usage": usage })),
        ("message_stop", json!({})),
    ]);
    typed(steps)
}

fn typed(steps: impl IntoIterator<Item = (&'static str, Value)>) -> Vec<(&'static str, Value)> {
    let typed = steps.into_iter().map(|(name, mut data)| {
        data["type"] = name.into();
        (name, data)
    });
    typed.collect()
}
