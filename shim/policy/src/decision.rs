//! What was decided, and why.

use serde::{Deserialize, Serialize};

use crate::{lattice::Label, sink::Risk};

/// What happens to what was asked for. The order is from the mildest to the strictest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    Allow,
    /// Somebody else must approve it first.
    StepUp,
    Block,
}

impl Outcome {
    /// The name in files, records and answers.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::StepUp => "step_up",
            Self::Block => "block",
        }
    }
}

/// The sink of a decision.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DecidedSink {
    pub tool: String,
    pub action: String,
    pub risk: Risk,
}

/// The data that a decision is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DecidedData {
    pub node_id: String,
    /// Missing if there is no such node.
    #[serde(flatten)]
    pub label: Option<Label>,
}

/// A decision about one tool call. The names of the fields are those that existing programs read
/// (MVAR 1.5.3, `docs/ADAPTER_SPEC.md`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    pub outcome: Outcome,
    pub reason: String,
    pub evaluation_trace: Vec<String>,
    /// The rules that decided, by their names.
    pub rules: Vec<String>,
    /// 64 hexadecimal digits, as the two that follow.
    pub policy_hash: String,
    pub target_hash: String,
    /// Over all arguments.
    pub arguments_hash: String,
    pub sink: DecidedSink,
    pub provenance: DecidedData,
}
