//! The command line.

use std::{
    env,
    fs::File,
    io::{Read, Write},
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::{Context, bail};
use polydev_policy::{
    decision::Decision,
    evaluate::{self, Gate},
    provenance::{Graph, NodeId, Source},
    rules::Rules,
    token::Token,
};
use serde::{Deserialize, Serialize};
use serde_json::json;
use time::OffsetDateTime;

use crate::{
    batch::Batch,
    demo,
    payload::{self, MAX_PAYLOAD},
    registry::Registry,
    report::{self, Output, Report},
    settings::{PLACEHOLDER, Settings},
};

/// Longest file that is read, in bytes.
const MAX_FILE: u64 = 4 << 20;

/// What can be asked for.
#[derive(Debug, clap::Parser)]
#[command(
    name = "polydev-tool-gate",
    version,
    about = "Decides each tool call of a model's answer, and executes what is allowed",
    after_help = "Exit status: 0 all calls were executed, 1 error, 2 wrong arguments, 3 at least one \
                  call is blocked, 4 at least one needs an approval, 5 at least one program failed, 6 the \
                  report could not be written.\n\n\
                  The switches MVAR_* of the environment are in docs/tool-gate.md."
)]
pub enum Command {
    /// Decide about the calls of an answer, and execute what is allowed.
    Run(Run),
    /// Decide about the calls, and print decisions and tokens. Nothing is executed.
    Decide(Input),
    /// Show one call that is executed and one that is blocked.
    Demo(Show),
    /// Use one token twice, in two runs that share a store: the first run prints
    /// `nonce_probe=ALLOW`, the second `nonce_probe=BLOCK`.
    Probe,
    /// Show three tasks without and with the gate.
    Trilogy,
    /// Print the hash of the policy, for MVAR_EXPECTED_POLICY_HASH.
    Hash(Policy),
}

#[derive(Debug, clap::Args)]
pub struct Run {
    #[command(flatten)]
    input: Input,
    /// The output of `decide` for this payload. A call then needs the token that it has there.
    #[arg(long, value_name = "FILE")]
    decided: Option<PathBuf>,
    /// Execute nothing unless every call is allowed; the first one that is not is an error.
    #[arg(long)]
    strict: bool,
    #[command(flatten)]
    show: Show,
}

#[derive(Debug, clap::Args)]
pub struct Show {
    /// How the report is written.
    #[arg(long, value_enum, default_value_t = Output::Text)]
    output: Output,
}

#[derive(Debug, clap::Args)]
pub struct Policy {
    /// The tools, in TOML.
    #[arg(long, value_name = "FILE")]
    registry: PathBuf,
    /// Rules in Cedar, beside those that always hold.
    #[arg(long, value_name = "FILE")]
    rules: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub struct Input {
    #[command(flatten)]
    policy: Policy,
    /// The answer of the model; `-` is stdin.
    #[arg(long, value_name = "FILE", default_value = "-")]
    payload: PathBuf,
    /// What the user has asked for.
    #[arg(long, value_name = "TEXT", default_value = "")]
    prompt: String,
    /// What was retrieved for it: external_doc, web, email or plugin, and a file. Without it and
    /// without `--trusted`, something unknown was.
    #[arg(long, value_name = "SOURCE=FILE", value_parser = retrieved)]
    retrieved: Vec<(String, PathBuf)>,
    /// Nothing but the prompt has entered the conversation.
    #[arg(long, conflicts_with = "retrieved")]
    trusted: bool,
}

/// What `decide` prints, and `run --decided` reads.
#[derive(Debug, Serialize, Deserialize)]
struct Decisions {
    graph: Graph,
    node: NodeId,
    calls: Vec<DecidedCall>,
}

#[derive(Debug, Serialize, Deserialize)]
struct DecidedCall {
    tool: Option<String>,
    /// Missing for a call that is none of a tool here.
    decision: Option<Decision>,
    /// Why it is none.
    error: Option<String>,
    /// Missing for a call that is not allowed, or without a secret.
    token: Option<Token>,
}

impl Command {
    /// Does what the command says; the exit status is in [`report`].
    ///
    /// # Errors
    /// What is wrong before a call is decided about.
    pub fn execute(self) -> anyhow::Result<ExitCode> {
        // Other variables may be anything.
        let named = env::vars_os().filter_map(|(name, value)| {
            Some((
                name.into_string().ok()?,
                value.to_string_lossy().into_owned(),
            ))
        });
        let settings = Settings::read(named)?;
        match self {
            Self::Run(run) => run.execute(&real(settings)?),
            Self::Decide(input) => input.decide(&real(settings)?),
            Self::Demo(show) => {
                let report = demo::show(settings)?;
                report.write(show.output)?;
                // This is what the demo is about.
                let is_shown = (report.executed_calls, report.blocked_calls) == (1, 1);
                Ok(if is_shown {
                    ExitCode::SUCCESS
                } else {
                    report.exit_code()
                })
            }
            Self::Probe => demo::probe(settings),
            Self::Trilogy => demo::trilogy(settings),
            Self::Hash(policy) => {
                let (gate, _) = policy.read(&settings)?;
                writeln!(std::io::stdout(), "{}", gate.policy_hash())?;
                Ok(ExitCode::SUCCESS)
            }
        }
    }
}

/// Everybody knows the secret of the cookbook.
fn real(settings: Settings) -> anyhow::Result<Settings> {
    if settings.is_placeholder {
        bail!(
            "the secret of execution tokens is `{PLACEHOLDER}`; choose one, for example with `openssl rand -hex 32`"
        );
    }
    Ok(settings)
}

impl Run {
    fn execute(&self, settings: &Settings) -> anyhow::Result<ExitCode> {
        if self.decided.is_some() && !settings.is_shared() {
            bail!(
                "`--decided` needs MVAR_EXECUTION_TOKEN_NONCE_PERSIST=1: nothing else remembers which \
                 tokens were used"
            );
        }
        let (gate, registry) = self.input.policy.read(settings)?;
        let calls = payload::calls(&self.input.payload()?)?;
        let earlier: Option<Decisions> = match &self.decided {
            None => None,
            Some(path) => {
                let text = read(path)?;
                let parsed = serde_json::from_str(&text);
                Some(parsed.with_context(|| {
                    format!("`{}` is not the output of `decide`", path.display())
                })?)
            }
        };
        let (graph, node, tokens) = match earlier {
            Some(Decisions { graph, node, calls }) => {
                let tokens = calls.into_iter().map(|call| call.token).collect::<Vec<_>>();
                (graph, node, Some(tokens))
            }
            None => {
                let (graph, node) = self.input.provenance()?;
                (graph, node, None)
            }
        };
        let batch = Batch {
            gate: &gate,
            registry: &registry,
            settings,
            graph: &graph,
            node: &node,
            notes: &[],
            is_bound: self.decided.is_some(),
        };
        let now = OffsetDateTime::now_utc();
        let mut decided = batch.decide(calls, now);
        if let Some(tokens) = tokens {
            let mut tokens = tokens.into_iter();
            for call in &mut decided {
                call.token = tokens.next().flatten();
            }
        }
        let entries = batch.execute(decided, &mut settings.nonces()?, self.strict, now);
        let report = Report::new("polydev_tool_gate", entries);
        if let Err(error) = report.write(self.show.output) {
            report::error(&format!("cannot write the report: {error}"));
            return Ok(ExitCode::from(report::UNTOLD));
        }
        if self.strict
            && let Some(refused) = report.refused()
        {
            report::error(&refused);
        }
        Ok(report.exit_code())
    }
}

impl Input {
    fn decide(&self, settings: &Settings) -> anyhow::Result<ExitCode> {
        let (gate, registry) = self.policy.read(settings)?;
        let calls = payload::calls(&self.payload()?)?;
        let (graph, node) = self.provenance()?;
        let batch = Batch {
            gate: &gate,
            registry: &registry,
            settings,
            graph: &graph,
            node: &node,
            notes: &[],
            is_bound: false,
        };
        let decided = batch.decide(calls, OffsetDateTime::now_utc());
        let code = report::exit_code(decided.iter().map(|call| call.outcome().into()));
        let calls = decided.into_iter().map(|call| DecidedCall {
            tool: call.call.name,
            token: call.token,
            error: call.found.as_ref().err().map(ToString::to_string),
            decision: call.found.ok().map(|(_, decision)| decision),
        });
        let calls = calls.collect();
        let mut out = std::io::stdout().lock();
        serde_json::to_writer_pretty(&mut out, &Decisions { graph, node, calls })?;
        writeln!(out)?;
        Ok(code)
    }

    fn payload(&self) -> anyhow::Result<String> {
        if self.payload != Path::new("-") {
            return read(&self.payload);
        }
        let mut text = String::new();
        let limit = u64::try_from(MAX_PAYLOAD)? + 1;
        std::io::stdin()
            .take(limit)
            .read_to_string(&mut text)
            .context("cannot read stdin")?;
        Ok(text)
    }

    fn provenance(&self) -> anyhow::Result<(Graph, NodeId)> {
        let mut graph = Graph::default();
        let mut retrieved = Vec::new();
        for (source, path) in &self.retrieved {
            let source = Source::named(source).with_context(|| format!("no source `{source}`"))?;
            retrieved.push((source, read(path)?));
        }
        if retrieved.is_empty() && !self.trusted {
            retrieved.push((Source::Document, String::new()));
        }
        let retrieved: Vec<_> = retrieved
            .iter()
            .map(|(source, text)| (*source, text.as_str()))
            .collect();
        let node = graph.turn(&self.prompt, &retrieved)?;
        Ok((graph, node))
    }
}

impl Policy {
    fn read(&self, settings: &Settings) -> anyhow::Result<(Gate, Registry)> {
        let text = read(&self.registry)?;
        let registry =
            Registry::read(&text).with_context(|| format!("`{}`", self.registry.display()))?;
        let rules = match &self.rules {
            None => Rules::builtin(),
            Some(path) => {
                Rules::read(&read(path)?).with_context(|| format!("`{}`", path.display()))?
            }
        };
        Ok((gate(&registry, rules, settings), registry))
    }
}

/// A gate for the tools of a registry.
pub fn gate(registry: &Registry, rules: Rules, settings: &Settings) -> Gate {
    let mut sinks = registry.sinks.clone();
    settings.limit(&mut sinks);
    Gate {
        sinks,
        grants: registry.grants.clone(),
        rules,
        settings: evaluate::Settings {
            expected_policy_hash: settings.expected_policy_hash.clone(),
            others: json!({ "switches": settings.hashed(), "tools": registry.entries() }),
        },
    }
}

fn retrieved(text: &str) -> Result<(String, PathBuf), String> {
    let (source, path) = text.split_once('=').ok_or("must be SOURCE=FILE")?;
    match Source::named(source) {
        None | Some(Source::User | Source::Credential) => Err(format!(
            "source `{source}`; allowed are external_doc, web, email and plugin"
        )),
        Some(_) => Ok((source.into(), path.into())),
    }
}

fn read(path: &Path) -> anyhow::Result<String> {
    let read = || {
        let mut text = String::new();
        File::open(path)?
            .take(MAX_FILE + 1)
            .read_to_string(&mut text)?;
        std::io::Result::Ok(text)
    };
    let text = read().with_context(|| format!("cannot read `{}`", path.display()))?;
    if text.len() as u64 > MAX_FILE {
        bail!("`{}` has more than {MAX_FILE} bytes", path.display());
    }
    Ok(text)
}
