//! `stand-in ADDRESS`: a model API for tests and demos. It speaks enough of the
//! OpenAI Responses, Anthropic Messages and Gemini protocols for the real CLIs to
//! finish a prompt, answers with a text that depends on the prompt, and keeps what
//! arrived. If the prompt is `Please run: CMD`, or several with ` ;; ` between them, it first asks the CLI to do so. What arrived: `GET /requests` lists it. A key that ends with `-refused` is refused, one that ends with `-busy` has come too often, and one that ends with `-slow` waits a minute, as the prompt `Please wait.` does. `GET /zeros` returns 2.5 MB for measurements. The stand-in
//! is also a proxy that answers for every server, because Gemini CLI asks Google about an account.

mod tools;
mod tunnel;

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use anyhow::Context;
use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{DefaultBodyLimit, Request, State},
    http::{HeaderMap, Method, StatusCode, Uri, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::get,
};
use polydev_stand_in::{Received, Text};
use serde_json::{Value, json};

/// Requests kept; a CLI makes a handful for a prompt.
const KEPT: usize = 10_000;
/// Requests kept whole.
const KEPT_BODIES: usize = 20;
/// Enough for a prompt of 100 KB and what a CLI sends to its model beside the prompt.
const MAX_BODY: usize = 8 << 20;
const CREDENTIAL_HEADERS: [&str; 3] = ["authorization", "x-api-key", "x-goog-api-key"];

type Log = Arc<Mutex<Vec<Received>>>;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let address = std::env::args().nth(1).context("usage: stand-in ADDRESS")?;
    let address: SocketAddr = address.parse().context("ADDRESS is not IP:PORT")?;
    let listener = tokio::net::TcpListener::bind(address).await?;
    let app = Router::new()
        .route("/requests", get(list))
        .route("/zeros", get(async || vec![0; 2_500_000]))
        .fallback(answer)
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(Log::default());
    let inner = app.clone();
    let app = app.layer(middleware::from_fn(move |request: Request, next: Next| {
        let inner = inner.clone();
        async move {
            if request.method() != Method::CONNECT {
                return next.run(request).await;
            }
            tunnel::open(request, inner);
            StatusCode::OK.into_response()
        }
    }));
    axum::serve(listener, app).await?;
    Ok(())
}

async fn list(State(log): State<Log>) -> Json<Vec<Received>> {
    Json(log.lock().unwrap_or_else(PoisonError::into_inner).clone())
}

async fn answer(
    State(log): State<Log>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let request: Value = serde_json::from_slice(&body).unwrap_or_default();
    // With an account, Gemini CLI wraps requests, and expects wrapped answers.
    let is_wrapped = uri.path().starts_with("/v1internal:");
    let request = match is_wrapped {
        true => request["request"].clone(),
        false => request,
    };
    let wrap = |value: Value| match is_wrapped {
        true => json!({ "response": value }),
        false => value,
    };
    let mut texts = Vec::new();
    user_texts(&request, &mut texts);
    let received = Received {
        at_ms: SystemTime::UNIX_EPOCH
            .elapsed()
            .unwrap_or_default()
            .as_secs_f64()
            * 1e3,
        body: request.clone(),
        method: method.to_string(),
        path: uri.path().to_owned(),
        credentials: CREDENTIAL_HEADERS
            .iter()
            .filter_map(|name| Some((name.to_string(), headers.get(*name)?.to_str().ok()?.into())))
            .collect(),
        texts: texts.iter().map(|text| Text::of(text)).collect(),
    };
    {
        let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
        if log.len() < KEPT {
            log.push(received);
        }
        let past = log.len().checked_sub(KEPT_BODIES + 1);
        if let Some(past) = past {
            log[past].body = Value::Null;
        }
    }
    // The prompt is what the user said last.
    let prompt = texts.last().copied().unwrap_or_default();
    let text = polydev_stand_in::answer(prompt);
    let path = uri.path();
    if let Some(steps) = tools::call(path, &texts, &request) {
        return events(&steps, path.ends_with("/messages"));
    }
    if let Some(told) = account(path) {
        return Json(told).into_response();
    }
    let has_key = |end: &[u8]| {
        headers
            .values()
            .any(|value| value.as_bytes().ends_with(end))
    };
    if has_key(b"-slow") || prompt.starts_with("Please wait") {
        tokio::time::sleep(Duration::from_secs(60)).await;
    }
    if has_key(b"-busy") {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    }
    if has_key(b"-refused") {
        let error = json!({ "type": "authentication_error", "message": "invalid key" });
        let told = Json(json!({ "type": "error", "error": error }));
        return (StatusCode::UNAUTHORIZED, told).into_response();
    }
    if method != Method::POST {
        // Codex first requests a WebSocket. After this answer it works without one.
        return StatusCode::UPGRADE_REQUIRED.into_response();
    }
    if path == "/oauth/token" {
        // Codex refreshes an account.
        let token = request["refresh_token"].as_str().unwrap_or_default();
        Json(json!({ "access_token": format!("of {token}"), "refresh_token": token }))
            .into_response()
    } else if path.ends_with("/responses") {
        events(&openai(&text), true)
    } else if path.ends_with("/messages") {
        anthropic(&text, request["stream"] == true)
    } else if path.ends_with("/count_tokens") {
        Json(json!({ "input_tokens": 1 })).into_response()
    } else if path.ends_with(":streamGenerateContent") {
        events(&[("", wrap(gemini(&text)))], false)
    } else if path.ends_with(":generateContent") {
        // The CLI asks a small model which large model should answer.
        let choice = json!({ "complexity_reasoning": "a stand-in", "complexity_score": 1 });
        Json(wrap(gemini(&choice.to_string()))).into_response()
    } else {
        StatusCode::NOT_FOUND.into_response()
    }
}

/// Google's answer about an account and its project.
fn account(path: &str) -> Option<Value> {
    let (_, call) = path.rsplit_once(['/', ':'])?;
    Some(match call {
        "tokeninfo" => json!({ "aud": "stand-in", "expires_in": 3600, "scope": "" }),
        "userinfo" => json!({ "email": "tester@example.com" }),
        "loadCodeAssist" => json!({
            "currentTier": { "id": "standard-tier" }, "cloudaicompanionProject": "project",
        }),
        "onboardUser" => json!({
            "done": true, "response": { "cloudaicompanionProject": { "id": "project" } },
        }),
        "countTokens" => json!({ "totalTokens": 1 }),
        "listExperiments" | "recordCodeAssistMetrics" | "retrieveUserQuota" => json!({}),
        _ => return None,
    })
}

/// Every text a user said in a request of any of the three forms, in order.
fn user_texts<'a>(request: &'a Value, texts: &mut Vec<&'a str>) {
    let lists = ["messages", "input", "contents"];
    let turns = lists
        .iter()
        .filter_map(|list| request[*list].as_array())
        .flatten();
    for turn in turns.filter(|turn| turn["role"] == "user") {
        if let Some(text) = turn["content"].as_str() {
            texts.push(text);
        }
        for part in ["content", "parts"]
            .iter()
            .filter_map(|list| turn[*list].as_array())
            .flatten()
        {
            texts.extend(part["text"].as_str());
        }
    }
}

fn openai(text: &str) -> Vec<(&'static str, Value)> {
    let item = json!({
        "type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
        "content": [{ "type": "output_text", "text": text, "annotations": [] }],
    });
    let usage = json!({
        "input_tokens": 1, "output_tokens": 1, "total_tokens": 2,
        "input_tokens_details": { "cached_tokens": 0 },
        "output_tokens_details": { "reasoning_tokens": 0 },
    });
    [
        ("response.created", json!({ "response": { "id": "resp_1" } })),
        ("response.output_item.added", json!({ "output_index": 0, "item": item })),
        ("response.output_text.delta", json!({ "item_id": "msg_1", "output_index": 0, "content_index": 0, "delta": text })),
        ("response.output_item.done", json!({ "output_index": 0, "item": item })),
        ("response.completed", json!({ "response": { "id": "resp_1", "model": "stand-in", "status": "completed", "output": [item], "usage": usage } })),
    ]
    .map(|(name, mut data)| {
        data["type"] = name.into();
        (name, data)
    })
    .into()
}

fn anthropic(text: &str, stream: bool) -> Response {
    let usage = json!({ "input_tokens": 1, "output_tokens": 1 });
    let message = json!({
        "id": "msg_1", "type": "message", "role": "assistant", "model": "stand-in",
        "stop_reason": null, "stop_sequence": null, "content": [], "usage": usage,
    });
    if !stream {
        let mut whole = message;
        whole["content"] = json!([{ "type": "text", "text": text }]);
        whole["stop_reason"] = "end_turn".into();
        return Json(whole).into_response();
    }
    let steps = [
        ("message_start", json!({ "message": message })),
        (
            "content_block_start",
            json!({ "index": 0, "content_block": { "type": "text", "text": "" } }),
        ),
        (
            "content_block_delta",
            json!({ "index": 0, "delta": { "type": "text_delta", "text": text } }),
        ),
        ("content_block_stop", json!({ "index": 0 })),
        (
            "message_delta",
            json!({ "delta": { "stop_reason": "end_turn", "stop_sequence": null }, "usage": usage }),
        ),
        ("message_stop", json!({})),
    ];
    let steps = steps.map(|(name, mut data)| {
        data["type"] = name.into();
        (name, data)
    });
    events(&steps, true)
}

fn gemini(text: &str) -> Value {
    json!({
        "candidates": [{
            "content": { "role": "model", "parts": [{ "text": text }] },
            "finishReason": "STOP", "index": 0,
        }],
        "usageMetadata": { "promptTokenCount": 1, "candidatesTokenCount": 1, "totalTokenCount": 2 },
        "modelVersion": "stand-in",
    })
}

/// Server-sent events, with or without their names.
fn events(events: &[(&str, Value)], named: bool) -> Response {
    let mut body = String::new();
    for (name, data) in events {
        if named {
            body.push_str(&format!("event: {name}\n"));
        }
        body.push_str(&format!("data: {data}\n\n"));
    }
    (
        [(header::CONTENT_TYPE, "text/event-stream")],
        Body::from(body),
    )
        .into_response()
}
