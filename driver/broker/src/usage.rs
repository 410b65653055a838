//! Tokens, and how each API states them.

use polydev_proto::provider::Vendor;
use serde::Deserialize;

/// Tokens of one answer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tokens {
    /// All of what was sent.
    pub input: u64,
    /// Those that were read from a cache.
    pub cached_input: u64,
    /// Those that were written to a cache.
    pub cache_write: u64,
    pub output: u64,
}

impl Tokens {
    /// The larger of each: an API repeats in later events what it has stated before.
    pub(crate) fn max(self, other: Self) -> Self {
        Self {
            input: self.input.max(other.input),
            cached_input: self.cached_input.max(other.cached_input),
            cache_write: self.cache_write.max(other.cache_write),
            output: self.output.max(other.output),
        }
    }
}

/// What `usage` or `usageMetadata` says; `None` if it is null or says nothing.
pub(crate) fn tokens(provider: Vendor, json: &[u8]) -> Option<Tokens> {
    let tokens = match provider {
        Vendor::OpenAi => serde_json::from_slice(json).ok().map(OpenAi::tokens),
        Vendor::Anthropic => serde_json::from_slice(json).ok().map(Anthropic::tokens),
        Vendor::Google => serde_json::from_slice(json).ok().map(Google::tokens),
    };
    tokens.filter(|tokens| *tokens != Tokens::default())
}

/// Of responses and, by other names, of chat completions. A gateway may send both.
#[derive(Deserialize)]
struct OpenAi {
    input_tokens: Option<u64>,
    prompt_tokens: Option<u64>,
    output_tokens: Option<u64>,
    completion_tokens: Option<u64>,
    input_tokens_details: Option<Cached>,
    prompt_tokens_details: Option<Cached>,
}

#[derive(Deserialize)]
struct Cached {
    cached_tokens: Option<u64>,
}

impl OpenAi {
    fn tokens(self) -> Tokens {
        let cached = self.input_tokens_details.or(self.prompt_tokens_details);
        Tokens {
            input: self.input_tokens.or(self.prompt_tokens).unwrap_or(0),
            cached_input: cached.and_then(|of| of.cached_tokens).unwrap_or(0),
            cache_write: 0,
            output: self.output_tokens.or(self.completion_tokens).unwrap_or(0),
        }
    }
}

/// Tokens that a cache had or got are not among `input_tokens`. The last event of a stream may
/// have `output_tokens` alone.
#[derive(Deserialize)]
struct Anthropic {
    input_tokens: Option<u64>,
    cache_creation_input_tokens: Option<u64>,
    cache_read_input_tokens: Option<u64>,
    output_tokens: Option<u64>,
}

impl Anthropic {
    fn tokens(self) -> Tokens {
        let cached_input = self.cache_read_input_tokens.unwrap_or(0);
        let cache_write = self.cache_creation_input_tokens.unwrap_or(0);
        let others = self.input_tokens.unwrap_or(0);
        Tokens {
            input: others
                .saturating_add(cached_input)
                .saturating_add(cache_write),
            cached_input,
            cache_write,
            output: self.output_tokens.unwrap_or(0),
        }
    }
}

/// Thoughts are not among `candidatesTokenCount`.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Google {
    prompt_token_count: Option<u64>,
    tool_use_prompt_token_count: Option<u64>,
    cached_content_token_count: Option<u64>,
    candidates_token_count: Option<u64>,
    thoughts_token_count: Option<u64>,
}

impl Google {
    fn tokens(self) -> Tokens {
        let sum = |one: Option<u64>, other: Option<u64>| {
            one.unwrap_or(0).saturating_add(other.unwrap_or(0))
        };
        Tokens {
            input: sum(self.prompt_token_count, self.tool_use_prompt_token_count),
            cached_input: self.cached_content_token_count.unwrap_or(0),
            cache_write: 0,
            output: sum(self.candidates_token_count, self.thoughts_token_count),
        }
    }
}
