//! What a run starts: an argv, or a prompt, which an agent that waits may have instead.

use bytes::Bytes;
use polydev_proto::{
    exec, init,
    node::RunSpec,
    provider::Provider,
    runtime::{RunStart, run_start::Command},
    workspace,
};

use super::Invalid;
use crate::provider::{Cli, Prompt};

/// An agent has no key of its own.
const NO_KEY: &str = "the run has no key at the broker";

/// A checked command.
pub(super) struct Asked {
    pub(super) argv: Vec<Bytes>,
    /// A prompt that is too long for an argument.
    pub(super) stdin: Option<Bytes>,
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
            let text = provider.as_text(prompt.text);
            let model = Some(prompt.model.as_str()).filter(|model| !model.is_empty());
            let argv = provider.prompt(&Prompt {
                text: &text,
                model,
                env: &start.env,
            })?;
            let cold_reason = match provider.is_command_to_agent(&text) {
                true => "the CLI would take the text for a command".to_owned(),
                false => cold_reason(provider, start).unwrap_or_else(|| NO_KEY.to_owned()),
            };
            let stdin_bytes = match text.len() > exec::PROMPT_IN_ARGV {
                true => text.len() as u64,
                false => 0,
            };
            let (text, stdin) = match text.len() > exec::PROMPT_IN_ARGV {
                true => (String::new(), Some(text.into())),
                false => (text, None),
            };
            return Ok(Asked {
                argv: argv.into_iter().map(Bytes::from).collect(),
                stdin,
                prompt: Some(init::Prompt {
                    text,
                    model: prompt.model,
                    cold_reason,
                    stdin_bytes,
                }),
            });
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
        prompt: None,
    })
}

/// What an agent cannot have any more, because its CLI has started.
fn cold_reason(provider: Provider, start: &RunStart) -> Option<String> {
    let read = start.files.iter().find_map(|file| {
        let names = provider.reads_at_start();
        let first = file.path.split('/').next()?;
        names.contains(&first).then_some(first)
    });
    if let Some(name) = read {
        return Some(format!("the CLI reads `{name}` when it starts"));
    }
    let reasons = [
        (!start.env.is_empty(), "the run has variables in `env`"),
        (start.terminal.is_some(), "the run has a `terminal`"),
        (start.stdin, "the run has `stdin`"),
        (
            !["", workspace::PATH].contains(&&*start.work_dir),
            "the run has a `work_dir` of its own",
        ),
    ];
    let found = reasons.into_iter().find(|(is_so, _)| *is_so);
    found.map(|(_, reason)| reason.to_owned())
}

/// The run's key is at the broker: nothing else keeps an agent from having the prompt.
pub(super) fn has_outside_key(spec: &mut RunSpec) {
    if let Some(prompt) = &mut spec.prompt
        && prompt.cold_reason == NO_KEY
    {
        prompt.cold_reason.clear();
    }
}
