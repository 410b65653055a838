//! `polydev-shim pool scale|drain|resume`: each waits as long as the shim does, and prints why.

use polydev_proto::runtime::{
    DrainPoolRequest, Draining, ResumePoolRequest, ScalePoolRequest, ScaleWaiting, Scaled,
    drain_pool_response as draining, resume_pool_response as resuming,
    scale_pool_response as scaling,
};
use serde_json::{Value, json};

use crate::{Options, Output, print, told};

pub(super) async fn scale(options: &Options, provider: String, size: u32) -> anyhow::Result<()> {
    let mut shim = options.connect().await?;
    let request = ScalePoolRequest {
        provider: provider.clone(),
        size,
    };
    let mut events = shim.scale_pool(request).await.map_err(told)?.into_inner();
    while let Some(response) = events.message().await.map_err(told)? {
        match response.event {
            Some(scaling::Event::Waiting(waiting)) => wait(&waiting),
            Some(scaling::Event::Scaled(scaled)) => return scaled_to(options, &provider, &scaled),
            None => {}
        }
    }
    broken_off()
}

pub(super) async fn resume(options: &Options, provider: String) -> anyhow::Result<()> {
    let mut shim = options.connect().await?;
    let request = ResumePoolRequest {
        provider: provider.clone(),
    };
    let mut events = shim.resume_pool(request).await.map_err(told)?.into_inner();
    while let Some(response) = events.message().await.map_err(told)? {
        match response.event {
            Some(resuming::Event::Waiting(waiting)) => wait(&waiting),
            Some(resuming::Event::Scaled(scaled)) => return scaled_to(options, &provider, &scaled),
            None => {}
        }
    }
    broken_off()
}

pub(super) async fn drain(options: &Options, provider: String, detach: bool) -> anyhow::Result<()> {
    let mut shim = options.connect().await?;
    let request = DrainPoolRequest {
        provider: provider.clone(),
    };
    let mut events = shim.drain_pool(request).await.map_err(told)?.into_inner();
    while let Some(response) = events.message().await.map_err(told)? {
        match response.event {
            Some(draining::Event::Waiting(waiting)) => wait(&waiting),
            Some(draining::Event::Scaled(scaled)) => scaled_to(options, &provider, &scaled)?,
            Some(draining::Event::Draining(_)) if detach => return Ok(()),
            Some(draining::Event::Draining(Draining { slots, runs })) => {
                eprintln!("{provider}: {slots} slots are left, {runs} with a run");
            }
            Some(draining::Event::Drained(_)) => {
                let text = format!("{provider}: drained");
                return tell(
                    options,
                    &text,
                    &json!({ "provider": provider, "drained": true }),
                );
            }
            None => {}
        }
    }
    broken_off()
}

fn wait(ScaleWaiting { reason }: &ScaleWaiting) {
    eprintln!("waiting until Nomad accepts a new size: {reason}");
}

fn scaled_to(
    options: &Options,
    provider: &str,
    Scaled { from, to }: &Scaled,
) -> anyhow::Result<()> {
    let line = json!({ "provider": provider, "from": from, "to": to });
    tell(options, &format!("{provider}: {from} -> {to}"), &line)
}

fn tell(options: &Options, text: &str, line: &Value) -> anyhow::Result<()> {
    Ok(match options.output {
        Output::Text => print(&format!("{text}\n")),
        Output::Json => print(&format!("{line}\n")),
    }?)
}

fn broken_off() -> anyhow::Result<()> {
    anyhow::bail!("the shim ended the stream before it reported the result")
}
