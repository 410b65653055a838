//! The configuration file of `serve`. The keys are the options, so that there is one list of
//! both. A key that the command line or the environment has set is ignored. Every other key
//! becomes an option.

use std::{any::TypeId, ffi::OsString, fs, path::Path, path::PathBuf, process::ExitCode};

use clap::{
    Arg, ArgMatches, Command as Clap, CommandFactory, Parser, error::ErrorKind, parser::ValueSource,
};
use polydev_cli::{Output, print};
use serde_json::json;
use toml::{Table, Value};

use super::{Arguments, serve};

#[derive(clap::Subcommand)]
pub(super) enum Command {
    /// Check the configuration that `serve` would use: options, environment, configuration file,
    /// and the files that these name. This command opens no socket and contacts no service.
    Check(Check),
}

#[derive(clap::Args)]
pub(super) struct Check {
    #[command(flatten)]
    serve: serve::Arguments,
    /// How to print the configuration.
    #[arg(long, value_enum, default_value = "text")]
    output: Output,
}

/// Parses the arguments, with the file that they name. Exits the process if they are not valid.
pub(super) fn parse() -> Arguments {
    let parsed = words().and_then(Arguments::try_parse_from);
    parsed.unwrap_or_else(|error| error.exit())
}

/// The arguments, followed by the options that the file adds.
fn words() -> Result<Vec<OsString>, clap::Error> {
    let words: Vec<OsString> = std::env::args_os().collect();
    let matches = first_look(&words)?;
    with_file(words, &matches)
}

/// Parses the arguments without the file. Required options may be missing, as the file may have
/// them.
fn first_look(words: &[OsString]) -> Result<ArgMatches, clap::Error> {
    let command = Arguments::command().ignore_errors(true);
    command.try_get_matches_from(words)
}

fn with_file(mut words: Vec<OsString>, matches: &ArgMatches) -> Result<Vec<OsString>, clap::Error> {
    let Some(given) = options_of(matches) else {
        return Ok(words);
    };
    let Some(path) = given.get_one::<PathBuf>("config") else {
        return Ok(words);
    };
    let refuse = |problem: String| {
        let problem = format!("configuration `{}`: {problem}\n", path.display());
        clap::Error::raw(ErrorKind::ValueValidation, problem)
    };
    let table = read(path).map_err(&refuse)?;
    let serve = serve();
    for (key, value) in &table {
        let Some(option) = options(&serve).find(|option| *key == key_of(option)) else {
            let keys: Vec<_> = options(&serve).map(key_of).collect();
            let keys = keys.join(", ");
            return Err(refuse(format!(
                "`{key}` is an unknown key; allowed are {keys}"
            )));
        };
        let texts = texts(option, value).ok_or_else(|| {
            refuse(format!(
                "`{key}` is `{value}`: allowed are a string, an integer and a non-empty list of \
                 strings; for a switch true and false"
            ))
        })?;
        let source = given.value_source(option.get_id().as_str());
        if matches!(
            source,
            Some(ValueSource::CommandLine | ValueSource::EnvVariable)
        ) {
            continue;
        }
        let long = option.get_long().unwrap_or_default();
        words.extend(texts.iter().map(|text| format!("--{long}={text}").into()));
    }
    Ok(words)
}

fn read(path: &Path) -> Result<Table, String> {
    let text = fs::read_to_string(path).map_err(|error| error.to_string())?;
    text.parse::<Table>().map_err(|error| error.to_string())
}

/// The matches of the subcommand that takes the options of `serve`.
fn options_of(matches: &ArgMatches) -> Option<&ArgMatches> {
    match matches.subcommand()? {
        ("serve", given) => Some(given),
        ("config", given) => given.subcommand().map(|(_, given)| given),
        _ => None,
    }
}

fn serve() -> Clap {
    let all = Arguments::command();
    let serve = all.find_subcommand("serve");
    serve.expect("it is one of the commands").clone()
}

/// The options that a file may contain.
fn options(serve: &Clap) -> impl Iterator<Item = &Arg> {
    let options = serve.get_arguments();
    options.filter(|option| {
        option
            .get_long()
            .is_some_and(|long| long != "config" && long != "help")
    })
}

fn key_of(option: &Arg) -> String {
    option.get_long().unwrap_or_default().replace('-', "_")
}

/// The value as the command line writes it; `None` if the option has no values of this kind.
fn texts(option: &Arg, value: &Value) -> Option<Vec<String>> {
    let is_switch = option.get_value_parser().type_id() == TypeId::of::<bool>();
    match value {
        Value::String(text) => Some(vec![text.clone()]),
        Value::Integer(number) => Some(vec![number.to_string()]),
        Value::Boolean(value) if is_switch => Some(vec![value.to_string()]),
        Value::Array(values) if !values.is_empty() => {
            let text = |value: &Value| value.as_str().map(str::to_owned);
            values.iter().map(text).collect()
        }
        _ => None,
    }
}

pub(super) fn execute(Command::Check(arguments): Command) -> anyhow::Result<ExitCode> {
    arguments.serve.check()?;
    let before = first_look(&std::env::args_os().collect::<Vec<_>>())?;
    let matches = Arguments::command().try_get_matches_from(words()?)?;
    let (Some(before), Some(given)) = (options_of(&before), options_of(&matches)) else {
        anyhow::bail!("there are no options");
    };
    let serve = serve();
    let mut text = String::new();
    for option in options(&serve) {
        let id = option.get_id().as_str();
        let values = given.get_raw(id).into_iter().flatten();
        let values: Vec<_> = values.map(|value| value.to_string_lossy()).collect();
        let from = match (before.value_source(id), given.value_source(id)) {
            (_, None) => continue,
            (Some(ValueSource::EnvVariable), _) => "environment",
            (Some(ValueSource::CommandLine), _) => "option",
            (_, Some(ValueSource::CommandLine)) => "file",
            (_, Some(_)) => "default",
        };
        text.push_str(&match arguments.output {
            Output::Text => format!(
                "{:<18}  {:<14}  {}\n",
                key_of(option),
                from,
                values.join(", ")
            ),
            Output::Json => {
                format!(
                    "{}\n",
                    json!({ "key": key_of(option), "from": from, "values": values })
                )
            }
        });
    }
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(text: &str, options: &[&str]) -> Result<Vec<String>, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), text).unwrap();
        let path = file.path().display().to_string();
        let words = ["polydev-shim", "serve", "--config", &path];
        let words: Vec<OsString> = words.iter().chain(options).map(OsString::from).collect();
        let matches = first_look(&words).unwrap();
        let before = words.len();
        let words = with_file(words, &matches).map_err(|error| error.to_string())?;
        Arguments::command()
            .try_get_matches_from(&words)
            .map_err(|error| error.to_string())?;
        let added = words.into_iter().skip(before);
        Ok(added.map(|word| word.into_string().unwrap()).collect())
    }

    #[test]
    fn a_file_says_what_options_do_not() {
        let file = "user_running = 3\nlisten = [\"unix:///a\", \"unix:///b\"]\nroles = \"/r\"\n";
        assert_eq!(
            with(file, &[]).unwrap(),
            [
                "--listen=unix:///a",
                "--listen=unix:///b",
                "--roles=/r",
                "--user-running=3"
            ]
        );
        assert_eq!(
            with(file, &["--listen", "unix:///c", "--roles=/s"]).unwrap(),
            ["--user-running=3"]
        );
        let switch = "policy = \"/p\"\npolicy_shadow = true\n";
        assert_eq!(
            with(switch, &[]).unwrap(),
            ["--policy=/p", "--policy-shadow=true"]
        );
        // Options that require each other may come from two places.
        let file = "tls_key = \"/k\"\ntls_ca = \"/a\"\n";
        assert_eq!(with(file, &["--tls-cert=/c"]).unwrap().len(), 2);
    }

    #[test]
    fn a_file_that_is_not_understood_is_refused_by_key() {
        for (file, words) in [
            (
                "lisen = \"unix:///a\"",
                "`lisen` is an unknown key; allowed are listen,",
            ),
            ("config = \"x\"", "`config` is an unknown key"),
            ("roles = true", "`roles` is `true`: allowed are"),
            ("listen = [1]", "`listen` is"),
            ("roles = []", "`roles` is"),
            ("listen", "configuration"),
            ("user_running = 0", "--user-running"),
            ("listen = \"http://0.0.0.0:1\"", "not a loopback address"),
        ] {
            let refused = with(file, &[]).unwrap_err();
            assert!(refused.contains(words), "{refused}");
        }
    }

    #[test]
    fn the_documentation_lists_every_key_with_its_default_and_variable() {
        let documentation = include_str!("../../../docs/configuration.md");
        let rows = documentation.lines().filter(|line| line.starts_with("| `"));
        let documented: Vec<&str> = rows.collect();
        let serve = serve();
        for option in options(&serve) {
            let defaults: Vec<_> = option.get_default_values().iter().collect();
            let cell = |text: &str| match text {
                "" => String::new(),
                text => format!(" `{text}`"),
            };
            let default = defaults
                .first()
                .map_or("", |default| default.to_str().unwrap());
            let variable = option.get_env().map_or("", |name| name.to_str().unwrap());
            let key = key_of(option);
            let row = format!("| `{key}` |{} |{} |", cell(default), cell(variable));
            let found = documented.iter().any(|line| line.starts_with(&row));
            assert!(found, "no row begins with {row}");
        }
        assert_eq!(documented.len(), options(&serve).count());
    }
}
