//! What a run starts: an argv, or a prompt, which an agent that waits may have instead.

use bytes::Bytes;
use polydev_proto::{
    exec, init,
    node::RunSpec,
    prompt::{self, Options},
    provider::{Provider, Vendor},
    runtime::{Prompt, RunStart, run_start::Command},
    workspace,
};

use super::Invalid;
use crate::{
    provider::{Cli, Prompt as CliPrompt},
    secret::PreparedFile,
};

/// An agent has no key of its own.
const NO_KEY: &str = "the run has no key at the broker";

/// A checked command.
pub(super) struct Asked {
    pub(super) argv: Vec<Bytes>,
    /// A prompt that is too long for an argument.
    pub(super) stdin: Option<Bytes>,
    /// What its CLI reads in its home.
    pub(super) files: Vec<PreparedFile>,
    /// The same as the argv, for an agent.
    pub(super) prompt: Option<init::Prompt>,
}

/// Takes the command out of the start message.
pub(super) fn read(provider: Provider, start: &mut RunStart) -> Result<Asked, Invalid> {
    let argv = match start.command.take() {
        Some(Command::Argv(argv)) if argv.text.is_empty() => argv.args,
        Some(Command::Argv(argv)) if argv.args.is_empty() => {
            argv.text.into_iter().map(Bytes::from).collect()
        }
        Some(Command::Argv(_)) => {
            return Err(Invalid::Value {
                field: "argv",
                given: "both `args` and `text`".into(),
                allowed: "only one of them",
            });
        }
        Some(Command::Prompt(prompt)) => {
            let vendor = provider.vendor().map_err(|_| Invalid::Value {
                field: "command",
                given: "a prompt".into(),
                allowed: "an argv, because Python has no model",
            })?;
            return read_prompt(vendor, start, prompt);
        }
        None => {
            return Err(Invalid::Value {
                field: "command",
                given: String::new(),
                allowed: "an argv or a prompt",
            });
        }
    };
    Ok(Asked {
        argv,
        stdin: None,
        files: Vec::new(),
        prompt: None,
    })
}

fn read_prompt(provider: Vendor, start: &RunStart, prompt: Prompt) -> Result<Asked, Invalid> {
    let tools = tools(prompt.tools)?;
    let Prompt {
        text,
        model,
        conversation,
        system,
        tools: _,
        trust_files: trusts_files,
    } = prompt;
    let options = Options::of(provider, &system, tools)?;
    let text = prompt::as_text(provider, text);
    let is_long = text.len() > exec::PROMPT_IN_ARGV;
    let argv = match conversation && text.is_empty() {
        // It is not started, and not empty.
        true => {
            prompt::check("-", &model)?;
            vec![provider.name().to_owned()]
        }
        false => provider.prompt(&CliPrompt {
            text: &text,
            model: Some(model.as_str()).filter(|model| !model.is_empty()),
            options: &options,
        })?,
    };
    if conversation {
        check_conversation(provider, start, &text)?;
    }
    let never = [
        for_no_agent(start, conversation).map(str::to_owned),
        prompt::is_command_to_agent(provider, &text)
            .then(|| "the CLI would take the text for a command".to_owned()),
    ];
    let at_start = [
        read_at_start(provider, start).map(|name| format!("the CLI reads `{name}` when it starts")),
        (!system.is_empty()).then(|| "the CLI takes `system` when it starts".to_owned()),
        (!options.is_empty()).then(|| "the CLI takes `tools` when it starts".to_owned()),
    ];
    let (never, at_start) = (
        never.into_iter().flatten().next(),
        at_start.into_iter().flatten().next(),
    );
    let starts_again = never.is_none() && at_start.is_some();
    let cold_reason = never.or(at_start);
    let stdin_bytes = if is_long { text.len() as u64 } else { 0 };
    let (text, stdin) = match is_long {
        true => (String::new(), Some(text.into())),
        false => (text, None),
    };
    Ok(Asked {
        argv: argv.into_iter().map(Bytes::from).collect(),
        stdin,
        // An agent writes its own.
        files: if conversation {
            Vec::new()
        } else {
            options.files.into_iter().map(PreparedFile::from).collect()
        },
        prompt: Some(init::Prompt {
            text,
            model,
            cold_reason: cold_reason.unwrap_or_else(|| NO_KEY.to_owned()),
            stdin_bytes,
            conversation,
            system,
            tools: tools.into(),
            starts_again,
            trusts_files,
        }),
    })
}

fn tools(given: i32) -> Result<init::Tools, Invalid> {
    init::Tools::try_from(given).map_err(|_| Invalid::Value {
        field: "prompt.tools",
        given: given.to_string(),
        allowed: "TOOLS_UNSPECIFIED, TOOLS_NONE, TOOLS_READ or TOOLS_ALL",
    })
}

/// A conversation is for an agent, and its further prompts come as stdin.
fn check_conversation(provider: Vendor, start: &RunStart, text: &str) -> Result<(), Invalid> {
    if !start.stdin {
        return Err(Invalid::Value {
            field: "stdin",
            given: "false".into(),
            allowed: "true in a conversation, whose further prompts come as stdin",
        });
    }
    if text.len() > exec::PROMPT_IN_ARGV {
        return Err(Invalid::Value {
            field: "prompt.text",
            given: "longer than 131007 bytes".into(),
            allowed: "shorter in a conversation; stdin takes longer prompts",
        });
    }
    let reason = match prompt::is_command_to_agent(provider, text) {
        true => Some("the CLI would take the text for a command"),
        false => for_no_agent(start, true),
    };
    match reason.or(start.credential.is_none().then_some(NO_KEY)) {
        Some(reason) => Err(Invalid::Conversation {
            reason: reason.to_owned(),
        }),
        None => Ok(()),
    }
}

/// What of the run comes too late for a CLI that has started.
fn read_at_start(provider: Vendor, start: &RunStart) -> Option<&str> {
    start.files.iter().find_map(|file| {
        let names = provider.reads_at_start();
        let first = file.path.split('/').next()?;
        names.contains(&first).then_some(first)
    })
}

/// What of the run no agent can have.
fn for_no_agent(start: &RunStart, conversation: bool) -> Option<&'static str> {
    let reasons = [
        (!start.env.is_empty(), "the run has variables in `env`"),
        (start.terminal.is_some(), "the run has a `terminal`"),
        (start.stdin && !conversation, "the run has `stdin`"),
        (
            !["", workspace::PATH].contains(&&*start.work_dir),
            "the run has a `work_dir` of its own",
        ),
    ];
    let found = reasons.into_iter().find(|(is_so, _)| *is_so);
    found.map(|(_, reason)| reason)
}

/// The run's key is at the broker, or not: nothing else keeps an agent from having the prompt.
///
/// # Errors
/// [`Invalid::Conversation`]
pub(super) fn has_key(spec: &mut RunSpec, is_outside: bool) -> Result<(), Invalid> {
    let Some(prompt) = &mut spec.prompt else {
        return Ok(());
    };
    if is_outside && prompt.cold_reason == NO_KEY {
        prompt.cold_reason.clear();
    }
    if !is_outside {
        prompt.starts_again = false;
    }
    match prompt.conversation && !is_outside {
        true => Err(Invalid::Conversation {
            reason: NO_KEY.to_owned(),
        }),
        false => Ok(()),
    }
}
