//! Where data comes from. A node says who made a piece of data and what is known of it; data that is
//! made of other data has the least trusted and most secret of their labels.
//!
//! A node's id is made of everything that the node says and of random bytes, so a changed node does
//! not fit its id, and no two nodes have the same one. A graph can be kept and read again.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::{canonical, lattice::Label, token::nonce};

/// Most nodes of a graph.
pub const MAX_NODES: usize = 10_000;
/// Hexadecimal digits of a node's id.
const ID_DIGITS: usize = 32;

/// The source of data that is made of other data in one turn of a model.
pub const TURN: &str = "openai_turn_context";

/// 32 hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NodeId(pub String);

/// Kinds of data that come from somewhere, with the labels and tags that they begin with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    User,
    /// A document.
    Document,
    /// A fetched page.
    Web,
    Email,
    /// What a tool or a plug-in has printed.
    Plugin,
    /// A secret. The graph has no hash of it.
    Credential,
}

impl Source {
    /// The name in nodes.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Document => "external_doc",
            Self::Web => "web",
            Self::Email => "email",
            Self::Plugin => "plugin",
            Self::Credential => "credential",
        }
    }

    /// The source with this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        let all = [
            Self::User,
            Self::Document,
            Self::Web,
            Self::Email,
            Self::Plugin,
            Self::Credential,
        ];
        all.into_iter().find(|source| source.name() == name)
    }

    fn label(self) -> Label {
        match self {
            Self::User => Label::USER,
            Self::Document | Self::Web | Self::Plugin => Label::EXTERNAL,
            Self::Email => Label {
                confidentiality: crate::lattice::Confidentiality::Sensitive,
                ..Label::EXTERNAL
            },
            Self::Credential => Label::CREDENTIAL,
        }
    }

    fn tags(self) -> &'static [&'static str] {
        match self {
            Self::User => &["user_input"],
            Self::Document | Self::Web => &["external_content", "prompt_injection_risk"],
            Self::Email => &["external_content", "prompt_injection_risk", "pii_risk"],
            Self::Plugin => &["plugin_output", "supply_chain_risk"],
            Self::Credential => &["credential", "no_egress"],
        }
    }
}

/// A piece of data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    pub source: String,
    #[serde(flatten)]
    pub label: Label,
    pub tags: BTreeSet<String>,
    pub parents: Vec<NodeId>,
    /// SHA-256 of the content. Missing for credentials.
    pub content_hash: Option<String>,
    /// 32 random hexadecimal digits.
    pub salt: String,
}

impl Node {
    fn id(&self) -> NodeId {
        let value = json!(self);
        let mut id = canonical::hash(&value);
        id.truncate(ID_DIGITS);
        NodeId(id)
    }
}

/// The nodes of one conversation.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "BTreeMap<NodeId, Node>", into = "BTreeMap<NodeId, Node>")]
pub struct Graph(BTreeMap<NodeId, Node>);

/// Why a graph does not take a node.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("the provenance node `{0}` does not exist")]
    UnknownParent(String),
    #[error("data that is made of other data must name what it is made of")]
    NoParent,
    #[error("the provenance graph is full; at most {MAX_NODES} nodes are allowed")]
    Full,
    #[error("the provenance node `{0}` was changed: its id belongs to other content")]
    Changed(String),
    #[error("the provenance node `{id}` says `{label}`, which is not what its parents say")]
    WrongLabel { id: String, label: String },
}

impl Graph {
    /// Enters data that comes from outside of the graph.
    ///
    /// # Errors
    /// [`Error::Full`]
    pub fn enter(&mut self, source: Source, content: &str) -> Result<NodeId, Error> {
        let content_hash = match source {
            Source::Credential => None,
            _ => Some(canonical::sha256(content.as_bytes())),
        };
        self.insert(Node {
            source: source.name().into(),
            label: source.label(),
            tags: source.tags().iter().map(ToString::to_string).collect(),
            parents: Vec::new(),
            content_hash,
            salt: nonce(),
        })
    }

    /// Enters data that is made of other data, for example what a model has written.
    ///
    /// # Errors
    /// If a parent is missing or there is none: what is made of unknown data is not entered.
    pub fn derive(
        &mut self,
        source: &str,
        parents: &[NodeId],
        content: &str,
        tags: &[&str],
    ) -> Result<NodeId, Error> {
        let mut known = Vec::new();
        for parent in parents {
            let node = self.get(parent).ok_or_else(|| unknown(parent))?;
            known.push(node);
        }
        let label = known.iter().map(|node| node.label).reduce(Label::join);
        let label = label.ok_or(Error::NoParent)?;
        let mut all: BTreeSet<String> = tags.iter().map(ToString::to_string).collect();
        all.extend(known.iter().flat_map(|node| node.tags.iter().cloned()));
        self.insert(Node {
            source: source.into(),
            label,
            tags: all,
            parents: parents.to_vec(),
            content_hash: Some(canonical::sha256(content.as_bytes())),
            salt: nonce(),
        })
    }

    /// Enters what a model has before it answers: what the user says, and what was retrieved for
    /// it. Without retrieved data it is the user's own node.
    ///
    /// # Errors
    /// [`Error::Full`]
    pub fn turn(&mut self, prompt: &str, retrieved: &[(Source, &str)]) -> Result<NodeId, Error> {
        let user = self.enter(Source::User, prompt)?;
        if retrieved.is_empty() {
            return Ok(user);
        }
        let mut parents = vec![user];
        for (source, content) in retrieved {
            parents.push(self.enter(*source, content)?);
        }
        self.derive(TURN, &parents, prompt, &["planner_context"])
    }

    #[must_use]
    pub fn get(&self, id: &NodeId) -> Option<&Node> {
        self.0.get(id)
    }

    fn insert(&mut self, node: Node) -> Result<NodeId, Error> {
        if self.0.len() >= MAX_NODES {
            return Err(Error::Full);
        }
        let id = node.id();
        self.0.insert(id.clone(), node);
        Ok(id)
    }
}

impl TryFrom<BTreeMap<NodeId, Node>> for Graph {
    type Error = Error;

    /// Takes nodes that were kept: each must fit its id, and its label those of its parents.
    fn try_from(nodes: BTreeMap<NodeId, Node>) -> Result<Self, Error> {
        if nodes.len() > MAX_NODES {
            return Err(Error::Full);
        }
        for (id, node) in &nodes {
            if node.id() != *id {
                return Err(Error::Changed(id.0.clone()));
            }
            let mut joined = None;
            for parent in &node.parents {
                let parent = nodes.get(parent).ok_or_else(|| unknown(parent))?.label;
                joined = Some(joined.map_or(parent, |label| parent.join(label)));
            }
            let given = Source::named(&node.source).map(Source::label);
            if joined.or(given) != Some(node.label) {
                return Err(Error::WrongLabel {
                    id: id.0.clone(),
                    label: format!(
                        "{}/{}",
                        node.label.integrity.name(),
                        node.label.confidentiality.name()
                    ),
                });
            }
        }
        Ok(Self(nodes))
    }
}

impl From<Graph> for BTreeMap<NodeId, Node> {
    fn from(graph: Graph) -> Self {
        graph.0
    }
}

fn unknown(parent: &NodeId) -> Error {
    Error::UnknownParent(parent.0.clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lattice::{Confidentiality, Integrity};

    #[test]
    fn a_turn_with_retrieved_data_is_untrusted() {
        let mut graph = Graph::default();
        let user = graph.turn("Summarize.", &[]).unwrap();
        assert_eq!(graph.get(&user).unwrap().label, Label::USER);
        let retrieved = [(Source::Document, "Ignore that."), (Source::Email, "Mine.")];
        let turn = graph.turn("Summarize.", &retrieved).unwrap();
        let node = graph.get(&turn).unwrap();
        assert_eq!(node.label.integrity, Integrity::Untrusted);
        assert_eq!(node.label.confidentiality, Confidentiality::Sensitive);
        assert_eq!((node.source.as_str(), node.parents.len()), (TURN, 3));
        for tag in ["planner_context", "prompt_injection_risk", "pii_risk"] {
            assert!(node.tags.contains(tag), "{tag}");
        }
    }

    #[test]
    fn data_may_be_made_of_a_node_and_of_what_was_made_of_it() {
        let mut graph = Graph::default();
        let user = graph.enter(Source::User, "a").unwrap();
        let child = graph
            .derive("llm", std::slice::from_ref(&user), "b", &[])
            .unwrap();
        let diamond = graph.derive("llm", &[user, child], "c", &[]).unwrap();
        assert_eq!(graph.get(&diamond).unwrap().label, Label::USER);
    }

    #[test]
    fn what_is_made_of_unknown_data_is_refused() {
        let mut graph = Graph::default();
        let nobody = NodeId("0".repeat(ID_DIGITS));
        let refused = graph.derive("llm", std::slice::from_ref(&nobody), "", &[]);
        assert_eq!(refused, Err(Error::UnknownParent(nobody.0)));
        assert_eq!(graph.derive("llm", &[], "", &[]), Err(Error::NoParent));
    }

    #[test]
    fn equal_data_at_one_time_has_ids_of_its_own_and_secrets_have_no_hash() {
        let mut graph = Graph::default();
        let first = graph.enter(Source::Web, "same").unwrap();
        assert_ne!(first, graph.enter(Source::Web, "same").unwrap());
        let secret = graph.enter(Source::Credential, "not a key").unwrap();
        assert_eq!(graph.get(&secret).unwrap().content_hash, None);
    }

    #[test]
    fn a_kept_graph_is_read_again_and_a_changed_one_refused() {
        let mut graph = Graph::default();
        graph.turn("Summarize.", &[(Source::Web, "x")]).unwrap();
        let kept = serde_json::to_string(&graph).unwrap();
        assert_eq!(serde_json::from_str::<Graph>(&kept).unwrap(), graph);
        let changed = kept.replace("\"untrusted\"", "\"trusted\"");
        let refused = serde_json::from_str::<Graph>(&changed).unwrap_err();
        assert!(refused.to_string().contains("was changed"), "{refused}");
        // An id that fits does not help: the label must be that of the source.
        let mut forged = graph.0.values().next().unwrap().clone();
        forged.parents.clear();
        forged.source = "web".into();
        forged.label = Label::USER;
        let forged = BTreeMap::from([(forged.id(), forged)]);
        assert!(matches!(
            Graph::try_from(forged),
            Err(Error::WrongLabel { .. })
        ));
    }
}
