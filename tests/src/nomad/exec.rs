//! Runs a command in a task, over the agent's web socket.

use std::{net::TcpStream, time::Duration};

use base64::{Engine, engine::general_purpose::STANDARD};
use serde_json::{Value, json};
use tungstenite::{Message, WebSocket, stream::MaybeTlsStream};

/// How a command ended.
#[derive(Debug, Default)]
pub struct Exec {
    pub stdout: String,
    pub stderr: String,
    pub exit_code: i64,
    /// The agent's error, if it reported no exit.
    pub error: String,
}

/// No case of Nomad's conformance suite takes longer.
const LIMIT: Duration = Duration::from_secs(30);

#[track_caller]
pub(super) fn run(address: &str, alloc: &str, command: &[&str], tty: bool, stdin: &[u8]) -> Exec {
    let command = json!(command).to_string();
    let query: String = form_urlencoded::Serializer::new(String::new())
        .append_pair("command", &command)
        .append_pair("task", "task")
        .append_pair("tty", &tty.to_string())
        .finish();
    let url = format!(
        "{}/v1/client/allocation/{alloc}/exec?{query}",
        address.replace("http", "ws")
    );
    let (mut socket, _) = tungstenite::connect(url).expect("the agent upgrades");
    if let MaybeTlsStream::Plain(stream) = socket.get_ref() {
        stream
            .set_read_timeout(Some(LIMIT))
            .expect("a timeout can be set");
    }
    if tty {
        for (height, width) in [(50, 40), (100, 100)] {
            send(
                &mut socket,
                &json!({ "tty_size": { "height": height, "width": width } }),
            );
        }
    }
    send(
        &mut socket,
        &json!({ "stdin": { "data": STANDARD.encode(stdin) } }),
    );
    if !tty {
        send(&mut socket, &json!({ "stdin": { "close": true } }));
    }

    let mut exec = Exec::default();
    let text = |value: &Value| {
        let data = STANDARD.decode(value["data"].as_str().unwrap_or_default());
        String::from_utf8_lossy(&data.expect("data is base64")).into_owned()
    };
    loop {
        let message = match socket.read() {
            Ok(Message::Text(message)) => message,
            Ok(Message::Close(frame)) => {
                exec.error = frame
                    .map(|frame| frame.reason.to_string())
                    .unwrap_or_default();
                return exec;
            }
            Ok(_) => continue,
            Err(error) => {
                exec.error = error.to_string();
                return exec;
            }
        };
        let frame: Value = serde_json::from_str(&message).expect("frames are JSON");
        exec.stdout += &text(&frame["stdout"]);
        exec.stderr += &text(&frame["stderr"]);
        if frame["exited"] == true {
            exec.exit_code = frame["result"]["exit_code"].as_i64().unwrap_or_default();
            return exec;
        }
    }
}

fn send(socket: &mut WebSocket<MaybeTlsStream<TcpStream>>, frame: &Value) {
    let message = Message::text(frame.to_string());
    socket.send(message).expect("the agent takes frames");
}
