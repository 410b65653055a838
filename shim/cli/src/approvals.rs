//! `polydev-shim approvals list|show|approve|deny|watch`

use std::process::ExitCode;

use polydev_proto::{
    provider::Provider,
    runtime::{
        Approval, ApprovalRun, ApprovalToolCall, ApproveRequest, DenyRequest, GetApprovalRequest,
        ListApprovalsRequest, WatchApprovalsRequest, approval::Subject,
    },
};
use serde_json::{Value, json};

use crate::{Options, Output, age, answer, print, told};

#[derive(clap::Subcommand)]
pub enum Command {
    /// List what waits for an approval at this shim, oldest first.
    List(List),
    /// Show one of them with everything that is to be approved.
    Show(One),
    /// Approve it: the run gets its slot in its turn, and the call of a tool is made.
    Approve(Decide),
    /// Deny it: the run ends, and the call of a tool is not made.
    Deny(Decide),
    /// Show what waits, and then each approval that comes or ends.
    Watch(List),
}

/// Which approvals.
#[derive(clap::Args)]
pub struct List {
    /// Only for runs of this user.
    #[arg(long, default_value = "", hide_default_value = true)]
    user: String,
    /// Only for this provider: openai, anthropic, google or python.
    #[arg(long)]
    provider: Option<Provider>,
    #[command(flatten)]
    options: Options,
}

#[derive(clap::Args)]
pub struct One {
    /// The approval's id, as `approvals list` and `run` print it.
    approval_id: String,
    #[command(flatten)]
    options: Options,
}

#[derive(clap::Args)]
pub struct Decide {
    /// The approval's id, as `approvals list` and `run` print it.
    approval_id: String,
    /// What to say about it, for the records; a denial tells the caller too.
    #[arg(long, default_value = "", hide_default_value = true)]
    comment: String,
    #[command(flatten)]
    options: Options,
}

/// # Errors
/// If the shim cannot be reached, or refuses the call.
pub async fn execute(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::List(arguments) => list(arguments).await,
        Command::Show(arguments) => show(arguments).await,
        Command::Approve(arguments) => approve(arguments).await,
        Command::Deny(arguments) => deny(arguments).await,
        Command::Watch(arguments) => watch(arguments).await,
    }?;
    Ok(ExitCode::SUCCESS)
}

async fn list(arguments: List) -> anyhow::Result<()> {
    let provider = arguments.provider();
    let List { user, options, .. } = arguments;
    let mut shim = options.connect().await?;
    let request = ListApprovalsRequest {
        user_id: user,
        provider,
    };
    let found = answer(shim.list_approvals(request)).await?;
    heading(options.output)?;
    Ok(print(&lines(&found.approvals, options.output))?)
}

async fn watch(arguments: List) -> anyhow::Result<()> {
    let provider = arguments.provider();
    let List { user, options, .. } = arguments;
    let mut shim = options.connect().await?;
    let request = WatchApprovalsRequest {
        user_id: user,
        provider,
    };
    let mut changes = answer(shim.watch_approvals(request)).await?;
    heading(options.output)?;
    while let Some(change) = changes.message().await.map_err(told)? {
        print(&lines(&change.approvals, options.output))?;
    }
    anyhow::bail!("the shim ended the stream")
}

async fn show(
    One {
        approval_id,
        options,
    }: One,
) -> anyhow::Result<()> {
    let mut shim = options.connect().await?;
    let request = GetApprovalRequest { approval_id };
    let found = answer(shim.get_approval(request)).await?.approval;
    let approval = found.unwrap_or_default();
    Ok(print(&match options.output {
        Output::Json => format!("{}\n", to_json(&approval)),
        Output::Text => details(&approval),
    })?)
}

async fn approve(
    Decide {
        approval_id,
        comment,
        options,
    }: Decide,
) -> anyhow::Result<()> {
    let mut shim = options.connect().await?;
    let request = ApproveRequest {
        approval_id,
        comment,
    };
    let decided = answer(shim.approve(request)).await?.approval;
    tell(&decided.unwrap_or_default(), options.output)
}

async fn deny(
    Decide {
        approval_id,
        comment,
        options,
    }: Decide,
) -> anyhow::Result<()> {
    let mut shim = options.connect().await?;
    let request = DenyRequest {
        approval_id,
        comment,
    };
    let decided = answer(shim.deny(request)).await?.approval;
    tell(&decided.unwrap_or_default(), options.output)
}

impl List {
    fn provider(&self) -> String {
        let name = |provider: Provider| provider.to_string();
        self.provider.map_or_else(String::new, name)
    }
}

fn tell(approval: &Approval, output: Output) -> anyhow::Result<()> {
    Ok(print(&match output {
        Output::Json => format!("{}\n", to_json(approval)),
        Output::Text => format!("{} {}\n", state(approval), approval.approval_id),
    })?)
}

fn heading(output: Output) -> std::io::Result<()> {
    if output == Output::Json {
        return Ok(());
    }
    print(&format!(
        "{:<36}  {:<9}  {:<5}  {:<9}  {:<16}  {:<16}  WHAT\n",
        "APPROVAL", "STATE", "AGE", "PROVIDER", "USER", "CALLER"
    ))
}

fn lines(approvals: &[Approval], output: Output) -> String {
    let line = |approval| match output {
        Output::Text => line(approval),
        Output::Json => format!("{}\n", to_json(approval)),
    };
    approvals.iter().map(line).collect()
}

fn line(approval: &Approval) -> String {
    let line = format!(
        "{:<36}  {:<9}  {:<5}  {:<9}  {:<16}  {:<16}  {}",
        approval.approval_id,
        state(approval),
        age(approval.requested_at),
        approval.provider,
        approval.user_id,
        approval.caller,
        approval.summary,
    );
    format!("{}\n", plain(&line))
}

/// A text of somebody who wants to be approved, without what could make a terminal show something else:
/// control characters, and those that change the direction of what follows.
fn plain(text: &str) -> String {
    let is_plain = |letter: char| {
        let turns = matches!(letter, '\u{61c}' | '\u{200e}' | '\u{200f}'
            | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        !letter.is_control() && !turns
    };
    text.chars()
        .flat_map(|letter| match is_plain(letter) {
            true => vec![letter],
            false => letter.escape_unicode().collect(),
        })
        .collect()
}

fn state(approval: &Approval) -> String {
    let name = approval.state().as_str_name();
    name.trim_start_matches("APPROVAL_STATE_").to_lowercase()
}

fn time(at: Option<prost_types::Timestamp>) -> String {
    at.map_or_else(|| "-".into(), |at| at.to_string())
}

/// What is to be approved, member by member. Texts of commands and prompts are printed as JSON.
fn details(approval: &Approval) -> String {
    let quoted = |text: &str| json!(text).to_string();
    let mut rows = vec![
        ("approval", approval.approval_id.clone()),
        ("state", state(approval)),
        ("requested", time(approval.requested_at)),
        ("expires", time(approval.expires_at)),
        ("caller", approval.caller.clone()),
        ("user", approval.user_id.clone()),
        ("provider", approval.provider.clone()),
        ("run", approval.run_id.clone()),
        ("reason", approval.reason.clone()),
        ("rules", approval.rules.join(", ")),
    ];
    match &approval.subject {
        Some(Subject::Run(run)) => rows.extend(run_rows(run)),
        Some(Subject::ToolCall(call)) => rows.extend([
            ("node", call.node_id.clone()),
            ("tool", format!("{} ({})", call.tool, call.name)),
            ("arguments", quoted(&call.arguments)),
            ("entered", call.entered.join(", ")),
        ]),
        None => {}
    }
    let rows = rows.iter().filter(|(_, value)| !value.is_empty());
    rows.map(|(name, value)| format!("{name:<12}  {}\n", plain(value)))
        .collect()
}

fn run_rows(run: &ApprovalRun) -> Vec<(&'static str, String)> {
    let quoted = |text: &String| match text.is_empty() {
        true => String::new(),
        false => json!(text).to_string(),
    };
    let all = |texts: &[String]| texts.iter().map(quoted).collect::<Vec<_>>().join(" ");
    let flags = [
        ("conversation", run.conversation),
        ("trusts files", run.trusts_files),
        ("stdin", run.stdin),
        ("terminal", run.terminal),
    ];
    let set = flags.iter().filter(|(_, is_set)| *is_set);
    let set: Vec<_> = set.map(|(name, _)| *name).collect();
    let egress = run.egress.as_ref().map(|egress| match &egress.allow[..] {
        [] => "nothing beside the model".to_owned(),
        allow => allow.join(", "),
    });
    vec![
        ("command", all(&run.argv)),
        ("prompt", quoted(&run.prompt)),
        ("system", quoted(&run.system)),
        ("model", run.model.clone()),
        ("tools", run.tools.clone()),
        ("with", set.join(", ")),
        ("variables", run.env.join(" ")),
        ("folder", quoted(&run.work_dir)),
        ("files", all(&run.files)),
        ("file bytes", run.file_bytes.to_string()),
        (
            "timeout",
            run.timeout
                .map(|timeout| timeout.to_string())
                .unwrap_or_default(),
        ),
        ("credential", run.credential.clone()),
        ("egress", egress.unwrap_or_default()),
    ]
}

fn to_json(approval: &Approval) -> Value {
    let mut json = json!({
        "approval_id": approval.approval_id, "state": state(approval), "caller": approval.caller,
        "user_id": approval.user_id, "provider": approval.provider, "run_id": approval.run_id,
        "reason": approval.reason, "rules": approval.rules, "policy_hash": approval.policy_hash,
        "facts_hash": approval.facts_hash, "summary": approval.summary,
        "requested_at": time(approval.requested_at), "expires_at": time(approval.expires_at),
        "decided_by": approval.decided_by, "comment": approval.comment,
    });
    match &approval.subject {
        Some(Subject::Run(run)) => json["run"] = run_json(run),
        Some(Subject::ToolCall(call)) => json["tool_call"] = call_json(call),
        None => {}
    }
    json
}

fn run_json(run: &ApprovalRun) -> Value {
    json!({
        "argv": run.argv, "prompt": run.prompt, "system": run.system, "model": run.model,
        "tools": run.tools, "conversation": run.conversation, "trusts_files": run.trusts_files,
        "stdin": run.stdin, "terminal": run.terminal, "env": run.env, "work_dir": run.work_dir,
        "files": run.files, "file_bytes": run.file_bytes,
        "timeout": run.timeout.map(|timeout| timeout.to_string()), "credential": run.credential,
        "egress": run.egress.as_ref().map(|egress| &egress.allow),
    })
}

fn call_json(call: &ApprovalToolCall) -> Value {
    json!({
        "node_id": call.node_id, "tool": call.tool, "name": call.name, "arguments": call.arguments,
        "entered": call.entered,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_changes_what_an_approver_sees() {
        let run = ApprovalRun {
            argv: vec!["rm".into(), "-rf\u{202e}".into()],
            env: vec!["X\u{1b}[8A\rcommand  \"ls\"".into()],
            model: "m\u{9b}1A".into(),
            ..ApprovalRun::default()
        };
        let approval = Approval {
            subject: Some(Subject::Run(run)),
            ..Approval::default()
        };
        let shown = details(&approval);
        let is_plain = |letter: char| letter == '\n' || !letter.is_control();
        assert!(shown.chars().all(is_plain), "{shown:?}");
        assert!(shown.contains("\"rm\" \"-rf\\u{202e}\"\n"), "{shown}");
        assert!(
            shown.contains("variables     X\\u{1b}[8A\\u{d}command"),
            "{shown}"
        );
    }
}
