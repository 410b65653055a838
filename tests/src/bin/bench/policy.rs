//! What a policy and execution tokens cost: a decision with 200 rules, a signature and its check, a
//! warm claim with all of it, and the time that an agent waits for a decision about a tool.

mod tools;

use std::{
    fmt::Write as _,
    fs,
    os::unix::fs::PermissionsExt,
    time::{Duration, Instant, SystemTime},
};

use polydev_policy::{
    decision::Outcome,
    rules::{Kind, Rules, RunFacts},
};
use polydev_proto::{
    execution::{self, Because, Place, Presented},
    node::{Ballot, Claim, RunSpec},
    signing::{PublicKeys, SigningKey},
};
use polydev_tests::shim::Shim;
use rcgen::{KeyPair, PKCS_ED25519};
use serde_json::{Value, json};

use super::{SAMPLES, Summary, warm_claim};

const RULES: usize = 200;
const DECISIONS: usize = 20_000;
const TOKENS: usize = 5_000;
const POOL: u32 = 4;

pub(super) fn figures() -> anyhow::Result<Vec<Value>> {
    let (plain, rules) = (rules(false)?, rules(true)?);
    let (rate, decision) = decisions(&Rules::read(&rules)?)?;
    let (plain, _) = decisions(&Rules::read(&plain)?)?;
    let pair = KeyPair::generate_for(&PKCS_ED25519)?;
    let token = tokens(&pair)?;
    let added = |p: fn(&Summary) -> f64| p(&decision) + p(&token);
    let (p50, p99) = (added(|summary| summary.p50), added(|summary| summary.p99));
    let mut figures = vec![
        json!({
            "name": "the same with rules that must all be asked", "unit": "a second",
            "n": DECISIONS, "value": plain,
        }),
        json!({
            "name": "decisions of a policy with 200 rules, on one core", "unit": "a second",
            "n": DECISIONS, "value": rate, "bound": ">= 10000", "holds": rate >= 10_000.0,
        }),
        json!({
            "name": "decision, token and its check", "unit": "ms", "n": TOKENS,
            "p50": p50, "p90": added(|summary| summary.p90), "p99": p99,
            "bound": "p50 <= 0.3, p99 <= 1", "holds": p50 <= 0.3 && p99 <= 1.0,
        }),
        claims(&rules, &pair)?,
    ];
    figures.extend(tools::figures(&rules)?);
    Ok(figures)
}

/// One permits everything. The others ask about user and words, and forbid nothing of ours. The shim
/// finds rules by the user if they ask about the user first.
fn rules(user_first: bool) -> anyhow::Result<String> {
    let mut rules = "permit (principal, action, resource is Polydev::Provider);\n".to_owned();
    for rule in 1..RULES {
        let mut asks = [
            format!("context.user == \"user-{rule}\""),
            format!("context.words.contains(\"word-{rule}\")"),
        ];
        if !user_first {
            asks.reverse();
        }
        writeln!(
            rules,
            "@id(\"r{rule}\") forbid (principal, action == Polydev::Action::\"command\", resource) \
             when {{ {} }};",
            asks.join(" && ")
        )?;
    }
    Ok(rules)
}

fn decisions(rules: &Rules) -> anyhow::Result<(f64, Summary)> {
    let facts = RunFacts {
        caller: "cn:controller".into(),
        caller_user: Some("controller".into()),
        user: "user-199".into(),
        provider: "anthropic".into(),
        kind: Kind::Command,
        argv: ["sh", "-c", "echo hi"].map(Into::into).to_vec(),
        prompt: String::new(),
        system: String::new(),
        model: String::new(),
        tools: String::new(),
        trusts_files: false,
        conversation: false,
        stdin: false,
        terminal: false,
        env: vec!["LANG".into()],
        work_dir: String::new(),
        files: vec!["a.txt".into(), "b.txt".into()],
        file_bytes: 1000,
        timeout_seconds: 600,
        credential: "broker".into(),
        egress_listed: false,
        egress: Vec::new(),
    };
    let mut samples = Vec::new();
    let begin = Instant::now();
    for _ in 0..DECISIONS {
        let one = Instant::now();
        let verdict = rules.run(&facts);
        samples.push(one.elapsed().as_secs_f64() * 1e3);
        anyhow::ensure!(verdict.outcome == Outcome::Allow, "{verdict:?}");
    }
    let rate = DECISIONS as f64 / begin.elapsed().as_secs_f64();
    Ok((rate, Summary::of(&samples)))
}

fn tokens(pair: &KeyPair) -> anyhow::Result<Summary> {
    let key = SigningKey::read(pair.serialize_pem().as_bytes())?;
    let keys = PublicKeys::read(pair.public_key_pem().as_bytes())?;
    let claim = Claim {
        run_id: uuid::Uuid::now_v7().to_string(),
        slot_id: "node/allocation".into(),
        generation: 7,
        start_id: uuid::Uuid::new_v4().to_string(),
        user_id: "user-199".into(),
        spec: Some(RunSpec {
            argv: vec!["sh".into(), "-c".into(), "echo hi".into()],
            env: [("PROVIDER".into(), "anthropic".into())].into(),
            ..RunSpec::default()
        }),
        ballot: Some(Ballot::default()),
        sealed_keys: vec![1; 512].into(),
        ..Claim::default()
    };
    let now = SystemTime::now();
    let place = Place {
        audience: "node",
        image: "image",
        egress: None,
        expires_at: now + Duration::from_secs(3600),
    };
    let because = Because {
        policy_hash: "policy",
        ..Because::default()
    };
    let mut samples = Vec::new();
    for _ in 0..TOKENS {
        let one = Instant::now();
        let mut claim = claim.clone();
        claim.token = Some(execution::issue(&key, &claim, place, because));
        let presented = Presented::take(&mut claim);
        presented.check(&keys, "node", "image", None, now)?;
        samples.push(one.elapsed().as_secs_f64() * 1e3);
    }
    Ok(Summary::of(&samples))
}

/// The driver of `dev` requires no token. It has it to hash, and not to check.
fn claims(rules: &str, pair: &KeyPair) -> anyhow::Result<Value> {
    let folder = tempfile::tempdir()?;
    let (policy, key) = (folder.path().join("rules"), folder.path().join("key"));
    fs::write(&policy, rules)?;
    fs::write(&key, pair.serialize_pem())?;
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600))?;
    let options = [
        format!("--policy={}", policy.display()),
        format!("--execution-key-file={}", key.display()),
    ];
    let pool = format!("anthropic={POOL}");
    let options: Vec<_> = options.iter().map(String::as_str).collect();
    let shims = [Shim::dev(&[&pool]), Shim::dev_with(&[&pool], &options)];
    let clients = [shims[0].client(), shims[1].client()];
    let mut samples = [Vec::new(), Vec::new()];
    for _ in 0..SAMPLES {
        for (client, samples) in clients.iter().zip(&mut samples) {
            // The machine is idle: all slots of both are warm.
            clients
                .iter()
                .for_each(|client| client.wait_idle("anthropic", POOL));
            samples.push(warm_claim(client)?);
        }
    }
    let [off, on] = samples.map(|samples| Summary::of(&samples));
    let added = on.p50 - off.p50;
    Ok(json!({
        "name": "warm claim with a policy and a token", "unit": "ms", "n": SAMPLES,
        "p50": on.p50, "p90": on.p90, "p99": on.p99,
        "against": {
            "name": "without", "unit": "ms", "n": SAMPLES,
            "p50": off.p50, "p90": off.p90, "p99": off.p99,
        },
        "ratio": on.p50 / off.p50, "bound": "p50 + 0.3 ms", "holds": added <= 0.3,
    }))
}
