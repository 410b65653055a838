//! What an answer states, read while it passes: tokens and overload, from its JSON, or from the
//! JSON of its server-sent events. Nothing of an answer is kept but the few bytes that state it.
//!
//! The APIs state tokens in `usage` or `usageMetadata`, the model in `model` or `modelVersion`,
//! and what went wrong in `error` or `code`, of an object at the top or one level below: in
//! Anthropic's `message`, OpenAI's `response`, or an element of Google's array.

use http::StatusCode;
use polydev_proto::provider::Vendor;

use crate::{
    failure::overload,
    usage::{Tokens, tokens},
};

/// Levels of brackets that the names are looked for in.
const MAX_DEPTH: u32 = 2;
/// Longest of the names.
const MAX_NAME: usize = "usageMetadata".len();
/// Most bytes of what they name: many times what an API states, which is a dozen numbers or a
/// sentence.
const MAX_VALUE: usize = 8 << 10;
/// Most bytes of a model's name.
const MAX_MODEL: usize = 100;

/// Reads one answer, in pieces of any size.
#[derive(Debug)]
pub struct Scanner {
    provider: Vendor,
    depth: u32,
    place: Place,
    /// The last string, if it may be one of the names.
    name: Vec<u8>,
    value: Option<Value>,
    /// With its depth: an object below the answer may have a `model` too.
    model: Option<(u32, String)>,
    tokens: Option<Tokens>,
    overload: Option<StatusCode>,
}

/// Where the next byte is.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Place {
    Outside,
    String,
    /// After a backslash in a string.
    Escaped,
}

/// The value of one of the names, until it ends.
#[derive(Debug)]
struct Value {
    of: Name,
    depth: u32,
    bytes: Vec<u8>,
}

/// What is looked for.
#[derive(Debug, Clone, Copy)]
enum Name {
    Model,
    Tokens,
    Error,
}

impl Scanner {
    #[must_use]
    pub fn new(provider: Vendor) -> Self {
        Self {
            provider,
            depth: 0,
            place: Place::Outside,
            name: Vec::new(),
            value: None,
            model: None,
            tokens: None,
            overload: None,
        }
    }

    /// What the answer has stated so far, and for which model. Google names it after the first
    /// tokens.
    #[must_use]
    pub fn stated(&self) -> Option<(Option<&str>, Tokens)> {
        let model = self.model.as_ref().map(|(_, model)| model.as_str());
        Some((model, self.tokens?))
    }

    /// The overload that the answer reports, as the status that would have said so.
    #[must_use]
    pub fn overload(&self) -> Option<StatusCode> {
        self.overload
    }

    /// Another answer follows, on the same connection.
    pub fn next_answer(&mut self) {
        *self = Self::new(self.provider);
    }

    /// Reads the next piece.
    pub fn read(&mut self, mut piece: &[u8]) {
        while let Some(&byte) = piece.first() {
            let skipped = self.skip(piece);
            if skipped > 0 {
                piece = &piece[skipped..];
                continue;
            }
            piece = &piece[1..];
            match self.place {
                Place::Outside => self.outside(byte),
                Place::String | Place::Escaped => self.in_string(byte),
            }
        }
    }

    /// How many of the next bytes change nothing: most of an answer is text.
    fn skip(&self, piece: &[u8]) -> usize {
        let found = match self.place {
            _ if self.value.is_some() => return 0,
            Place::String if self.depth > MAX_DEPTH => memchr::memchr3(b'"', b'\\', b'\n', piece),
            Place::Outside if self.depth == 0 => memchr::memchr2(b'{', b'[', piece),
            _ => return 0,
        };
        found.unwrap_or(piece.len())
    }

    fn in_string(&mut self, byte: u8) {
        self.keep(byte);
        self.place = match (self.place, byte) {
            // No string has a line's end: this is no JSON, and an event may begin after it.
            (_, b'\n') => return self.lost(),
            (Place::String, b'"') => Place::Outside,
            (Place::String, b'\\') => Place::Escaped,
            _ => Place::String,
        };
        // One that is longer, or has an escape, is none of the names.
        if self.place != Place::Outside && self.depth <= MAX_DEPTH && self.name.len() <= MAX_NAME {
            self.name.push(byte);
        }
    }

    fn outside(&mut self, byte: u8) {
        let ends_a_value = matches!(byte, b',' | b'}' | b']');
        let is_its_end = |value: &mut Value| ends_a_value && value.depth == self.depth;
        match self.value.take_if(is_its_end) {
            Some(value) => self.take(&value),
            None => self.keep(byte),
        }
        match byte {
            b'"' if self.depth > 0 => {
                self.place = Place::String;
                self.name.clear();
            }
            b'{' | b'[' => self.depth = self.depth.saturating_add(1),
            b'}' | b']' => self.depth = self.depth.saturating_sub(1),
            b':' if self.value.is_none() && (1..=MAX_DEPTH).contains(&self.depth) => {
                let of = match &*self.name {
                    b"model" | b"modelVersion" => Name::Model,
                    b"usage" | b"usageMetadata" => Name::Tokens,
                    b"error" | b"code" => Name::Error,
                    _ => return,
                };
                self.value = Some(Value {
                    of,
                    depth: self.depth,
                    bytes: Vec::new(),
                });
            }
            _ => {}
        }
    }

    fn keep(&mut self, byte: u8) {
        if let Some(value) = &mut self.value {
            value.bytes.push(byte);
            // Nothing that states tokens is so long.
            self.value.take_if(|value| value.bytes.len() > MAX_VALUE);
        }
    }

    fn take(&mut self, value: &Value) {
        match value.of {
            Name::Model => self.take_model(value),
            Name::Tokens => {
                if let Some(tokens) = tokens(self.provider, &value.bytes) {
                    self.tokens = Some(self.tokens.unwrap_or_default().max(tokens));
                }
            }
            Name::Error => {
                let status = overload(self.provider, &value.bytes);
                self.overload = self.overload.or(status);
            }
        }
    }

    fn take_model(&mut self, value: &Value) {
        let model: Option<String> = serde_json::from_slice(&value.bytes).ok();
        let is_plain = |model: &String| {
            (1..=MAX_MODEL).contains(&model.len())
                && model.bytes().all(|byte| byte.is_ascii_graphic())
        };
        let is_outer = self
            .model
            .as_ref()
            .is_none_or(|(depth, _)| value.depth <= *depth);
        if let Some(model) = model.filter(is_plain).filter(|_| is_outer) {
            self.model = Some((value.depth, model));
        }
    }

    fn lost(&mut self) {
        self.depth = 0;
        self.place = Place::Outside;
        self.value = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const RESPONSE: &str = concat!(
        "event: response.created\n",
        r#"data: {"type":"response.created","response":{"id":"r1","model":"gpt-x","usage":null}}"#,
        "\n\nevent: response.output_text.delta\n",
        r#"data: {"type":"response.output_text.delta","delta":"\"usage\":{\"input_tokens\":7} [{"}"#,
        "\n\nevent: response.completed\n",
        r#"data: {"type":"response.completed","response":{"id":"r1","model":"gpt-x-2","output":[{"content":[{"text":"}]","usage":{"input_tokens":9}}]}],"usage":{"input_tokens":100,"input_tokens_details":{"cached_tokens":60},"output_tokens":20,"output_tokens_details":{"reasoning_tokens":5},"total_tokens":120}}}"#,
        "\n\n",
    );
    const COMPLETION: &str = r#"{"id": "c1", "model": "gpt-y", "choices": [{"message": {"content": "hi"}}],
        "usage": {"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15,
                  "prompt_tokens_details": {"cached_tokens": 4, "audio_tokens": 0}}}"#;
    const MESSAGE: &str = concat!(
        "event: message_start\n",
        r#"data: {"type":"message_start","message":{"id":"m1","type":"message","role":"assistant","content":[],"model":"claude-x","usage":{"input_tokens":25,"cache_creation_input_tokens":10,"cache_read_input_tokens":5,"output_tokens":1}}}"#,
        "\n\nevent: ping\ndata: {\"type\": \"ping\"}\n\nevent: message_delta\n",
        r#"data: {"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":15}}"#,
        "\n\n",
    );
    const CHUNKS: &str = r#"[{"candidates":[{"content":{"parts":[{"text":"a"}]}}],
        "usageMetadata":{"promptTokenCount":8,"totalTokenCount":8},"modelVersion":"gemini-x"},
        {"candidates":[{"content":{"parts":[{"functionCall":{"args":{"usageMetadata":{"promptTokenCount":900}}}}]}}],
        "usageMetadata":{"promptTokenCount":8,"candidatesTokenCount":4,"thoughtsTokenCount":6,"cachedContentTokenCount":2,"totalTokenCount":18,
        "promptTokensDetails":[{"modality":"TEXT","tokenCount":8}]},"modelVersion":"gemini-x"}]"#;

    const ANSWERS: [(Vendor, &str, &str, [u64; 4]); 4] = [
        (Vendor::OpenAi, RESPONSE, "gpt-x-2", [100, 60, 0, 20]),
        (Vendor::OpenAi, COMPLETION, "gpt-y", [12, 4, 0, 3]),
        (Vendor::Anthropic, MESSAGE, "claude-x", [40, 5, 10, 15]),
        (Vendor::Google, CHUNKS, "gemini-x", [8, 2, 0, 10]),
    ];

    fn tokens([input, cached_input, cache_write, output]: [u64; 4]) -> Tokens {
        Tokens {
            input,
            cached_input,
            cache_write,
            output,
        }
    }

    #[test]
    fn each_apis_tokens_are_read_from_answers_and_streams() {
        for (provider, answer, model, stated) in ANSWERS {
            let mut scanner = Scanner::new(provider);
            scanner.read(answer.as_bytes());
            assert_eq!(scanner.stated(), Some((Some(model), tokens(stated))));
            assert_eq!((scanner.depth, scanner.overload()), (0, None));
        }
    }

    #[test]
    fn what_states_nothing_counts_nothing() {
        for answer in [
            "",
            "not JSON, \"usage\": {\"input_tokens\": 3}",
            r#"{"input_tokens": 14}"#,
            r#"{"usage": null}"#,
            r#"{"usage": "a lot"}"#,
            r#"{"usage": [3]}"#,
            r#"{"usage": {"prompt_characters": 3}}"#,
            r#"{"usage": {"input_tokens": -1}}"#,
            r#"{"a": {"b": {"usage": {"input_tokens": 3}}}}"#,
            r#"{"content": "usage", "b": {"input_tokens": 3}}"#,
            r#"{"error": {"type": "overloaded_error", "message": "usage"}}"#,
        ] {
            let mut scanner = Scanner::new(Vendor::OpenAi);
            scanner.read(answer.as_bytes());
            assert_eq!(scanner.stated(), None, "{answer}");
        }
    }

    #[test]
    fn an_overload_within_an_answer_is_found_and_no_other_error() {
        let start =
            r#"data: {"type":"message_start","message":{"model":"m","usage":{"input_tokens":5}}}"#;
        let error =
            r#"{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}"#;
        for (provider, answer, status) in [
            (
                Vendor::Anthropic,
                format!("event: message_start\n{start}\n\nevent: error\ndata: {error}\n\n"),
                Some(529),
            ),
            (
                Vendor::Anthropic,
                error.replace("overloaded", "invalid_request"),
                None,
            ),
            (
                Vendor::OpenAi,
                r#"data: {"type":"response.failed","response":{"error":{"code":"server_is_overloaded","message":"m"},"usage":null}}"#.into(),
                Some(503),
            ),
            (
                Vendor::OpenAi,
                r#"data: {"type":"error","code":"rate_limit_exceeded","message":"m","param":null}"#.into(),
                Some(429),
            ),
            (
                Vendor::OpenAi,
                r#"{"response":{"error":null,"output":[{"content":[{"error":{"code":"server_error"}}]}]}}"#.into(),
                None,
            ),
            (
                Vendor::Google,
                r#"[{"error":{"code":503,"message":"m","status":"UNAVAILABLE"}}]"#.into(),
                Some(503),
            ),
            (Vendor::Google, r#"{"error":{"code":400}}"#.into(), None),
        ] {
            let mut scanner = Scanner::new(provider);
            scanner.read(answer.as_bytes());
            let found = scanner.overload().map(|status| status.as_u16());
            assert_eq!(found, status, "{answer}");
        }
    }

    #[test]
    fn an_event_that_ends_in_a_string_does_not_hide_the_next_one() {
        let mut scanner = Scanner::new(Vendor::Anthropic);
        scanner.read(b"data: {\"text\": \"{[{ cut\n\n");
        scanner.read(MESSAGE.as_bytes());
        let stated = scanner.stated();
        assert_eq!(stated, Some((Some("claude-x"), tokens([40, 5, 10, 15]))));
    }

    #[test]
    fn a_command_does_not_choose_the_model_that_is_counted() {
        let own = r#""model": "gpt-x", "usage": {"input_tokens": 3}"#;
        let repeated = r#""metadata": {"model": "x", "usage": "5"}"#;
        for answer in [
            format!("{{{own}, {repeated}}}"),
            format!("{{{repeated}, {own}}}"),
            format!(r#"data: {{"type": "t", "response": {{{own}, {repeated}}}}}"#),
        ] {
            let mut scanner = Scanner::new(Vendor::OpenAi);
            scanner.read(answer.as_bytes());
            assert_eq!(
                scanner.stated(),
                Some((Some("gpt-x"), tokens([3, 0, 0, 0])))
            );
        }
    }

    #[test]
    fn a_long_value_is_not_kept() {
        let mut scanner = Scanner::new(Vendor::OpenAi);
        scanner.read(b"{\"usage\": {\"text\": \"");
        for _ in 0..100 {
            scanner.read(&[b'x'; 1000]);
            let kept = scanner.value.as_ref().map_or(0, |value| value.bytes.len());
            assert!(kept <= MAX_VALUE, "{kept}");
        }
        scanner.read(b"\", \"input_tokens\": 1}}");
        assert_eq!(scanner.stated(), None);
    }

    proptest! {
        #[test]
        fn pieces_of_any_size_state_the_same(
            which in 0..ANSWERS.len(),
            sizes in prop::collection::vec(1usize..40, 1..20),
        ) {
            let (provider, answer, model, stated) = ANSWERS[which];
            let (mut scanner, mut left) = (Scanner::new(provider), answer.as_bytes());
            for size in sizes.iter().cycle() {
                let (piece, rest) = left.split_at(left.len().min(*size));
                scanner.read(piece);
                left = rest;
                if left.is_empty() {
                    break;
                }
            }
            prop_assert_eq!(scanner.stated(), Some((Some(model), tokens(stated))));
        }

        #[test]
        fn what_a_model_says_counts_nothing(text in ".*", stated in 1u64..1000) {
            let answer = serde_json::json!({
                "content": [{ "text": text, "input": { "usage": { "input_tokens": 5000 } } }],
                "usage": { "input_tokens": stated },
            });
            let mut scanner = Scanner::new(Vendor::Anthropic);
            scanner.read(answer.to_string().as_bytes());
            let (_, tokens) = scanner.stated().expect("it is stated");
            prop_assert_eq!(tokens.input, stated);
        }
    }
}
