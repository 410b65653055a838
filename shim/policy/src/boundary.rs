//! What no call may contain, whoever asks: checked on the text itself, before anything else.
//!
//! - [`command`](mod@command): commands of one program, without a shell's syntax;
//! - [`address`]: URLs that lead to public hosts;
//! - [`leak`]: secrets on their way to a program that sends them.

pub mod address;
pub mod command;
pub mod leak;

use serde_json::Value;

use crate::sink::Sink;

/// Longest target, in bytes.
pub const MAX_TARGET: usize = 1024;
/// Longest text of a call that is searched, in bytes; a call with a longer one is refused.
pub const MAX_TEXT: usize = 32_768;
/// Most texts of one call.
const MAX_TEXTS: usize = 1024;

/// What is wrong with a call.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    #[error("the target has {0} bytes, at most {MAX_TARGET} are allowed")]
    LongTarget(usize),
    #[error("an argument has {0} bytes, at most {MAX_TEXT} are allowed")]
    LongText(usize),
    #[error("the call has more than {MAX_TEXTS} texts")]
    ManyTexts,
    #[error(transparent)]
    Command(#[from] command::NotPlain),
    #[error(transparent)]
    Address(#[from] address::NotPublic),
    #[error("secret material together with a program that sends data")]
    Leak,
}

/// Checks a call's target and all its arguments.
///
/// # Errors
/// The first [`Violation`].
pub fn check(sink: &Sink, target: &str, arguments: &Value) -> Result<(), Violation> {
    if target.len() > MAX_TARGET {
        return Err(Violation::LongTarget(target.len()));
    }
    let mut texts = vec![target];
    collect(arguments, &mut texts)?;
    if let Some(long) = texts.iter().find(|text| text.len() > MAX_TEXT) {
        return Err(Violation::LongText(long.len()));
    }
    let limits = &sink.metadata;
    if let Some(commands) = &limits.allowed_commands {
        command::check(target, commands, limits)?;
    }
    if let Some(domains) = &limits.allowed_domains {
        address::check(target, domains)?;
    }
    if leak::is_in(&texts) {
        return Err(Violation::Leak);
    }
    Ok(())
}

/// All strings of the arguments, names of members too.
fn collect<'a>(value: &'a Value, texts: &mut Vec<&'a str>) -> Result<(), Violation> {
    if texts.len() > MAX_TEXTS {
        return Err(Violation::ManyTexts);
    }
    match value {
        Value::String(text) => texts.push(text),
        Value::Array(values) => {
            for value in values {
                collect(value, texts)?;
            }
        }
        Value::Object(members) => {
            for (name, value) in members {
                texts.push(name);
                collect(value, texts)?;
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
    Ok(())
}
