//! Which environment variables a caller may set.

use std::collections::BTreeMap;

/// The runtime sets these variables. The command can trust them to describe the run.
const RUNTIME: [&str; 4] = ["HOME", "PROVIDER", "USER_ID", "WARM_POOL"];

/// Credentials set these variables. The command can trust them to be the user's.
const CREDENTIALS: [&str; 10] = [
    "ANTHROPIC_API_KEY",
    "ANTHROPIC_AUTH_TOKEN",
    "CLAUDE_CODE_OAUTH_TOKEN",
    "CODEX_API_KEY",
    "GEMINI_API_KEY",
    "GOOGLE_API_KEY",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "GOOGLE_CLOUD_PROJECT",
    "GOOGLE_GENAI_USE_VERTEXAI",
    "OPENAI_API_KEY",
];

/// Loaders, shells and interpreters read these variables before the first line of the command.
/// A caller who sets them can run other code.
const LOADERS: [&str; 13] = [
    "BASH_ENV",
    "ENV",
    "GCONV_PATH",
    "GLIBC_TUNABLES",
    "NODE_OPTIONS",
    "NODE_PATH",
    "PERL5LIB",
    "PERL5OPT",
    "PROMPT_COMMAND",
    "PYTHONHOME",
    "PYTHONPATH",
    "PYTHONSTARTUP",
    "RUBYOPT",
];

/// A variable that a caller may not set.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("`env[{name:?}]` {reason}")]
pub struct Refused {
    pub name: String,
    pub reason: &'static str,
}

/// # Errors
/// [`Refused`] for the first name that a caller cannot set.
pub fn check(env: &BTreeMap<String, String>) -> Result<(), Refused> {
    for name in env.keys() {
        if CREDENTIALS.contains(&name.as_str()) {
            return refuse(name, "cannot be set: only credentials set it");
        }
        check_secret(name)?;
    }
    Ok(())
}

/// # Errors
/// [`Refused`] if not even a credential can set the name.
pub fn check_secret(name: &str) -> Result<(), Refused> {
    if RUNTIME.contains(&name) {
        return refuse(name, "cannot be set: the runtime sets it");
    }
    if LOADERS.contains(&name) || name.starts_with("LD_") || name.starts_with("BASH_FUNC_") {
        return refuse(name, "cannot be set: a loader or interpreter reads it");
    }
    Ok(())
}

fn refuse(name: &str, reason: &'static str) -> Result<(), Refused> {
    Err(Refused {
        name: name.to_owned(),
        reason,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_identity_and_loaders_are_not_the_callers_to_set() {
        for name in [
            "OPENAI_API_KEY",
            "USER_ID",
            "LD_PRELOAD",
            "NODE_OPTIONS",
            "BASH_ENV",
            "HOME",
        ] {
            let refused = check(&BTreeMap::from([(name.to_owned(), String::new())])).unwrap_err();
            assert!(refused.to_string().contains(name));
        }
        let ordinary =
            ["ANTHROPIC_BASE_URL", "PATH", "TERM", "LDX"].map(|name| (name.into(), "x".into()));
        check(&ordinary.into()).unwrap();
    }
}
