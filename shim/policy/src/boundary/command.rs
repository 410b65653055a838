//! A command must be one program with its arguments: what a shell would read as more is refused.

use crate::sink::Limits;

/// Characters with a meaning of their own in a shell, outside of quotes or within double ones.
const SYNTAX: &str = ";&|<>`$\\(){}!*?[]~#^";

/// What is not a command of one program.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotPlain {
    #[error("the command is empty")]
    Empty,
    #[error("the command has the control character {0:?}")]
    Control(char),
    #[error("the command has `{0}`, which a shell does not take as it is")]
    Syntax(char),
    #[error("the command has a quotation mark without its partner")]
    Quotes,
    #[error("the command has {words} words, at most {max} are allowed")]
    Words { words: usize, max: usize },
    #[error("the command sets the variable `{0}`, which is not allowed")]
    Variable(String),
    #[error("the program `{0}` is not allowed")]
    Program(String),
}

/// The words of a command: what would be executed, without a shell.
///
/// # Errors
/// If a shell would not take the command as these words.
pub fn words(command: &str) -> Result<Vec<String>, NotPlain> {
    if let Some(control) = command.chars().find(|character| {
        character.is_control() || matches!(character, '\u{2028}' | '\u{2029}' | '\u{85}')
    }) {
        return Err(NotPlain::Control(control));
    }
    if let Some(syntax) = command
        .chars()
        .find(|character| SYNTAX.contains(*character))
    {
        return Err(NotPlain::Syntax(syntax));
    }
    let words = shlex::split(command).ok_or(NotPlain::Quotes)?;
    if words.is_empty() {
        return Err(NotPlain::Empty);
    }
    Ok(words)
}

pub(super) fn check(command: &str, allowed: &[String], limits: &Limits) -> Result<(), NotPlain> {
    let words = words(command)?;
    let max = limits.max_args.unwrap_or(usize::MAX);
    if words.len() > max {
        return Err(NotPlain::Words {
            words: words.len(),
            max,
        });
    }
    let denied = limits.denied_env_vars.as_deref().unwrap_or_default();
    for word in &words {
        let name = word.split_once('=').map(|(name, _)| name);
        if let Some(name) = name.filter(|name| denied.iter().any(|denied| denied == name)) {
            return Err(NotPlain::Variable(name.into()));
        }
    }
    let program = &words[0];
    // An assignment is not in the list, and neither is a path: it could lead to another program.
    if !allowed.contains(program) {
        return Err(NotPlain::Program(program.clone()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(command: &str) -> Result<(), NotPlain> {
        let sinks = crate::sink::Sinks::common();
        let limits = &sinks.get("bash", "exec").expect("a common sink").metadata;
        super::check(
            command,
            limits.allowed_commands.as_ref().expect("a list"),
            limits,
        )
    }

    #[test]
    fn plain_commands_are_taken() {
        for command in [
            "ls",
            "ls -la /tmp",
            "echo 'a b' \"c d\"",
            "grep -n needle file.txt",
        ] {
            check(command).unwrap();
        }
        assert_eq!(words("echo 'a b' c").unwrap(), ["echo", "a b", "c"]);
    }

    #[test]
    fn whatever_a_shell_could_read_as_more_is_refused() {
        for (command, refused) in [
            ("", NotPlain::Empty),
            ("  ", NotPlain::Empty),
            ("ls\nid", NotPlain::Control('\n')),
            ("ls\rid", NotPlain::Control('\r')),
            ("ls\u{85}id", NotPlain::Control('\u{85}')),
            ("ls; id", NotPlain::Syntax(';')),
            ("ls && id", NotPlain::Syntax('&')),
            ("ls | id", NotPlain::Syntax('|')),
            ("echo `id`", NotPlain::Syntax('`')),
            ("echo $(id)", NotPlain::Syntax('$')),
            ("echo \"$HOME\"", NotPlain::Syntax('$')),
            ("echo $'a'", NotPlain::Syntax('$')),
            ("ls > a", NotPlain::Syntax('>')),
            ("echo a\\ b", NotPlain::Syntax('\\')),
            ("ls *", NotPlain::Syntax('*')),
            ("echo 'a", NotPlain::Quotes),
            ("id", NotPlain::Program("id".into())),
            ("/bin/ls", NotPlain::Program("/bin/ls".into())),
            ("A=1 ls", NotPlain::Program("A=1".into())),
            ("LD_PRELOAD=x ls", NotPlain::Variable("LD_PRELOAD".into())),
            ("\u{200b}ls", NotPlain::Program("\u{200b}ls".into())),
        ] {
            assert_eq!(check(command), Err(refused), "{command:?}");
        }
        let many = vec!["ls"; 17].join(" ");
        assert_eq!(check(&many), Err(NotPlain::Words { words: 17, max: 16 }));
    }

    proptest! {
        #[test]
        fn a_command_that_is_taken_begins_with_an_allowed_program(command in "[ls'\" a-z;=\n$]{0,20}") {
            if check(&command).is_ok() {
                let words = words(&command).unwrap();
                prop_assert!(["ls", "pwd", "echo", "cat", "head", "tail", "grep"].contains(&words[0].as_str()));
                prop_assert!(!command.contains([';', '\n', '$']));
            }
        }
    }
}
