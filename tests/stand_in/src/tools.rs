//! A model that wants to use a tool: the shell of its CLI, once.

use serde_json::{Value, json};

/// A prompt that begins so continues with a command.
const WISH: &str = "Please run: ";

/// The events of an answer that runs the prompt's command. `None` if the prompt has none, if its
/// result is there already, or if this is not the request to make it.
pub(crate) fn call(
    path: &str,
    texts: &[&str],
    request: &Value,
) -> Option<Vec<(&'static str, Value)>> {
    let command = texts.iter().find_map(|text| text.strip_prefix(WISH))?;
    let said = request.to_string();
    if said.contains("\"tool_result\"") || said.contains("\"functionResponse\"") {
        return None;
    }
    if path.ends_with("/messages") {
        return Some(anthropic(command));
    }
    let call = json!({ "name": "run_shell_command", "args": { "command": command } });
    path.ends_with(":streamGenerateContent").then(|| {
        vec![("", json!({
            "candidates": [{
                "content": { "role": "model", "parts": [{ "functionCall": call }] },
                "finishReason": "STOP", "index": 0,
            }],
            "usageMetadata": { "promptTokenCount": 1, "candidatesTokenCount": 1, "totalTokenCount": 2 },
            "modelVersion": "stand-in",
        }))]
    })
}

fn anthropic(command: &str) -> Vec<(&'static str, Value)> {
    let usage = json!({ "input_tokens": 1, "output_tokens": 1 });
    let message = json!({
        "id": "msg_1", "type": "message", "role": "assistant", "model": "stand-in",
        "stop_reason": null, "stop_sequence": null, "content": [], "usage": usage,
    });
    let tool = json!({ "type": "tool_use", "id": "toolu_1", "name": "Bash", "input": {} });
    let input = json!({ "command": command, "description": "As asked" }).to_string();
    let delta = json!({ "type": "input_json_delta", "partial_json": input });
    let end = json!({ "stop_reason": "tool_use", "stop_sequence": null });
    let steps = [
        ("message_start", json!({ "message": message })),
        (
            "content_block_start",
            json!({ "index": 0, "content_block": tool }),
        ),
        ("content_block_delta", json!({ "index": 0, "delta": delta })),
        ("content_block_stop", json!({ "index": 0 })),
        ("message_delta", json!({ "delta": end, "usage": usage })),
        ("message_stop", json!({})),
    ];
    let typed = steps.map(|(name, mut data)| {
        data["type"] = name.into();
        (name, data)
    });
    typed.into()
}
