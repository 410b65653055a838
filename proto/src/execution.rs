//! Execution tokens: what a shim has allowed, signed for one claim, and checked by a driver that
//! has public keys alone.
//!
//! What is signed is the token without its signature, as it is encoded, after [`CONTEXT`]. The token
//! has the SHA-256 of the claim without its token, as it is encoded: of every field, also of those
//! that later versions add. A driver that does not know a field encodes the claim without it, and
//! refuses. Maps are encoded in the order of their keys.
//!
//! A token is for one driver, and through the claim for one container of one slot, one run and one
//! try of it. A container serves one run, so a token executes one command, however often it is sent.

use std::time::SystemTime;

use prost::Message;
use ring::digest;
use serde::{Deserialize, Serialize};

use crate::{
    broker::Egress,
    node::{Claim, ExecutionToken},
    signing::{NotSigned, PublicKeys, SigningKey},
};

/// What keeps these signatures apart from others of the same key.
const CONTEXT: &[u8] = b"polydev execution token v1\n";
/// Why a token does not permit a claim.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    #[error("the claim has no execution token, and this node requires one")]
    Missing,
    #[error(transparent)]
    NotSigned(#[from] NotSigned),
    #[error("it is for another node")]
    Audience,
    #[error("it has expired")]
    Expired,
    #[error("it is for another claim than this one")]
    Claim,
    #[error("it is for image `{token}`, and the slot has `{slot}`")]
    Image { token: String, slot: String },
    #[error("it is for a container that may reach something else")]
    Egress,
}

/// What a shim knows of the slot that it claims.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// The driver's `node_identity`.
    pub audience: &'a str,
    pub image: &'a str,
    pub egress: Option<&'a Egress>,
    /// When the token ends, in the driver's clock.
    pub expires_at: SystemTime,
}

/// Who has allowed a run.
#[derive(Debug, Clone, Copy, Default)]
pub struct Because<'a> {
    /// Of the policy; empty if roles alone have.
    pub policy_hash: &'a str,
    /// Who has approved the run; empty if the policy required no approval.
    pub approver: &'a str,
}

/// A token for this claim as it is, at this place.
#[must_use]
pub fn issue(key: &SigningKey, claim: &Claim, place: Place, because: Because) -> ExecutionToken {
    let nonce: [u8; 16] = rand::random();
    let mut token = ExecutionToken {
        key_id: key.id().into(),
        audience: place.audience.into(),
        nonce: nonce.to_vec().into(),
        expires_at: Some(place.expires_at.into()),
        image: place.image.into(),
        egress: place.egress.cloned(),
        claim_sha256: claim_sha256(claim),
        policy_hash: because.policy_hash.into(),
        approver: because.approver.into(),
        signature: bytes::Bytes::new(),
    };
    token.signature = key.sign(&signed(&token)).into();
    token
}

/// A token and what it must fit, of a claim that is about to be taken apart.
#[derive(Debug, Clone, Default)]
pub struct Presented {
    token: Option<ExecutionToken>,
    claim_sha256: bytes::Bytes,
    input: Option<SignedInput>,
}

/// The input that came with a run, and that its token is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SignedInput {
    /// Its offset in the run's input.
    pub from: u64,
    pub bytes: u64,
    /// Hexadecimal digits.
    pub sha256: String,
}

impl SignedInput {
    fn of(claim: &Claim) -> Option<Self> {
        let spec = claim.spec.as_ref()?;
        (spec.input_bytes > 0).then(|| Self {
            from: spec.input_from,
            bytes: spec.input_bytes,
            sha256: hex::encode(&spec.input_sha256),
        })
    }
}

impl Presented {
    /// Takes the token out of a claim.
    #[must_use]
    pub fn take(claim: &mut Claim) -> Self {
        let token = claim.token.take();
        let claim_sha256 = match token {
            Some(_) => claim_sha256(claim),
            None => bytes::Bytes::new(),
        };
        Self {
            token,
            claim_sha256,
            input: SignedInput::of(claim),
        }
    }
}

/// What is known of a token that permits a claim. It is in the driver's journal too.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Permit {
    pub key_id: String,
    /// Hexadecimal digits.
    pub nonce: String,
    /// Of the policy that has allowed the run; empty if roles alone have.
    pub policy_hash: String,
    /// Who has approved the run; empty if the policy required no approval.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub approver: String,
    /// `None` if the run came without input.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input: Option<SignedInput>,
}

impl Presented {
    /// Whether the token permits its claim here and now.
    ///
    /// # Errors
    /// [`Invalid`]
    pub fn check(
        &self,
        keys: &PublicKeys,
        audience: &str,
        image: &str,
        egress: Option<&Egress>,
        now: SystemTime,
    ) -> Result<Permit, Invalid> {
        let token = self.token.as_ref().ok_or(Invalid::Missing)?;
        keys.verify(&token.key_id, &signed(token), &token.signature)?;
        if token.audience != audience {
            return Err(Invalid::Audience);
        }
        let expires = token
            .expires_at
            .and_then(|at| SystemTime::try_from(at).ok());
        if expires.is_none_or(|expires| expires <= now) {
            return Err(Invalid::Expired);
        }
        if token.claim_sha256 != self.claim_sha256 {
            return Err(Invalid::Claim);
        }
        if token.image != image {
            return Err(Invalid::Image {
                token: token.image.clone(),
                slot: image.into(),
            });
        }
        if token.egress.as_ref() != egress {
            return Err(Invalid::Egress);
        }
        Ok(Permit {
            key_id: token.key_id.clone(),
            nonce: hex::encode(&token.nonce),
            policy_hash: token.policy_hash.clone(),
            approver: token.approver.clone(),
            input: self.input.clone(),
        })
    }
}

fn claim_sha256(claim: &Claim) -> bytes::Bytes {
    let bare;
    let claim = match claim.token {
        None => claim,
        Some(_) => {
            bare = Claim {
                token: None,
                ..claim.clone()
            };
            &bare
        }
    };
    let digest = digest::digest(&digest::SHA256, &claim.encode_to_vec());
    digest.as_ref().to_vec().into()
}

fn signed(token: &ExecutionToken) -> Vec<u8> {
    let token = ExecutionToken {
        signature: bytes::Bytes::new(),
        ..token.clone()
    };
    [CONTEXT, &token.encode_to_vec()].concat()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        init::{InputFile, Prompt, TerminalSize},
        node::{Ballot, RunSpec},
        signing::tests::keys,
    };
    use proptest::prelude::*;

    fn public_keys() -> PublicKeys {
        PublicKeys::read(keys().1.as_bytes()).expect("a public key")
    }

    fn claim() -> Claim {
        Claim {
            run_id: "run".into(),
            slot_id: "slot".into(),
            generation: 3,
            start_id: "start".into(),
            user_id: "alice".into(),
            spec: Some(RunSpec {
                argv: vec!["sh".into(), "-c".into(), "true".into()],
                env: [("A".into(), "1".into()), ("B".into(), "2".into())].into(),
                work_dir: "/workspace".into(),
                stdin: true,
                terminal: Some(TerminalSize {
                    columns: 80,
                    rows: 24,
                }),
                files: vec![InputFile {
                    path: "a".into(),
                    size: 4,
                    mode: 0o644,
                }],
                input_sha256: vec![7; 32].into(),
                input_bytes: 4,
                prompt: Some(Prompt {
                    text: "hello".into(),
                    model: "m".into(),
                    ..Prompt::default()
                }),
                ..RunSpec::default()
            }),
            ballot: Some(Ballot {
                attempt: 1,
                ..Ballot::default()
            }),
            sealed_secrets: vec![1; 64].into(),
            sealed_keys: vec![2; 64].into(),
            ..Claim::default()
        }
    }

    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_900_000_000)
    }

    fn signed_claim() -> Claim {
        let mut claim = claim();
        let place = Place {
            audience: "node",
            image: "image:1",
            egress: None,
            expires_at: now() + Duration::from_secs(5),
        };
        let key = SigningKey::read(keys().0.as_bytes()).expect("a key");
        let because = Because {
            policy_hash: "policy",
            approver: "cn:erin",
        };
        claim.token = Some(issue(&key, &claim, place, because));
        claim
    }

    fn check(mut claim: Claim) -> Result<Permit, Invalid> {
        let presented = Presented::take(&mut claim);
        presented.check(&public_keys(), "node", "image:1", None, now())
    }

    #[test]
    fn a_token_permits_its_claim_and_says_who_has_signed() {
        let permit = check(signed_claim()).unwrap();
        let key = SigningKey::read(keys().0.as_bytes()).unwrap();
        assert_eq!(permit.key_id, key.id());
        let Permit {
            nonce,
            policy_hash,
            approver,
            ..
        } = &permit;
        assert_eq!(
            (nonce.len(), &**policy_hash, &**approver),
            (32, "policy", "cn:erin")
        );
    }

    #[test]
    fn a_permit_says_which_input_is_signed() {
        let input = SignedInput {
            from: 0,
            bytes: 4,
            sha256: "07".repeat(32),
        };
        assert_eq!(check(signed_claim()).unwrap().input, Some(input));
    }

    #[test]
    fn a_token_is_for_one_node_image_list_and_time() {
        let presented = Presented::take(&mut signed_claim());
        let list = Egress::default();
        let later = now() + Duration::from_secs(5);
        for (audience, image, egress, now, refused) in [
            ("other", "image:1", None, now(), Invalid::Audience),
            (
                "node",
                "image:2",
                None,
                now(),
                Invalid::Image {
                    token: "image:1".into(),
                    slot: "image:2".into(),
                },
            ),
            ("node", "image:1", Some(&list), now(), Invalid::Egress),
            ("node", "image:1", None, later, Invalid::Expired),
        ] {
            let checked = presented.check(&public_keys(), audience, image, egress, now);
            assert_eq!(checked, Err(refused));
        }
    }

    #[test]
    fn without_a_token_of_a_known_key_nothing_is_permitted() {
        assert_eq!(check(claim()), Err(Invalid::Missing));
        let mut other = signed_claim();
        other.token.as_mut().unwrap().key_id = "0".repeat(16);
        assert_eq!(
            check(other),
            Err(NotSigned::UnknownKey("0".repeat(16)).into())
        );
        let mut other = signed_claim();
        other.token.as_mut().unwrap().expires_at = Some((now() + Duration::from_secs(99)).into());
        assert_eq!(check(other), Err(NotSigned::Wrong.into()));
    }

    proptest! {
        /// Whatever is changed of what is executed, in one byte of it or more.
        #[test]
        fn a_claim_with_another_byte_is_another_claim(at in any::<prop::sample::Index>(), flip in 1u8..) {
            let claim = signed_claim();
            let token = claim.token.clone();
            let mut bytes = Claim { token: None, ..claim.clone() }.encode_to_vec();
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            // Most changes break the encoding; then there is no claim.
            if let Ok(mut changed) = Claim::decode(&bytes[..]) {
                let is_same = changed == Claim { token: None, ..claim };
                changed.token = token;
                prop_assert_eq!(check(changed).is_ok(), is_same);
            }
        }

        #[test]
        fn a_token_with_another_byte_is_not_valid(at in any::<prop::sample::Index>(), flip in 1u8..) {
            let mut claim = signed_claim();
            let token = claim.token.take().unwrap();
            let mut bytes = token.encode_to_vec();
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            if let Ok(changed) = ExecutionToken::decode(&bytes[..]) && changed != token {
                claim.token = Some(changed);
                prop_assert!(check(claim).is_err());
            }
        }
    }
}
