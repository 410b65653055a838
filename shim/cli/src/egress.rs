//! `polydev-shim egress show`

use std::process::ExitCode;

use polydev_proto::runtime::Destination;
use serde_json::json;

use crate::{Options, Output, print, runs::Name};

/// What a run has connected to.
#[derive(clap::Subcommand)]
pub enum Command {
    /// Show each host and port that a run has connected to through the broker, or was not
    /// allowed to. Only pools with a list of what is allowed have this record.
    Show(Show),
}

#[derive(clap::Args)]
pub struct Show {
    #[command(flatten)]
    name: Name,
    #[command(flatten)]
    options: Options,
}

/// # Errors
/// If the shim cannot be reached, or refuses the call.
pub async fn execute(Command::Show(arguments): Command) -> anyhow::Result<ExitCode> {
    let Show { name, options } = arguments;
    let run = name.get(&options).await?;
    let lines = run.egress.iter().map(|destination| match options.output {
        Output::Text => line(destination),
        Output::Json => format!("{}\n", to_json(destination)),
    });
    let lines: String = lines.collect();
    let heading = format!(
        "{:<40}  {:<15}  {:>11}  {:>6}  {:>10}  {:>10}  ALLOWED\n",
        "DESTINATION", "ADDRESS", "CONNECTIONS", "FAILED", "SENT", "RECEIVED"
    );
    print(&match options.output {
        Output::Text => heading + &lines,
        Output::Json => lines,
    })?;
    Ok(ExitCode::SUCCESS)
}

fn line(destination: &Destination) -> String {
    let Destination {
        address,
        denied,
        connections,
        sent_bytes,
        received_bytes,
        failed,
        ..
    } = destination;
    let address = if address.is_empty() { "-" } else { address };
    let allowed = match denied.is_empty() {
        true => "yes".to_owned(),
        false => format!("no: {denied}"),
    };
    format!(
        "{:<40}  {address:<15}  {connections:>11}  {failed:>6}  {sent_bytes:>10}  {received_bytes:>10}  {allowed}\n",
        host_and_port(destination)
    )
}

/// `HOST:PORT`, as the run has asked for it.
pub(crate) fn host_and_port(Destination { host, port, .. }: &Destination) -> String {
    match host.contains(':') {
        true => format!("[{host}]:{port}"),
        false => format!("{host}:{port}"),
    }
}

pub(crate) fn to_json(destination: &Destination) -> serde_json::Value {
    json!({
        "host": destination.host,
        "port": destination.port,
        "address": destination.address,
        "denied": destination.denied,
        "connections": destination.connections,
        "sent_bytes": destination.sent_bytes,
        "received_bytes": destination.received_bytes,
        "failed": destination.failed,
    })
}
