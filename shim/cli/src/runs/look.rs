//! `polydev-shim runs list|watch|show`

use std::{collections::BTreeSet, process::ExitCode};

use polydev_proto::{
    provider::Provider,
    runtime::{ListRunsRequest, ModelUsage, Run, RunState, WatchRunsRequest, WatchRunsResponse},
};
use serde_json::{Value, json};

use super::Name;
use crate::{
    Options, Output, age, answer, egress, print,
    stream::{api_error, api_errors_json, reason, usage_json},
    told,
};

/// The largest page that a shim returns.
const PAGE: u32 = 1000;

#[derive(clap::Args)]
pub struct List {
    #[command(flatten)]
    of: Of,
    /// Only runs in this state; may be repeated.
    #[arg(long, value_enum)]
    state: Vec<State>,
    /// Print at most this number of runs.
    #[arg(long, value_name = "RUNS", default_value_t = 100)]
    limit: usize,
    #[command(flatten)]
    options: Options,
}

#[derive(clap::Args)]
pub struct Watch {
    #[command(flatten)]
    of: Of,
    #[command(flatten)]
    options: Options,
}

/// Whose runs.
#[derive(clap::Args)]
struct Of {
    /// Only runs of this user.
    #[arg(long)]
    user: Option<String>,
    /// Only runs of this provider: openai, anthropic or google.
    #[arg(long)]
    provider: Option<Provider>,
}

impl Of {
    fn user_id(&self) -> String {
        self.user.clone().unwrap_or_default()
    }

    fn provider(&self) -> String {
        let name = |provider: Provider| provider.to_string();
        self.provider.map_or_else(String::new, name)
    }
}

#[derive(clap::Args)]
pub struct Show {
    #[command(flatten)]
    name: Name,
    #[command(flatten)]
    options: Options,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum State {
    /// The run has a slot; its command has not started yet.
    Claimed,
    /// The command runs.
    Running,
    /// The run has ended; its results are kept.
    Ended,
}

impl From<State> for i32 {
    fn from(state: State) -> Self {
        let state = match state {
            State::Claimed => RunState::Claimed,
            State::Running => RunState::Running,
            State::Ended => RunState::Ended,
        };
        state.into()
    }
}

pub(super) async fn list(arguments: List) -> anyhow::Result<ExitCode> {
    let List { options, limit, .. } = &arguments;
    let mut shim = options.connect().await?;
    if options.output == Output::Text {
        print(&format!("{}\n", heading()))?;
    }
    let (mut left, mut page_token) = (*limit, String::new());
    let mut unreachable = BTreeSet::new();
    while left > 0 {
        let request = ListRunsRequest {
            user_id: arguments.of.user_id(),
            provider: arguments.of.provider(),
            states: arguments
                .state
                .iter()
                .map(|state| (*state).into())
                .collect(),
            page_size: u32::try_from(left).unwrap_or(PAGE).min(PAGE),
            page_token,
        };
        let page = answer(shim.list_runs(request)).await?;
        print(&lines(&page.runs, options.output))?;
        page_token = page.next_page_token;
        left = left.saturating_sub(page.runs.len());
        unreachable.extend(page.nodes_unreachable);
        if page_token.is_empty() {
            break;
        }
    }
    missing(Vec::from_iter(unreachable).as_slice());
    Ok(ExitCode::SUCCESS)
}

pub(super) async fn watch(Watch { of, options }: Watch) -> anyhow::Result<ExitCode> {
    let mut shim = options.connect().await?;
    let request = WatchRunsRequest {
        user_id: of.user_id(),
        provider: of.provider(),
    };
    let mut changes = answer(shim.watch_runs(request)).await?;
    if options.output == Output::Text {
        print(&format!("{}\n", heading()))?;
    }
    let mut unreachable = Vec::new();
    while let Some(change) = changes.message().await.map_err(told)? {
        let WatchRunsResponse {
            runs,
            forgotten_run_ids,
            nodes_unreachable,
        } = change;
        print(&lines(&runs, options.output))?;
        for run_id in forgotten_run_ids {
            print(&match options.output {
                Output::Text => format!("{run_id:<36}  did not start, or its end was missed\n"),
                Output::Json => format!("{}\n", json!({"run_id": run_id, "state": "forgotten"})),
            })?;
        }
        if unreachable != nodes_unreachable {
            missing(&nodes_unreachable);
            unreachable = nodes_unreachable;
        }
    }
    anyhow::bail!("the shim ended the stream")
}

fn missing(nodes: &[String]) {
    if !nodes.is_empty() {
        let nodes = nodes.join(", ");
        eprintln!("runs of nodes that cannot be reached are missing: {nodes}");
    }
}

fn lines(runs: &[Run], output: Output) -> String {
    let line = |run| match output {
        Output::Text => line(run),
        Output::Json => format!("{}\n", to_json(run)),
    };
    runs.iter().map(line).collect()
}

pub(super) async fn show(Show { name, options }: Show) -> anyhow::Result<ExitCode> {
    let run = name.get(&options).await?;
    print(&match options.output {
        Output::Json => format!("{}\n", to_json(&run)),
        Output::Text => details(&run),
    })?;
    Ok(ExitCode::SUCCESS)
}

fn heading() -> String {
    format!(
        "{:<36}  {:<9}  {:<16}  {:<7}  {:<5}  {:<13}  {:>4}  NODE",
        "RUN", "PROVIDER", "USER", "STATE", "AGE", "END", "EXIT"
    )
}

fn line(run: &Run) -> String {
    let (end, exit) = match &run.exited {
        Some(exited) => (reason(exited), exited.exit_code.to_string()),
        None => ("-".into(), "-".into()),
    };
    let node: String = run.node_id.chars().take(8).collect();
    format!(
        "{:<36}  {:<9}  {:<16}  {:<7}  {:<5}  {end:<13}  {exit:>4}  {node}\n",
        run.run_id,
        run.provider,
        run.user_id,
        state(run),
        age(run.claimed_at),
    )
}

fn details(run: &Run) -> String {
    let time = |at: &Option<prost_types::Timestamp>| {
        at.as_ref()
            .map_or_else(|| "-".to_owned(), ToString::to_string)
    };
    let mut rows = vec![
        ("run", run.run_id.clone()),
        ("user", run.user_id.clone()),
        ("provider", run.provider.clone()),
        ("state", state(run)),
        ("node", run.node_id.clone()),
        ("slot", run.slot_id.clone()),
        ("generation", run.generation.to_string()),
        ("warm", run.warm.to_string()),
        ("claimed", time(&run.claimed_at)),
        ("started", time(&run.started_at)),
        ("ended", time(&run.ended_at)),
        ("cancelled", run.cancelled.to_string()),
        ("stdout", format!("{} bytes", run.stdout_bytes)),
        ("stderr", format!("{} bytes", run.stderr_bytes)),
    ];
    for used in &run.usage {
        rows.push(("tokens", tokens(used)));
    }
    for error in &run.api_errors {
        rows.push(("API error", api_error(error)));
    }
    if let Some(exited) = &run.exited {
        rows.push(("end", reason(exited)));
        rows.push(("exit code", exited.exit_code.to_string()));
        if !exited.message.is_empty() {
            rows.push(("message", exited.message.clone()));
        }
        if exited.oom_kills > 0 {
            let kills = format!("the kernel killed {} processes", exited.oom_kills);
            rows.push(("memory", kills));
        }
    }
    rows.iter()
        .map(|(name, value)| format!("{name:<10}  {value}\n"))
        .collect()
}

fn tokens(used: &ModelUsage) -> String {
    let ModelUsage {
        model,
        input_tokens,
        cached_input_tokens,
        output_tokens,
        ..
    } = used;
    format!("{model}: {input_tokens} in ({cached_input_tokens} from a cache), {output_tokens} out")
}

fn to_json(run: &Run) -> Value {
    let time = |at: &Option<prost_types::Timestamp>| at.as_ref().map(ToString::to_string);
    let end = run.exited.as_ref().map(|exited| {
        json!({
            "reason": reason(exited), "exit_code": exited.exit_code, "signal": exited.signal,
            "message": exited.message, "oom_kills": exited.oom_kills,
        })
    });
    json!({
        "run_id": run.run_id, "user_id": run.user_id, "provider": run.provider,
        "state": state(run), "node_id": run.node_id, "slot_id": run.slot_id,
        "generation": run.generation, "warm": run.warm, "claimed_at": time(&run.claimed_at),
        "started_at": time(&run.started_at), "ended_at": time(&run.ended_at),
        "cancelled": run.cancelled, "stdout_bytes": run.stdout_bytes,
        "stderr_bytes": run.stderr_bytes, "exited": end, "usage": usage_json(&run.usage),
        "api_errors": api_errors_json(&run.api_errors),
        "egress": run.egress.iter().map(egress::to_json).collect::<Vec<_>>(),
    })
}

fn state(run: &Run) -> String {
    let name = run.state().as_str_name();
    name.trim_start_matches("RUN_STATE_").to_lowercase()
}
