//! The cost of a credential for a shim: opening a record, opening an earlier system's record,
//! and sealing to a container.

use std::time::Instant;

use anyhow::Context;
use polydev_proto::{provider::Vendor, runtime, sealed};
use polydev_shim::{
    credentials::{
        keys::KeyRing,
        record::{Binding, Record},
        scrypt,
    },
    provider::Cli,
    secret::Credential,
};
use serde_json::{Value, json};

use super::{Summary, millis};

const SAMPLES: usize = 2000;

pub(crate) fn figures() -> anyhow::Result<Vec<Value>> {
    let file = tempfile::NamedTempFile::new()?;
    // The key of the example record of earlier systems.
    std::fs::write(file.path(), hex::encode((0..32).collect::<Vec<u8>>()))?;
    let keys = KeyRing::load(Some(file.path()))?.context("there is a key")?;
    let provider: Vendor = "anthropic".parse()?;
    let binding = Binding {
        user_id: &"bench".into(),
        provider,
    };
    let credential = Credential::ApiKey {
        key: polydev_tests::fresh_key().into(),
        project_id: None,
    };
    let record = Record::seal(&credential, binding, 1, keys.first());
    let opened = sample(|| record.open(binding, &keys).map(drop))?;

    let prepared = provider.prepare(&credential)?;
    let container = sealed::PrivateKey::generate();
    let public = container.public();
    let to_container = sample(|| sealed::seal(&public, "run", &prepared.secrets()).map(drop))?;

    let sixteen = |from: u8| hex::encode((from..from + 16).collect::<Vec<_>>());
    let old = scrypt::Record::parse(&runtime::ScryptRecord {
        encrypted: "030f94b89be85ed565a22426ded7fbd91d420878ee4bd2f7f32112de2d7e1dc8150cc150\
                    1d973a360f8d9620172ad0d0d5"
            .into(),
        iv: sixteen(0xb0),
        auth_tag: "196ff94e14e80528928b6a0dc53d0279".into(),
        salt: sixteen(0xa0),
    })?;
    let runtime = tokio::runtime::Runtime::new()?;
    let opener = scrypt::Opener::new();
    let open = || {
        runtime
            .block_on(opener.open(&old, &keys, binding.user_id))
            .map(drop)
    };
    let begin = Instant::now();
    open()?;
    let first = millis(begin.elapsed());
    let again = sample(open)?;
    Ok(vec![
        figure("opening a record", &opened, Some(50.0)),
        figure("sealing an API key to its container", &to_container, None),
        json!({
            "name": "opening an earlier system's record, the first time", "unit": "ms", "n": 1,
            "value": first, "bound": "one derivation by scrypt", "holds": true,
        }),
        figure("opening it again", &again, None),
    ])
}

/// Microseconds of each.
fn sample<E: std::error::Error + Send + Sync + 'static>(
    mut work: impl FnMut() -> Result<(), E>,
) -> anyhow::Result<Vec<f64>> {
    let mut samples = Vec::with_capacity(SAMPLES);
    for _ in 0..SAMPLES {
        let begin = Instant::now();
        work()?;
        samples.push(millis(begin.elapsed()) * 1e3);
    }
    Ok(samples)
}

fn figure(name: &str, samples: &[f64], most: Option<f64>) -> Value {
    let summary = Summary::of(samples);
    json!({
        "name": name, "unit": "us", "n": samples.len(),
        "p50": summary.p50, "p90": summary.p90, "p99": summary.p99,
        "bound": most.map_or("none".into(), |most| format!("p50 <= {most} us")),
        "holds": most.is_none_or(|most| summary.p50 <= most),
    })
}
