//! Decisions of the audit log as evidence that anybody can check with a public key: one DSSE envelope
//! (github.com/secure-systems-lab/dsse, protocol v1) a line, around a statement of in-toto (v1). Each
//! names the envelope before it, so that none can be taken out unnoticed.

use base64::prelude::{BASE64_STANDARD, Engine};
use polydev_proto::signing::{NotSigned, PublicKeys, SigningKey};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::chain::{Entry, Line};

const PAYLOAD_TYPE: &str = "application/vnd.in-toto+json";
const STATEMENT: &str = "https://in-toto.io/Statement/v1";
const PREDICATE: &str = "https://polydev.dev/decision/v1";
/// What the first envelope names.
const BEGIN: &str = "0000000000000000000000000000000000000000000000000000000000000000";
/// Longest line of a ledger, in bytes.
pub const MAX_LINE: usize = 64 << 10;

/// Writes envelopes.
#[derive(Debug)]
pub struct Ledger<'a> {
    key: &'a SigningKey,
    /// How many there are, and SHA-256 of the last payload.
    number: u64,
    previous: String,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Envelope {
    payload_type: String,
    /// Base64.
    payload: String,
    signatures: Vec<Signature>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Signature {
    keyid: String,
    /// Base64.
    sig: String,
}

/// What a ledger has, as far as it was read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Read {
    pub decisions: u64,
    /// When the last one was made.
    pub last: String,
    previous: Option<String>,
}

/// Why a ledger is not evidence.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    #[error("line {line} is not an envelope with a statement about a decision")]
    Form { line: u64 },
    #[error("line {line} was changed, or is not signed by these keys")]
    Signature { line: u64, source: NotSigned },
    #[error("line {line} does not follow the line before it: lines were removed or moved")]
    Order { line: u64 },
}

impl<'a> Ledger<'a> {
    #[must_use]
    pub fn new(key: &'a SigningKey) -> Self {
        Self {
            key,
            number: 0,
            previous: BEGIN.into(),
        }
    }

    /// The envelope of a line of the audit log; `None` for one without a decision.
    pub fn envelope(&mut self, line: &Line) -> Option<String> {
        let Entry::Record(record) = &line.entry else {
            return None;
        };
        let policy = record.policy.as_ref()?;
        self.number += 1;
        let run = record.run_id.as_deref().unwrap_or_default();
        let payload = json!({
            "_type": STATEMENT,
            "subject": [{ "name": run, "digest": { "sha256": policy.facts_hash } }],
            "predicateType": PREDICATE,
            "predicate": {
                "number": self.number,
                "previous": self.previous,
                "time": line.time,
                "audit_line": line.number,
                "record": record,
            },
        })
        .to_string();
        let signature = self.key.sign(&signed(payload.as_bytes()));
        let envelope = Envelope {
            payload_type: PAYLOAD_TYPE.into(),
            payload: BASE64_STANDARD.encode(&payload),
            signatures: vec![Signature {
                keyid: self.key.id().into(),
                sig: BASE64_STANDARD.encode(signature),
            }],
        };
        self.previous = hex::encode(Sha256::digest(payload));
        Some(serde_json::to_string(&envelope).expect("an envelope has texts alone"))
    }
}

impl Read {
    /// Checks the next line of a ledger.
    ///
    /// # Errors
    /// [`Broken`]
    pub fn line(&mut self, text: &str, keys: &PublicKeys) -> Result<(), Broken> {
        let line = self.decisions + 1;
        let form = || Broken::Form { line };
        if text.len() > MAX_LINE {
            return Err(form());
        }
        let envelope: Envelope = serde_json::from_str(text).map_err(|_| form())?;
        let [signature] = &envelope.signatures[..] else {
            return Err(form());
        };
        if envelope.payload_type != PAYLOAD_TYPE {
            return Err(form());
        }
        let payload = BASE64_STANDARD
            .decode(&envelope.payload)
            .map_err(|_| form())?;
        let sig = BASE64_STANDARD.decode(&signature.sig).map_err(|_| form())?;
        let verified = keys.verify(&signature.keyid, &signed(&payload), &sig);
        verified.map_err(|source| Broken::Signature { line, source })?;
        let statement: Value = serde_json::from_slice(&payload).map_err(|_| form())?;
        let predicate = &statement["predicate"];
        let is_ours = statement["_type"] == STATEMENT && statement["predicateType"] == PREDICATE;
        let (true, Some(time)) = (is_ours, predicate["time"].as_str()) else {
            return Err(form());
        };
        let previous = self.previous.as_deref().unwrap_or(BEGIN);
        if predicate["number"] != line || predicate["previous"] != previous {
            return Err(Broken::Order { line });
        }
        *self = Self {
            decisions: line,
            last: time.into(),
            previous: Some(hex::encode(Sha256::digest(&payload))),
        };
        Ok(())
    }
}

/// DSSE's pre-authentication encoding.
fn signed(payload: &[u8]) -> Vec<u8> {
    let head = format!(
        "DSSEv1 {} {PAYLOAD_TYPE} {} ",
        PAYLOAD_TYPE.len(),
        payload.len()
    );
    [head.as_bytes(), payload].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        access::Caller,
        audit::record::{Operation, Record},
        policy::Decided,
    };
    use polydev_policy::decision::Outcome;
    use polydev_transport::connection::Origin;
    use rcgen::{KeyPair, PKCS_ED25519};

    fn line(number: u64, reason: &str) -> Line {
        let caller = Caller {
            name: "cn:a".into(),
            user: None,
            origin: Origin::Process { uid: 0, pid: None },
        };
        let decided = Decided {
            outcome: Outcome::Block,
            reason: reason.into(),
            rules: vec!["rule".into()],
            policy_hash: "1".into(),
            facts_hash: "2".into(),
            shadow: false,
        };
        Line {
            number,
            time: format!("2026-12-01T00:00:0{number}Z"),
            entry: Entry::Record(Record::new(&caller, Operation::Start).decided(Some(decided))),
        }
    }

    /// Three envelopes, and the public key.
    fn ledger() -> (Vec<String>, PublicKeys) {
        let pair = KeyPair::generate_for(&PKCS_ED25519).unwrap();
        let key = SigningKey::read(pair.serialize_pem().as_bytes()).unwrap();
        let keys = PublicKeys::read(pair.public_key_pem().as_bytes()).unwrap();
        let mut ledger = Ledger::new(&key);
        let lines = (1..=3).map(|number| ledger.envelope(&line(number, "why")).unwrap());
        (lines.collect(), keys)
    }

    fn read(lines: &[String], keys: &PublicKeys) -> Result<Read, Broken> {
        let mut read = Read::default();
        lines.iter().try_for_each(|line| read.line(line, keys))?;
        Ok(read)
    }

    #[test]
    fn a_ledger_is_verified_with_its_public_key_alone() {
        let (lines, keys) = ledger();
        let whole = read(&lines, &keys).unwrap();
        assert_eq!(
            (whole.decisions, whole.last.as_str()),
            (3, "2026-12-01T00:00:03Z")
        );
        let (_, others) = ledger();
        let refused = read(&lines, &others);
        assert!(
            matches!(refused, Err(Broken::Signature { line: 1, .. })),
            "{refused:?}"
        );
    }

    #[test]
    fn what_was_changed_removed_or_moved_is_found() {
        let (lines, keys) = ledger();
        let [first, second, third] = [0, 1, 2].map(|index| lines[index].clone());
        for (changed, broken) in [
            (vec![second.clone()], Broken::Order { line: 1 }),
            (
                vec![first.clone(), third.clone()],
                Broken::Order { line: 2 },
            ),
            (
                vec![first.clone(), third, second.clone()],
                Broken::Order { line: 2 },
            ),
            (
                vec![first.clone(), first.clone()],
                Broken::Order { line: 2 },
            ),
            (vec![first.clone(), "{}".into()], Broken::Form { line: 2 }),
        ] {
            assert_eq!(read(&changed, &keys), Err(broken));
        }
        let mut envelope: Envelope = serde_json::from_str(&second).unwrap();
        let payload = BASE64_STANDARD.decode(&envelope.payload).unwrap();
        let payload = String::from_utf8(payload)
            .unwrap()
            .replace("block", "allow");
        envelope.payload = BASE64_STANDARD.encode(payload);
        let changed = serde_json::to_string(&envelope).unwrap();
        let refused = read(&[first, changed], &keys);
        assert!(
            matches!(refused, Err(Broken::Signature { line: 2, .. })),
            "{refused:?}"
        );
    }

    #[test]
    fn a_line_without_a_decision_has_no_envelope() {
        let pair = KeyPair::generate_for(&PKCS_ED25519).unwrap();
        let key = SigningKey::read(pair.serialize_pem().as_bytes()).unwrap();
        let begin = Line {
            number: 1,
            time: String::new(),
            entry: Entry::Begin {
                previous: String::new(),
            },
        };
        assert_eq!(Ledger::new(&key).envelope(&begin), None);
    }
}
