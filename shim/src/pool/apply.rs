//! Submits the job files of pools, and first shows what they change.

use std::{collections::BTreeMap, env};

use serde_json::Value;

use super::scale::{GROUP, MAX_SIZE};
use crate::nomad::{self, Nomad, job::Plan};

/// Why a job is not submitted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("`{given}` is not NAME=VALUE")]
    Variable { given: String },
    #[error("the variable `{name}` is `{given}`; must be 0 to {MAX_SIZE}")]
    Size { name: String, given: String },
    #[error("job `{job}` has a count of {given}; must be 0 to {MAX_SIZE}")]
    Count { job: String, given: u64 },
    #[error(transparent)]
    Nomad(#[from] nomad::Error),
}

/// A variable of a job's file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Variable {
    name: String,
    value: String,
}

impl Variable {
    /// # Errors
    /// [`Error::Variable`]
    pub fn parse(given: &str) -> Result<Self, Error> {
        match given.split_once('=') {
            Some((name, value)) if !name.is_empty() => Ok(Self {
                name: name.to_owned(),
                value: value.to_owned(),
            }),
            _ => Err(Error::Variable {
                given: given.to_owned(),
            }),
        }
    }
}

/// A job that can be submitted.
#[derive(Debug)]
pub struct Applied {
    job: Value,
    plan: Plan,
}

/// Asks Nomad what the job of a file would change. An existing pool keeps its size. A new pool
/// gets the size in `WARM_POOL_<PROVIDER>_SIZE`, if that is set. A variable `count` overrides
/// both.
///
/// # Errors
/// [`Error`]
pub async fn plan(nomad: &Nomad, file: &str, variables: &[Variable]) -> Result<Applied, Error> {
    let mut job = nomad.parse(file, &lines(variables)).await?;
    let is_given = variables.iter().any(|variable| variable.name == "count");
    if let Some(provider) = pool_of(&job).filter(|_| !is_given) {
        let id = job["ID"].as_str().unwrap_or_default();
        let groups = nomad.scaling(id).await?;
        let size = match groups.and_then(|groups| Some(groups.get(GROUP)?.desired)) {
            Some(size) => Some(size),
            None => first_size(provider)?,
        };
        if let Some(size) = size {
            // Other parts of the job depend on the count.
            let count = Variable {
                name: "count".into(),
                value: size.to_string(),
            };
            let variables: Vec<_> = variables.iter().cloned().chain([count]).collect();
            job = nomad.parse(file, &lines(&variables)).await?;
        }
    }
    check_count(&job)?;
    let plan = nomad.plan(&job).await?;
    Ok(Applied { job, plan })
}

/// The variables as lines of HCL. As with `nomad job run`, a value is a string unless it is a
/// number, a list or a word of HCL.
fn lines(variables: &[Variable]) -> String {
    let line = |Variable { name, value }: &Variable| {
        let is_hcl = value.parse::<f64>().is_ok()
            || matches!(value.as_str(), "true" | "false")
            || value.starts_with(['[', '{', '"']);
        match is_hcl {
            true => format!("{name} = {value}\n"),
            false => format!("{name} = {}\n", Value::from(value.as_str())),
        }
    };
    variables.iter().map(line).collect()
}

/// The provider of a job that is a warm pool.
fn pool_of(job: &Value) -> Option<&str> {
    let meta = &job["Meta"];
    let provider = meta["provider"].as_str();
    provider.filter(|_| meta["purpose"] == "warm-pool")
}

fn first_size(provider: &str) -> Result<Option<u32>, Error> {
    let name = format!("WARM_POOL_{}_SIZE", provider.to_uppercase());
    let Some(given) = env::var_os(&name) else {
        return Ok(None);
    };
    let size = given.to_str().and_then(|given| given.parse().ok());
    let size = size.filter(|size| *size <= MAX_SIZE).ok_or(Error::Size {
        name,
        given: given.to_string_lossy().into_owned(),
    })?;
    Ok(Some(size))
}

fn check_count(job: &Value) -> Result<(), Error> {
    let groups = job["TaskGroups"].as_array().into_iter().flatten();
    let mut counts = groups.filter_map(|group| group["Count"].as_u64());
    match counts.find(|count| *count > u64::from(MAX_SIZE)) {
        Some(given) if pool_of(job).is_some() => Err(Error::Count {
            job: job["ID"].as_str().unwrap_or_default().to_owned(),
            given,
        }),
        _ => Ok(()),
    }
}

impl Applied {
    #[must_use]
    pub fn id(&self) -> &str {
        self.job["ID"].as_str().unwrap_or_default()
    }

    /// Whether the job would change anything.
    #[must_use]
    pub fn is_change(&self) -> bool {
        self.plan.diff["Type"] != "None"
    }

    /// What would change, for people: one line for each change.
    #[must_use]
    pub fn describe(&self) -> String {
        let Plan {
            diff,
            annotations,
            failed,
            warnings,
            ..
        } = &self.plan;
        let kind = match diff["Type"].as_str() {
            Some("Added") => "new",
            Some("None") => "unchanged",
            _ => "changed",
        };
        let mut text = format!("{}: {kind}\n", self.id());
        if kind == "changed" {
            differences("", diff, &mut text);
        }
        let groups = annotations["DesiredTGUpdates"].as_object();
        for (group, updates) in groups.into_iter().flatten() {
            let updates: BTreeMap<_, _> = updates
                .as_object()
                .into_iter()
                .flatten()
                .filter_map(|(what, number)| Some((what, number.as_u64().filter(|n| *n > 0)?)))
                .collect();
            let updates = updates
                .iter()
                .map(|(what, number)| format!("{number} {what}"));
            let updates: Vec<String> = updates.collect();
            if !updates.is_empty() {
                text.push_str(&format!("  {group}: {}\n", updates.join(", ")));
            }
        }
        for (group, metric) in failed.as_object().into_iter().flatten() {
            let more = metric["CoalescedFailures"].as_u64().unwrap_or(0);
            let unplaced = more + 1;
            text.push_str(&format!(
                "  {group}: no node has room for {unplaced} slots now\n"
            ));
        }
        for warning in warnings.lines().filter(|line| !line.trim().is_empty()) {
            text.push_str(&format!("  warning: {}\n", warning.trim()));
        }
        text
    }

    /// Submits the job to Nomad, if nobody has changed it since the plan.
    ///
    /// # Errors
    /// [`nomad::Error`]
    pub async fn submit(&self, nomad: &Nomad) -> Result<(), nomad::Error> {
        nomad.register(&self.job, &self.plan).await
    }
}

/// Appends the changed fields of Nomad's diff, with their paths.
fn differences(path: &str, diff: &Value, text: &mut String) {
    let list = |name: &str| diff[name].as_array().into_iter().flatten();
    for field in list("Fields").filter(|field| field["Type"] != "None") {
        let part = |name: &str| field[name].as_str().unwrap_or_default().to_owned();
        let (name, old, new) = (part("Name"), part("Old"), part("New"));
        text.push_str(&format!("  {path}{name}: {old:?} -> {new:?}\n"));
    }
    for inner in ["TaskGroups", "Tasks", "Objects"]
        .into_iter()
        .flat_map(list)
    {
        if inner["Type"] != "None" {
            let name = inner["Name"].as_str().unwrap_or_default();
            differences(&format!("{path}{name}."), inner, text);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn variables_are_written_as_nomads_own_command_takes_them() {
        let parse = |given: &str| Variable::parse(given).unwrap();
        let given = ["count=3", "image=a/b:1", "datacenters=[\"a\"]", "empty="].map(parse);
        let expected = "count = 3\nimage = \"a/b:1\"\ndatacenters = [\"a\"]\nempty = \"\"\n";
        assert_eq!(lines(&given), expected);
        for wrong in ["count", "=3"] {
            assert!(Variable::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_pools_count_is_bounded_and_another_jobs_is_not() {
        let job = |purpose: &str| {
            json!({"ID": "a", "Meta": {"provider": "openai", "purpose": purpose},
                   "TaskGroups": [{"Count": 101}]})
        };
        let refused = check_count(&job("warm-pool")).unwrap_err().to_string();
        assert_eq!(refused, "job `a` has a count of 101; must be 0 to 100");
        check_count(&job("else")).unwrap();
    }
}
