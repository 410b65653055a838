//! What somebody wants and a policy requires an approval for.

use polydev_policy::rules::RunFacts;

use crate::{
    access::{self, Caller},
    audit::record::Record,
};

/// The name that listeners give to everybody on the loopback address.
const LOOPBACK: &str = "loopback";
/// Longest summary, in bytes.
const MAX_SUMMARY: usize = 200;

/// What somebody wants.
#[derive(Debug)]
pub struct Wanted {
    /// The record of what is done once it is approved: for whose run, and what the policy has decided.
    pub record: Record,
    pub who: Who,
    pub subject: Subject,
}

/// Who wants it.
#[derive(Debug, Clone, Default)]
pub struct Who {
    /// By the name that roles know.
    pub name: String,
    /// The user that they are.
    pub user: Option<String>,
}

/// What is to be approved.
#[derive(Debug)]
pub enum Subject {
    Run(Box<RunFacts>),
    Call(Call),
}

/// A call of a tool that an agent wants to make.
#[derive(Debug)]
pub struct Call {
    pub node_id: String,
    /// By the names of rules.
    pub tool: String,
    /// The CLI's name of the tool.
    pub name: String,
    /// JSON.
    pub arguments: String,
    /// What is in the conversation and was not written by the caller.
    pub entered: Vec<String>,
}

/// Somebody may not approve what is, or could be, their own.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Own {
    #[error("`{0}` wants this; somebody else must approve it")]
    Wanted(String),
    #[error("this is for user `{0}`, who cannot approve it")]
    User(String),
    #[error(
        "callers on the loopback address have no names, so nobody knows whether this is the \
         approver's own: use a unix socket, a certificate or a token"
    )]
    Unknown,
}

impl Who {
    /// Whether the caller is somebody else, and not the user of the run.
    ///
    /// # Errors
    /// [`Own`]
    pub fn is_somebody_else(&self, user_id: Option<&str>, caller: &Caller) -> Result<(), Own> {
        if [&*self.name, &caller.name].contains(&LOOPBACK) {
            return Err(Own::Unknown);
        }
        let user = caller.user.as_deref();
        let is_user = |other: Option<&str>| user.is_some() && user == other;
        let is_named = self.name == caller.name || is_user(access::user_of(&self.name));
        if is_named || is_user(self.user.as_deref()) {
            return Err(Own::Wanted(caller.name.clone()));
        }
        match user_id {
            Some(user) if is_user(Some(user)) => Err(Own::User(user.into())),
            _ => Ok(()),
        }
    }
}

impl Subject {
    /// For sentences.
    #[must_use]
    pub fn what(&self) -> &'static str {
        match self {
            Self::Run(_) => "run",
            Self::Call(_) => "call",
        }
    }

    /// One line of it.
    #[must_use]
    pub fn summary(&self) -> String {
        let text = match self {
            Self::Run(facts) if facts.argv.is_empty() => facts.prompt.clone(),
            Self::Run(facts) => facts.argv.join(" "),
            Self::Call(call) => format!("{} {}", call.name, call.arguments),
        };
        let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
        let line: String = line.chars().filter(|letter| !letter.is_control()).collect();
        let cut = line.floor_char_boundary(MAX_SUMMARY);
        match line.len() > cut {
            true => format!("{} ...", &line[..cut]),
            false => line,
        }
    }

    /// How much memory it takes, about.
    pub(super) fn bytes(&self) -> usize {
        let sum = |texts: &[String]| texts.iter().map(String::len).sum::<usize>();
        match self {
            Self::Run(facts) => {
                let texts = facts.prompt.len() + facts.system.len();
                texts + sum(&facts.argv) + sum(&facts.env) + sum(&facts.files) + sum(&facts.egress)
            }
            Self::Call(call) => call.arguments.len() + call.name.len(),
        }
    }
}
