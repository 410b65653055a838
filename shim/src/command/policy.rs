//! `polydev-shim policy ...`: checks and tries out the rules of `serve --policy`. These commands
//! call no shim.

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::Context;
use polydev_policy::{
    decision::Outcome,
    rules::{RunFacts, SCHEMA, Verdict},
};
use polydev_shim::{
    approval::{Approvals, webhook::Webhook},
    audit::Audit,
    permission::Signer,
    policy::{self, RunPolicy},
};
use serde::Deserialize;
use url::Url;

/// The rules of a shim.
#[derive(clap::Args)]
#[group(id = "policy_rules")]
pub(super) struct Rules {
    /// Rules in Cedar, which say what runs may start, beside what roles allow. The file is read
    /// again when it changes. [default: roles alone decide]
    #[arg(long, env = "POLYDEV_POLICY", value_name = "FILE")]
    policy: Option<PathBuf>,
    /// Record what the rules of --policy decide, and let everything start.
    #[arg(
        long,
        value_name = "BOOL",
        requires = "policy",
        default_value_t = false,
        default_missing_value = "true",
        num_args = 0..=1,
        require_equals = true,
        action = clap::ArgAction::Set
    )]
    policy_shadow: bool,
    /// An Ed25519 private key in PEM, which signs what may start, for drivers that require execution
    /// tokens. The file is read again when it changes. [default: nothing is signed]
    #[arg(long, env = "POLYDEV_EXECUTION_KEY_FILE", value_name = "FILE")]
    execution_key_file: Option<PathBuf>,
    /// Seconds that runs and calls of tools wait for somebody's approval, if the rules require one.
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 900,
        value_parser = clap::value_parser!(u32).range(1..=1200)
    )]
    approval_timeout: u32,
    /// URL that the shim sends a request to whenever something waits for an approval, and when it is
    /// decided; https, or http to a loopback address. [default: nobody is told]
    #[arg(
        long,
        env = "POLYDEV_APPROVAL_WEBHOOK",
        value_name = "URL",
        requires = "approval_webhook_secret_file"
    )]
    approval_webhook: Option<Url>,
    /// File with the secret that signs these requests, as Standard Webhooks has it: `whsec_` and 24 to
    /// 64 bytes in base64.
    #[arg(
        long,
        env = "POLYDEV_APPROVAL_WEBHOOK_SECRET_FILE",
        value_name = "FILE",
        requires = "approval_webhook"
    )]
    approval_webhook_secret_file: Option<PathBuf>,
}

impl Rules {
    pub(super) fn load(&self) -> anyhow::Result<RunPolicy> {
        match &self.policy {
            Some(path) => Ok(RunPolicy::load(path, self.policy_shadow)?),
            None => Ok(RunPolicy::default()),
        }
    }

    pub(super) fn signer(&self) -> anyhow::Result<Signer> {
        match &self.execution_key_file {
            Some(path) => Ok(Signer::load(path)?),
            None => Ok(Signer::default()),
        }
    }

    pub(super) fn approvals(&self, audit: &Audit) -> Approvals {
        let timeout = Duration::from_secs(self.approval_timeout.into());
        Approvals::new(timeout, audit.clone())
    }

    pub(super) fn webhook(&self) -> anyhow::Result<Webhook> {
        match (&self.approval_webhook, &self.approval_webhook_secret_file) {
            (Some(url), Some(secret)) => Ok(Webhook::open(url.clone(), secret)?),
            // clap has seen that there are both or none.
            _ => Ok(Webhook::default()),
        }
    }
}

#[derive(clap::Subcommand)]
pub(super) enum Command {
    /// Check that a file of rules is understood, and print its hash.
    Check {
        /// Rules in Cedar.
        rules: PathBuf,
    },
    /// Ask rules about the runs of a file, and compare the answers. Exits with 1 if one differs.
    Test {
        /// Rules in Cedar.
        rules: PathBuf,
        /// Runs in TOML: each `[[case]]` has `name`, `expect` (allow, step_up or block), `rule`
        /// (optional, the rule that must give the reason), and the run under `[case.run]`.
        cases: PathBuf,
    },
    /// Print what rules decide about one run, and which of them.
    Explain {
        /// Rules in Cedar.
        rules: PathBuf,
        /// A run in TOML, with the names of `[case.run]`.
        run: PathBuf,
    },
    /// Print the schema that rules are checked with.
    Schema,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Cases {
    case: Vec<Case>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    name: String,
    expect: Outcome,
    #[serde(default)]
    rule: Option<String>,
    run: RunFacts,
}

pub(super) fn execute(command: &Command) -> anyhow::Result<ExitCode> {
    let mut out = io::stdout().lock();
    match command {
        Command::Check { rules } => {
            let hash = policy::read(rules)?.hash().to_owned();
            writeln!(out, "the rules are valid; their hash is {hash}")?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Test { rules, cases } => test(&mut out, rules, cases),
        Command::Explain { rules, run } => {
            let rules = policy::read(rules)?;
            let facts: RunFacts = read(run)?;
            let verdict = rules.run(&facts);
            writeln!(out, "outcome: {}", verdict.outcome.name())?;
            writeln!(out, "reason:  {}", verdict.reason)?;
            writeln!(out, "rules:   {}", named(&verdict))?;
            writeln!(out, "policy:  {}", rules.hash())?;
            writeln!(out, "run:     {}", facts.hash())?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Schema => {
            write!(out, "{SCHEMA}")?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn test(out: &mut impl Write, rules: &Path, cases: &Path) -> anyhow::Result<ExitCode> {
    let rules = policy::read(rules)?;
    let cases: Cases = read(cases)?;
    let total = cases.case.len();
    let mut failed = 0;
    for case in cases.case {
        let verdict = rules.run(&case.run);
        let gave = verdict.rules.first();
        let is_right = case.rule.as_ref().is_none_or(|rule| Some(rule) == gave);
        if verdict.outcome == case.expect && is_right {
            continue;
        }
        failed += 1;
        let rule = case
            .rule
            .map(|rule| format!(" by `{rule}`"))
            .unwrap_or_default();
        writeln!(
            out,
            "{}: expected {}{rule}, got {} by {}: {}",
            case.name,
            case.expect.name(),
            verdict.outcome.name(),
            named(&verdict),
            verdict.reason,
        )?;
    }
    writeln!(out, "{} of {total} cases are as expected", total - failed)?;
    Ok(ExitCode::from(u8::from(failed > 0)))
}

fn named(verdict: &Verdict) -> String {
    match verdict.rules.as_slice() {
        [] => "no rule".into(),
        rules => rules.join(", "),
    }
}

fn read<T: for<'de> Deserialize<'de>>(path: &Path) -> anyhow::Result<T> {
    let text = fs::read_to_string(path);
    let text = text.with_context(|| format!("cannot read `{}`", path.display()))?;
    toml::from_str(&text).with_context(|| format!("`{}` is not understood", path.display()))
}
