//! What the broker answers a CLI that nobody uses yet: one word, in the form of the provider's
//! API. A CLI that has asked once answers its first prompt faster, and has shown that it works.
//! Nothing of it leaves the node.

use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use polydev_proto::provider::Vendor;
use serde_json::{Value, json};

use crate::{
    answer::{self, AnswerBody},
    request::{self, Asked, Refusal},
};

/// Most bytes of a request. The largest CLI sends 75 KB.
const MAX_BODY: usize = 4 << 20;
const WORD: &str = "ready";

/// Answers a model request of a container that has no run.
///
/// # Errors
/// [`Refusal`] as in a run.
///
/// # Cancel safety
/// Nothing is lost but the answer.
pub(crate) async fn answer(request: Request<Incoming>) -> Result<Response<AnswerBody>, Refusal> {
    let (parts, body) = request.into_parts();
    let asked = request::read(&parts)?;
    if asked.is_websocket {
        let message = "there is no WebSocket before a run";
        return Ok(answer::error(StatusCode::UPGRADE_REQUIRED, message));
    }
    let Ok(body) = Limited::new(body, MAX_BODY).collect().await else {
        let message = "the request broke off or is too long";
        return Ok(answer::error(StatusCode::BAD_REQUEST, message));
    };
    let body: Value = serde_json::from_slice(&body.to_bytes()).unwrap_or_default();
    Ok(of(&asked, &body).unwrap_or_else(|| {
        answer::error(
            StatusCode::NOT_FOUND,
            "there is no such answer before a run",
        )
    }))
}

/// `None` for a request that no CLI makes in a rehearsal.
fn of(asked: &Asked, body: &Value) -> Option<Response<AnswerBody>> {
    let path = asked.path.split('?').next().unwrap_or_default();
    if asked.method != Method::POST {
        return None;
    }
    Some(match asked.api.provider {
        Vendor::Anthropic if path.ends_with("/messages") => match body["stream"] == true {
            true => events(&anthropic_events()),
            false => whole(&anthropic()),
        },
        Vendor::Anthropic => whole(&json!({ "input_tokens": 1 })),
        Vendor::OpenAi if path.ends_with("/responses") => events(&openai_events()),
        Vendor::OpenAi => return None,
        Vendor::Google if path.ends_with(":streamGenerateContent") => {
            events(&[(None, google(WORD))])
        }
        Vendor::Google if path.ends_with(":generateContent") => {
            // Gemini CLI asks a small model which model should answer.
            let choice = json!({ "complexity_reasoning": WORD, "complexity_score": 1 });
            whole(&google(&choice.to_string()))
        }
        Vendor::Google => whole(&json!({ "totalTokens": 1 })),
    })
}

fn anthropic() -> Value {
    json!({
        "id": "msg_rehearsal", "type": "message", "role": "assistant", "model": "rehearsal",
        "content": [{ "type": "text", "text": WORD }],
        "stop_reason": "end_turn", "stop_sequence": null,
        "usage": { "input_tokens": 1, "output_tokens": 1 },
    })
}

fn anthropic_events() -> Vec<(Option<&'static str>, Value)> {
    let mut begun = anthropic();
    begun["content"] = json!([]);
    begun["stop_reason"] = Value::Null;
    let (usage, delta) = (
        begun["usage"].clone(),
        json!({ "stop_reason": "end_turn", "stop_sequence": null }),
    );
    let block = json!({ "type": "text", "text": "" });
    let text = json!({ "type": "text_delta", "text": WORD });
    typed([
        ("message_start", json!({ "message": begun })),
        (
            "content_block_start",
            json!({ "index": 0, "content_block": block }),
        ),
        ("content_block_delta", json!({ "index": 0, "delta": text })),
        ("content_block_stop", json!({ "index": 0 })),
        ("message_delta", json!({ "delta": delta, "usage": usage })),
        ("message_stop", json!({})),
    ])
}

fn openai_events() -> Vec<(Option<&'static str>, Value)> {
    let item = json!({
        "type": "message", "id": "msg_rehearsal", "role": "assistant", "status": "completed",
        "content": [{ "type": "output_text", "text": WORD, "annotations": [] }],
    });
    let usage = json!({
        "input_tokens": 1, "output_tokens": 1, "total_tokens": 2,
        "input_tokens_details": { "cached_tokens": 0 },
        "output_tokens_details": { "reasoning_tokens": 0 },
    });
    let response = json!({
        "id": "resp_rehearsal", "model": "rehearsal", "status": "completed", "output": [item],
        "usage": usage,
    });
    typed([
        (
            "response.created",
            json!({ "response": { "id": "resp_rehearsal" } }),
        ),
        (
            "response.output_item.added",
            json!({ "output_index": 0, "item": item }),
        ),
        (
            "response.output_item.done",
            json!({ "output_index": 0, "item": item }),
        ),
        ("response.completed", json!({ "response": response })),
    ])
}

fn google(text: &str) -> Value {
    json!({
        "candidates": [{
            "content": { "role": "model", "parts": [{ "text": text }] },
            "finishReason": "STOP", "index": 0,
        }],
        "usageMetadata": {
            "promptTokenCount": 1, "candidatesTokenCount": 1, "totalTokenCount": 2,
        },
        "modelVersion": "rehearsal",
    })
}

/// Events whose data has their name, too.
fn typed<const N: usize>(events: [(&'static str, Value); N]) -> Vec<(Option<&'static str>, Value)> {
    let typed = events.map(|(name, mut data)| {
        data["type"] = name.into();
        (Some(name), data)
    });
    typed.into()
}

fn events(events: &[(Option<&str>, Value)]) -> Response<AnswerBody> {
    let line = |(name, data): &(Option<&str>, Value)| {
        let name = name.map(|name| format!("event: {name}\n"));
        format!("{}data: {data}\n\n", name.unwrap_or_default())
    };
    of_type("text/event-stream", events.iter().map(line).collect())
}

fn whole(body: &Value) -> Response<AnswerBody> {
    of_type("application/json", body.to_string())
}

fn of_type(content_type: &'static str, body: String) -> Response<AnswerBody> {
    let body = Full::new(Bytes::from(body)).map_err(|never| match never {});
    let mut answer = Response::new(body.boxed_unsync());
    let content_type = HeaderValue::from_static(content_type);
    answer
        .headers_mut()
        .insert(header::CONTENT_TYPE, content_type);
    answer
}
