//! The rules of a prompt, for who passes it on and for the agent that reads more of them.

use crate::provider::Provider;

/// Largest number of bytes in a prompt: with the rest of a run it fits into one message.
pub const MAX_TEXT: usize = 3 << 20;

/// A prompt that the CLI would not accept.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{field}` {problem}")]
pub struct Invalid {
    pub field: &'static str,
    pub problem: &'static str,
}

/// Checks what holds for all CLIs. An empty model is the CLI's choice.
///
/// # Errors
/// [`Invalid`]
pub fn check(text: &str, model: &str) -> Result<(), Invalid> {
    let problems = [
        ("prompt.text", text.is_empty(), "is empty"),
        ("prompt.text", text.len() > MAX_TEXT, "is longer than 3 MiB"),
        ("prompt.text", text.contains('\0'), "has a NUL byte"),
        ("prompt.model", model.starts_with('-'), "begins with `-`"),
    ];
    match problems.into_iter().find(|(_, is_so, _)| *is_so) {
        Some((field, _, problem)) => Err(Invalid { field, problem }),
        None => Ok(()),
    }
}

/// A prompt's text, changed so that the provider's CLI does not take it for a command of its own.
#[must_use]
pub fn as_text(provider: Provider, text: String) -> String {
    match provider {
        // Claude Code 2.1.332 does what `/clear` says, in each of its forms, but not what
        // ` /clear` says.
        Provider::Anthropic if text.starts_with('/') => format!(" {text}"),
        _ => text,
    }
}

/// Whether a CLI that waits would take the text for a command of its own.
#[must_use]
pub fn is_command_to_agent(provider: Provider, text: &str) -> bool {
    // Gemini CLI 0.61 does what `/memory show` and `$memory show` say, but only with `--acp`.
    provider == Provider::Google && text.trim_start().starts_with(['/', '$'])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_cli_would_take_is_refused_by_its_field() {
        let refused = |text: &str, model| check(text, model).unwrap_err().to_string();
        assert_eq!(refused("", ""), "`prompt.text` is empty");
        assert_eq!(refused("a\0", ""), "`prompt.text` has a NUL byte");
        assert_eq!(refused("hi", "--yolo"), "`prompt.model` begins with `-`");
        let longest = "x".repeat(MAX_TEXT);
        assert_eq!(check(&longest, "m"), Ok(()));
        assert_eq!(
            refused(&(longest + "x"), ""),
            "`prompt.text` is longer than 3 MiB"
        );
    }
}
