//! What rules are asked about.

use std::{
    collections::{HashMap, HashSet},
    str::FromStr,
};

use cedar_policy::{
    Context, Entities, Entity, EntityId, EntityTypeName, EntityUid, Request, RestrictedExpression,
};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::index::{self, Key};
use crate::{canonical, lattice::Label, sink::Risk};

/// What a run starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    Command,
    Prompt,
}

/// A run, before it starts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunFacts {
    /// The name that roles know.
    pub caller: String,
    /// The user that the caller is.
    #[serde(default)]
    pub caller_user: Option<String>,
    /// Whose run it is.
    pub user: String,
    pub provider: String,
    pub kind: Kind,
    /// The words of a command.
    #[serde(default)]
    pub argv: Vec<String>,
    #[serde(default)]
    pub prompt: String,
    /// The system text of a prompt.
    #[serde(default)]
    pub system: String,
    #[serde(default)]
    pub model: String,
    /// none, read, all, or empty.
    #[serde(default)]
    pub tools: String,
    /// Whether more prompts may follow.
    #[serde(default)]
    pub conversation: bool,
    /// Whether the caller vouches for the files.
    #[serde(default)]
    pub trusts_files: bool,
    /// Whether input may follow.
    #[serde(default)]
    pub stdin: bool,
    #[serde(default)]
    pub terminal: bool,
    /// Names of variables.
    #[serde(default)]
    pub env: Vec<String>,
    /// Empty if the run does not say.
    #[serde(default)]
    pub work_dir: String,
    #[serde(default)]
    pub files: Vec<String>,
    #[serde(default)]
    pub file_bytes: u64,
    #[serde(default)]
    pub timeout_seconds: u64,
    /// none, broker or container.
    #[serde(default = "none")]
    pub credential: String,
    /// Whether the role has a list of what the run may reach, and the list.
    #[serde(default)]
    pub egress_listed: bool,
    #[serde(default)]
    pub egress: Vec<String>,
}

/// A call that a model wants to make.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ToolFacts {
    pub caller: String,
    pub tool: String,
    pub action: String,
    pub target: String,
    pub risk: Risk,
    pub blocks_untrusted: bool,
    pub blocks_egress: bool,
    pub label: Label,
    pub tags: Vec<String>,
    /// For a call of an agent.
    pub agent: Option<AgentFacts>,
}

/// The run in which an agent's model wants to make a call, and the call as its CLI says it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct AgentFacts {
    /// Whose run it is.
    pub user: String,
    pub provider: String,
    /// The CLI's name of the tool.
    pub name: String,
    /// JSON.
    pub arguments: String,
}

fn none() -> String {
    "none".into()
}

/// What Cedar is asked.
pub(super) struct Question {
    pub(super) request: Request,
    pub(super) entities: Entities,
    /// Of the principal and of attributes that rules may be found by.
    texts: Vec<(Key, String)>,
}

impl Question {
    pub(super) fn text(&self, key: &Key) -> Option<&str> {
        let mut texts = self.texts.iter();
        let (_, text) = texts.find(|(of, _)| of == key)?;
        Some(text)
    }
}

impl RunFacts {
    /// SHA-256 over all of them, in hexadecimal digits: what was decided about, without its text.
    #[must_use]
    pub fn hash(&self) -> String {
        canonical::hash(&json!(self))
    }

    pub(super) fn question(&self) -> Result<Question, String> {
        let text = match self.kind {
            Kind::Command => self.argv.join(" "),
            Kind::Prompt => self.prompt.clone(),
        };
        let program = self.argv.first().cloned().unwrap_or_default();
        let context = [
            ("user", string(&self.user)),
            ("program", string(&program)),
            ("words", set(&self.argv)),
            ("text_bytes", long(text.len() as u64)),
            ("text", string(&text)),
            ("system", string(&self.system)),
            ("model", string(&self.model)),
            ("tools", string(&self.tools)),
            (
                "conversation",
                RestrictedExpression::new_bool(self.conversation),
            ),
            (
                "trusts_files",
                RestrictedExpression::new_bool(self.trusts_files),
            ),
            ("stdin", RestrictedExpression::new_bool(self.stdin)),
            ("terminal", RestrictedExpression::new_bool(self.terminal)),
            ("env", set(&self.env)),
            ("work_dir", string(&self.work_dir)),
            ("files", set(&self.files)),
            ("file_bytes", long(self.file_bytes)),
            ("timeout_seconds", long(self.timeout_seconds)),
            ("credential", string(&self.credential)),
            (
                "egress_listed",
                RestrictedExpression::new_bool(self.egress_listed),
            ),
            ("egress", set(&self.egress)),
        ];
        let action = match self.kind {
            Kind::Command => "command",
            Kind::Prompt => "prompt",
        };
        let user = self.caller_user.iter();
        let caller = user.map(|user| ("user".to_owned(), string(user)));
        let texts = [
            ("user", &self.user),
            ("program", &program),
            ("model", &self.model),
            ("tools", &self.tools),
            ("credential", &self.credential),
        ];
        let texts = texts.map(|(name, text)| (Key::Text("context", name), text.clone()));
        ask(
            (&self.caller, caller.collect()),
            action,
            ("Provider", &self.provider, HashMap::new()),
            context,
            texts.into(),
        )
    }
}

impl ToolFacts {
    /// SHA-256 over all of them, in hexadecimal digits.
    #[must_use]
    pub fn hash(&self) -> String {
        canonical::hash(&json!(self))
    }

    pub(super) fn question(&self) -> Result<Question, String> {
        let attributes = [
            ("tool", string(&self.tool)),
            ("action", string(&self.action)),
            ("risk", string(self.risk.name())),
            (
                "blocks_untrusted",
                RestrictedExpression::new_bool(self.blocks_untrusted),
            ),
            (
                "blocks_egress",
                RestrictedExpression::new_bool(self.blocks_egress),
            ),
        ];
        let attributes = attributes.map(|(name, value)| (name.to_owned(), value));
        let mut context = vec![
            ("target", string(&self.target)),
            ("integrity", string(self.label.integrity.name())),
            ("confidentiality", string(self.label.confidentiality.name())),
            ("tags", set(&self.tags)),
        ];
        if let Some(agent) = &self.agent {
            context.extend([
                ("user", string(&agent.user)),
                ("provider", string(&agent.provider)),
                ("name", string(&agent.name)),
                ("arguments", string(&agent.arguments)),
            ]);
        }
        let name = format!("{}.{}", self.tool, self.action);
        let texts = [
            ("context", "target", self.target.as_str()),
            ("context", "integrity", self.label.integrity.name()),
            ("resource", "tool", &self.tool),
            ("resource", "action", &self.action),
            ("resource", "risk", self.risk.name()),
        ];
        let texts = texts.map(|(of, name, text)| (Key::Text(of, name), text.to_owned()));
        ask(
            (&self.caller, HashMap::new()),
            "tool",
            ("Tool", &name, HashMap::from(attributes)),
            context,
            texts.into(),
        )
    }
}

type Attributes = HashMap<String, RestrictedExpression>;

fn ask(
    (caller, caller_attributes): (&str, Attributes),
    action: &str,
    (kind, name, attributes): (&str, &str, Attributes),
    context: impl IntoIterator<Item = (&'static str, RestrictedExpression)>,
    mut texts: Vec<(Key, String)>,
) -> Result<Question, String> {
    let principal = uid("Caller", caller)?;
    texts.push((Key::Principal, index::name(&principal)));
    let resource = uid(kind, name)?;
    let action = uid("Action", action)?;
    let entity = |uid: &EntityUid, attributes| {
        let entity = Entity::new(uid.clone(), attributes, HashSet::new());
        entity.map_err(|error| error.to_string())
    };
    let entities = [
        entity(&principal, caller_attributes)?,
        entity(&resource, attributes)?,
    ];
    let entities = Entities::from_entities(entities, None).map_err(|error| error.to_string())?;
    let context = context
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value));
    let context = Context::from_pairs(context).map_err(|error| error.to_string())?;
    // Without the schema: it has what is built above, and nothing that a caller has named.
    let request = Request::new(principal, action, resource, context, None);
    let request = request.map_err(|error| error.to_string())?;
    Ok(Question {
        request,
        entities,
        texts,
    })
}

fn uid(kind: &str, name: &str) -> Result<EntityUid, String> {
    let kind = EntityTypeName::from_str(&format!("Polydev::{kind}"));
    let kind = kind.map_err(|error| error.to_string())?;
    Ok(EntityUid::from_type_name_and_id(kind, EntityId::new(name)))
}

fn string(text: &str) -> RestrictedExpression {
    RestrictedExpression::new_string(text.to_owned())
}

fn set(texts: &[String]) -> RestrictedExpression {
    RestrictedExpression::new_set(texts.iter().map(|text| string(text)))
}

fn long(number: u64) -> RestrictedExpression {
    RestrictedExpression::new_long(i64::try_from(number).unwrap_or(i64::MAX))
}
