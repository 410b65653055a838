//! A warm slot, as described in its job.

use std::time::Duration;

use polydev_proto::{id::RunId, provider::Provider};
use polydev_transport::upstream::Upstream;
use serde::Deserialize;

use super::{
    Error,
    egress::{self, Egress},
    upstream, value,
};

/// A renewal takes seconds of half a core.
const MIN_AGE: Duration = Duration::from_secs(60);

/// What the containers of a slot have in common.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, Deserialize)]
pub struct Slot {
    pub provider: Provider,
    /// Image reference.
    pub image: String,
    /// Only for a slot on demand: the run that gets it. The slot ends with this run.
    pub run_id: Option<RunId>,
    /// Whether the next container is made during a run, if the node has room.
    #[serde(default)] // Nomad may have stored the slot before the option existed.
    pub prepare_ahead: bool,
    /// Whether a run ends if an API does not take its key.
    #[serde(default = "yes")] // As before.
    pub end_on_refused_key: bool,
    /// Whether the provider's CLI is started in an idle container, and waits there for a prompt.
    #[serde(default)] // As before.
    pub agent: bool,
    /// Whether each call of a tool of its model waits for a shim's decision. Then a run is a prompt,
    /// and only the agent has it.
    #[serde(default)] // As before.
    pub tool_policy: bool,
    /// How long it may wait until another one takes its place.
    #[serde(default = "default_max_age")] // As before.
    pub agent_max_age: Duration,
    /// Modules that a waiting Python has imported.
    #[serde(default)] // As before.
    pub imports: Vec<String>,
    /// Where model requests go, in place of the provider's own API.
    #[serde(default)] // As before.
    pub upstream: Option<Upstream>,
    /// What its containers may reach beside their model.
    #[serde(default)] // As before.
    pub egress: Egress,
}

fn yes() -> bool {
    true
}

fn default_max_age() -> Duration {
    Duration::from_secs(3600)
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Raw {
    provider: Option<String>,
    image: Option<String>,
    run_id: Option<String>,
    prepare_ahead: Option<bool>,
    end_on_refused_key: Option<bool>,
    agent: Option<bool>,
    tool_policy: Option<bool>,
    agent_max_age: Option<String>,
    imports: Option<Vec<String>>,
    upstream: Option<upstream::Raw>,
    egress: Option<egress::Raw>,
}

impl Raw {
    pub(super) fn check(self) -> Result<Slot, Error> {
        let provider = self.provider.unwrap_or_default();
        let names: Vec<_> = Provider::all().map(Provider::name).collect();
        let allowed = || format!("must be one of {}", names.join(", "));
        let provider = Provider::named(&provider)
            .ok_or_else(|| value::refused("slot.provider", &provider, allowed()))?;
        let image = value::text(self.image);
        let image = image.unwrap_or_else(|| match provider {
            Provider::Cli(vendor) => format!("polydev-{vendor}-runtime:latest"),
            Provider::Python => "polydev-python-sandbox:latest".into(),
        });
        let run_id = value::text(self.run_id);
        let parsed = run_id.map(|run_id| {
            let allowed = "must be the UUIDv7 of a run, for a slot on demand";
            let refused = |_| value::refused("slot.run_id", &run_id, allowed);
            run_id.parse::<RunId>().map_err(refused)
        });
        let run_id = parsed.transpose()?;
        let prepare_ahead = self.prepare_ahead.unwrap_or(false);
        if prepare_ahead && run_id.is_some() {
            let allowed = "must be `false` if `slot.run_id` is set, because a slot on demand has one container";
            return Err(value::refused("slot.prepare_ahead", "true", allowed));
        }
        let upstream = (self.upstream).map_or(Ok(None), |upstream| upstream.check("slot"))?;
        if let (Some(upstream), Err(_)) = (&upstream, provider.vendor()) {
            let allowed = "must be absent if `slot.provider` is `python`, which has no model";
            return Err(value::refused("slot.upstream", &upstream.base_url, allowed));
        }
        let agent = self.agent.unwrap_or(false);
        let tool_policy = self.tool_policy.unwrap_or(false);
        if tool_policy && (!agent || provider.vendor().is_err()) {
            let allowed = "must be `false` unless `slot.agent` is `true` and `slot.provider` is not `python`: it is the agent that asks";
            return Err(value::refused("slot.tool_policy", "true", allowed));
        }
        Ok(Slot {
            provider,
            image,
            run_id,
            prepare_ahead,
            end_on_refused_key: self.end_on_refused_key.unwrap_or_else(yes),
            agent,
            tool_policy,
            agent_max_age: value::duration(
                "slot.agent_max_age",
                value::text(self.agent_max_age),
                default_max_age(),
                MIN_AGE,
            )?,
            imports: imports(provider, self.imports)?,
            upstream,
            egress: match (self.egress, provider) {
                (Some(egress), _) => egress.check("slot.egress")?,
                (None, Provider::Cli(_)) => Egress::default(),
                (None, Provider::Python) => Egress::Listed(Vec::new()),
            },
        })
    }
}

/// What scripts import most, of the packages in `containers/python-sandbox`.
const IMPORTS: [&str; 6] = [
    "matplotlib.backends.backend_agg",
    "matplotlib.pyplot",
    "networkx",
    "numpy",
    "pandas",
    "polars",
];
/// Far more than a pool has a use for: each takes time and memory of every container.
const MAX_IMPORTS: usize = 100;

fn imports(provider: Provider, given: Option<Vec<String>>) -> Result<Vec<String>, Error> {
    const FIELD: &str = "slot.imports";
    let Some(given) = given else {
        return Ok(match provider {
            Provider::Cli(_) => Vec::new(),
            Provider::Python => IMPORTS.map(str::to_owned).into(),
        });
    };
    if provider != Provider::Python && !given.is_empty() {
        let allowed = "must be absent unless `slot.provider` is `python`";
        return Err(value::refused(FIELD, given.join(", "), allowed));
    }
    if given.len() > MAX_IMPORTS {
        let count = format!("a list of {}", given.len());
        let allowed = format!("must have at most {MAX_IMPORTS} entries");
        return Err(value::refused(FIELD, count, allowed));
    }
    let is_name = |part: &str| {
        let mut letters = part.chars();
        let first = letters.next();
        first.is_some_and(|first| first.is_alphabetic() || first == '_')
            && letters.all(|letter| letter.is_alphanumeric() || letter == '_')
    };
    match given.iter().find(|name| !name.split('.').all(is_name)) {
        Some(name) => {
            let allowed = "must be names of modules, such as `numpy` or `matplotlib.pyplot`";
            Err(value::refused(FIELD, name, allowed))
        }
        None => Ok(given),
    }
}
