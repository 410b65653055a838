//! Decides about a tool call, step by step: the first step that refuses decides.

use serde_json::{Value, json};

use crate::{
    boundary, canonical,
    capability::Grants,
    decision::{DecidedData, DecidedSink, Decision, Outcome},
    lattice::Confidentiality,
    provenance::{Graph, Node, NodeId},
    rules::{Rules, ToolFacts},
    sink::{Risk, Sink, Sinks},
};

/// Everything that a decision depends on, beside the call and its data.
#[derive(Debug, Clone)]
pub struct Gate {
    pub sinks: Sinks,
    pub grants: Grants,
    pub rules: Rules,
    pub settings: Settings,
}

/// Settings of a gate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// With this, a gate with another [`Gate::policy_hash`] blocks everything.
    pub expected_policy_hash: Option<String>,
    /// What else the decisions of this gate depend on, for the hash.
    pub others: Value,
}

/// What a model wants to do.
#[derive(Debug, Clone, PartialEq)]
pub struct Call<'a> {
    pub caller: &'a str,
    pub tool: &'a str,
    pub action: &'a str,
    /// What the call acts on: what is checked is what is executed.
    pub target: &'a str,
    pub arguments: &'a Value,
    /// What the call is made of.
    pub node: &'a NodeId,
}

impl Gate {
    /// Over all that decides: sinks, grants, rules and settings. 64 hexadecimal digits.
    #[must_use]
    pub fn policy_hash(&self) -> String {
        let Settings {
            expected_policy_hash: _,
            others,
        } = &self.settings;
        canonical::hash(&json!({
            "sinks": self.sinks.hash(),
            "grants": self.grants,
            "rules": self.rules.hash(),
            "settings": others,
        }))
    }

    /// Decides about a call. It is not made here.
    #[must_use]
    pub fn decide(&self, graph: &Graph, call: &Call) -> Decision {
        let policy_hash = self.policy_hash();
        let mut trace = vec![format!("policy_hash: {policy_hash}")];
        let sink = self.sinks.get(call.tool, call.action);
        let node = graph.get(call.node);
        let found = self.find(sink, node, call, &policy_hash, &mut trace);
        let (outcome, reason, rules) = match found {
            Ok(decided) => decided,
            Err(reason) => (Outcome::Block, reason, Vec::new()),
        };
        trace.push(format!("final_decision: {}", outcome.name()));
        Decision {
            outcome,
            reason,
            evaluation_trace: trace,
            rules,
            policy_hash,
            target_hash: canonical::sha256(call.target.as_bytes()),
            arguments_hash: canonical::hash(call.arguments),
            sink: DecidedSink {
                tool: call.tool.into(),
                action: call.action.into(),
                risk: sink.map_or(Risk::Critical, |sink| sink.risk),
            },
            provenance: DecidedData {
                node_id: call.node.0.clone(),
                label: node.map(|node| node.label),
            },
        }
    }

    fn find(
        &self,
        sink: Option<&Sink>,
        node: Option<&Node>,
        call: &Call,
        policy_hash: &str,
        trace: &mut Vec<String>,
    ) -> Result<(Outcome, String, Vec<String>), String> {
        let Call {
            tool,
            action,
            target,
            ..
        } = call;
        let mut refuse = |step: &str, reason: String| {
            trace.push(format!("{step} → BLOCK"));
            reason
        };
        if let Some(expected) = &self.settings.expected_policy_hash
            && expected != policy_hash
        {
            let reason =
                format!("Startup policy verification failed: the policy's hash is not {expected}");
            return Err(refuse("startup_policy_verification_failed", reason));
        }
        let Some(sink) = sink else {
            let reason = format!("Unknown sink: {tool}.{action} (not registered)");
            return Err(refuse("sink_unknown", reason));
        };
        trace.push(format!("sink_classified: {}", sink.risk.name()));
        if let Err(violation) = boundary::check(sink, target, call.arguments) {
            trace.push(format!("boundary_violation: {violation} → BLOCK"));
            return Err(format!("Strict boundary denied target: {violation}"));
        }
        if let Some(capability) = sink.require_capability {
            let is_granted = self.grants.allow(tool, action, capability, target);
            trace.push(format!("capability_check: {is_granted}"));
            if !is_granted {
                let name = capability.name();
                return Err(format!(
                    "Capability denied: {tool} lacks {name} for {target}"
                ));
            }
        }
        let Some(node) = node else {
            trace.push("provenance_missing → BLOCK".into());
            return Err(format!("Provenance node not found: {}", call.node.0));
        };
        let label = node.label;
        trace.push(format!("integrity: {}", label.integrity.name()));
        trace.push(format!("confidentiality: {}", label.confidentiality.name()));
        if let Some(scopes) = &sink.metadata.allowed_scopes {
            check_scope(scopes, node, call.arguments, trace)?;
        }
        let verdict = self.rules.tool(&ToolFacts {
            caller: call.caller.into(),
            tool: sink.tool.clone(),
            action: sink.action.clone(),
            target: call.target.into(),
            risk: sink.risk,
            blocks_untrusted: sink.block_untrusted_integrity,
            blocks_egress: sink.block_confidential_egress,
            label,
            tags: node.tags.iter().cloned().collect(),
            agent: None,
        });
        trace.extend(verdict.trace);
        trace.push(format!("base_decision: {}", verdict.outcome.name()));
        Ok((verdict.outcome, verdict.reason, verdict.rules))
    }
}

/// Sensitive data must not be written to memory that more people see than the first of the sink's
/// scopes. Where data comes from is not for the call to say.
fn check_scope(
    scopes: &[String],
    node: &Node,
    arguments: &Value,
    trace: &mut Vec<String>,
) -> Result<(), String> {
    let rank = match arguments.get("scope") {
        None => Some(0),
        Some(scope) => scopes.iter().position(|known| *scope == **known),
    };
    let invalid = || format!("Invalid memory scope (allowed: {})", scopes.join("|"));
    let is_wider = rank.ok_or_else(invalid)? > 0;
    trace.push(format!("memory_scope_widening: {is_wider}"));
    if is_wider && node.label.confidentiality > Confidentiality::Public {
        trace.push("declassify_token_missing → BLOCK".into());
        return Err("Declassify token required for sensitive cross-scope memory write".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests;
