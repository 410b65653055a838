//! The kernel's limits on a command. Both sides check them: the shim to inform its caller,
//! the driver because a shim may be wrong.

/// Longest argument or `NAME=value`, without its NUL: `MAX_ARG_STRLEN` in `linux/binfmts.h`.
pub const MAX_STRING: usize = 131_071;
/// Most bytes of a prompt passed as an argument; with its prefix it stays within
/// [`MAX_STRING`]. A longer prompt goes to the CLI's stdin.
pub const PROMPT_IN_ARGV: usize = MAX_STRING - 64;
/// Most bytes of argv and environment together, counting each string with its NUL and its
/// pointer. Linux allows a quarter of the stack limit, 2 MiB by default; the rest is left
/// for the image's own environment.
pub const MAX_TOTAL: usize = 3 << 19;

/// Why a command cannot be executed; `field` is relative to the command.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{field}` {problem}")]
pub struct Invalid {
    pub field: String,
    pub problem: String,
}

pub(crate) fn invalid(field: impl Into<String>, problem: impl Into<String>) -> Invalid {
    Invalid {
        field: field.into(),
        problem: problem.into(),
    }
}

/// # Errors
/// [`Invalid`] names the first value that the kernel would reject.
pub fn check<'a>(
    argv: impl IntoIterator<Item = &'a [u8]>,
    env: impl IntoIterator<Item = (&'a str, &'a str)>,
) -> Result<(), Invalid> {
    let mut total = 0;
    let mut empty = true;
    for (index, arg) in argv.into_iter().enumerate() {
        let field = format!("argv[{index}]");
        if index == 0 && arg.is_empty() {
            return Err(invalid(field, "is empty; it must name the program"));
        }
        check_string(&field, arg, arg.len())?;
        total += arg.len() + 1 + size_of::<usize>();
        empty = false;
    }
    if empty {
        return Err(invalid("argv", "is empty; it must name a program"));
    }
    for (name, value) in env {
        let field = format!("env[{name:?}]");
        if name.is_empty() || name.contains('=') {
            return Err(invalid(field, "has a name that is empty or contains `=`"));
        }
        let length = name.len() + 1 + value.len();
        check_string(&field, name.as_bytes(), length)?;
        check_string(&field, value.as_bytes(), length)?;
        total += length + 1 + size_of::<usize>();
    }
    if total > MAX_TOTAL {
        let problem =
            format!("and `env` have {total} bytes together; at most {MAX_TOTAL} are allowed");
        return Err(invalid("argv", problem));
    }
    Ok(())
}

fn check_string(field: &str, bytes: &[u8], length: usize) -> Result<(), Invalid> {
    if let Some(at) = bytes.iter().position(|byte| *byte == 0) {
        return Err(invalid(field, format!("has a NUL byte at offset {at}")));
    }
    if length > MAX_STRING {
        return Err(invalid(
            field,
            format!("has {length} bytes; at most {MAX_STRING} are allowed"),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn refused(argv: &[&[u8]], env: &[(&str, &str)], field: &str) {
        let error = check(argv.iter().copied(), env.iter().copied()).unwrap_err();
        assert_eq!(error.field, field, "{error}");
    }

    #[test]
    fn what_the_kernel_would_not_take_is_named() {
        let long = "x".repeat(MAX_STRING + 1);
        refused(&[], &[], "argv");
        refused(&[b""], &[], "argv[0]");
        refused(&[b"sh", b"a\0b"], &[], "argv[1]");
        refused(&[b"sh", long.as_bytes()], &[], "argv[1]");
        refused(&[b"sh"], &[("", "x")], "env[\"\"]");
        refused(&[b"sh"], &[("A=B", "x")], "env[\"A=B\"]");
        refused(&[b"sh"], &[("A", "x\0")], "env[\"A\"]");
        refused(&[b"sh"], &[("A", &long)], "env[\"A\"]");
        let many = vec![&long.as_bytes()[1..]; 13];
        refused(&many, &[], "argv");
    }

    #[test]
    fn awkward_but_possible_commands_pass() {
        let longest = "x".repeat(MAX_STRING);
        let argv: [&[u8]; 4] = [b"sh", b"", b"$(id) `id` '\"\n\xff", longest.as_bytes()];
        check(argv, [("A", ""), ("B", "=\n")]).unwrap();
    }
}
