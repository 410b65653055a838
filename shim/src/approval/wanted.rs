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
    /// The record of what is done once it is approved: who wants it, for whose run, and what the
    /// policy has decided.
    pub record: Record,
    /// The user that whoever wants it is.
    pub caller_user: Option<String>,
    pub subject: Subject,
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
pub enum Stranger {
    #[error("`{0}` wants this; somebody else must approve it")]
    Own(String),
    #[error("this is for user `{0}`, who cannot approve it")]
    User(String),
    #[error(
        "callers on the loopback address have no names, so nobody knows whether this is the \
         approver's own: use a unix socket, a certificate or a token"
    )]
    Unknown,
}

impl Wanted {
    /// Whether the caller is somebody else than who wants it, and than the user of the run.
    ///
    /// # Errors
    /// [`Stranger`]
    pub fn is_for_a_stranger(&self, caller: &Caller) -> Result<(), Stranger> {
        let wants = &self.record.who;
        if [wants, &caller.name].contains(&&LOOPBACK.to_owned()) {
            return Err(Stranger::Unknown);
        }
        let user = caller.user.as_deref();
        let is_user = |other: Option<&str>| user.is_some() && user == other;
        let wants_user = self.caller_user.as_deref();
        if *wants == caller.name || is_user(wants_user) || is_user(access::user_of(wants)) {
            return Err(Stranger::Own(caller.name.clone()));
        }
        match self.record.user_id.as_deref() {
            Some(user) if is_user(Some(user)) => Err(Stranger::User(user.into())),
            _ => Ok(()),
        }
    }

    /// For sentences.
    #[must_use]
    pub fn what(&self) -> &'static str {
        match self.subject {
            Subject::Run(_) => "run",
            Subject::Call(_) => "call",
        }
    }

    /// Why an approval is required.
    #[must_use]
    pub fn reason(&self) -> &str {
        let policy = self.record.policy.as_ref();
        policy.map_or("", |policy| &policy.reason)
    }

    /// One line of it.
    #[must_use]
    pub fn summary(&self) -> String {
        let text = match &self.subject {
            Subject::Run(facts) if facts.argv.is_empty() => facts.prompt.clone(),
            Subject::Run(facts) => facts.argv.join(" "),
            Subject::Call(call) => format!("{} {}", call.name, call.arguments),
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
        match &self.subject {
            Subject::Run(facts) => {
                let texts = facts.prompt.len() + facts.system.len();
                texts + sum(&facts.argv) + sum(&facts.env) + sum(&facts.files) + sum(&facts.egress)
            }
            Subject::Call(call) => call.arguments.len() + call.name.len(),
        }
    }
}
