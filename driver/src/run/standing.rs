//! The decisions about a run id, from what the driver knows about it. Pure: both the book
//! and the model of the claim protocol in `tests/model` use it.

use super::Ballot;

/// What is known about a run id.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Standing<Spec> {
    /// The run was claimed here, however it ended; its results may no longer be kept.
    Ran { spec: Spec, kept: bool },
    /// The run has not run here. Only claims above this ballot that have its nonce are
    /// accepted.
    Fenced(Ballot),
    /// The id was first seen here with another user's run. No run of this user takes it here,
    /// nor has one: what is known stays known until the id is too old for a claim.
    OtherUser,
}

/// The decision about a claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnClaim {
    /// The claim may get a slot.
    Take,
    /// The claim was granted before.
    Repeat,
    /// The claim was granted before, but its results are no longer kept.
    Released,
    /// The id belongs to another command.
    OtherCommand,
    /// Another try has precedence.
    Fenced(Ballot),
    /// The id belongs to another user's run.
    OtherUser,
}

/// The decision about a fence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnFence {
    /// The run is here.
    Have,
    /// The run is fenced at this ballot, the highest so far.
    Fenced(Ballot),
    /// The user's run is not here, and never will be.
    OtherUser,
}

impl<Spec: PartialEq> Standing<Spec> {
    /// Decides about a claim of `spec`.
    pub fn on_claim(this: Option<&Self>, spec: &Spec, ballot: Ballot) -> OnClaim {
        match this {
            None => OnClaim::Take,
            Some(Self::Ran { spec: other, .. }) if other != spec => OnClaim::OtherCommand,
            Some(Self::Ran { kept: true, .. }) => OnClaim::Repeat,
            Some(Self::Ran { kept: false, .. }) => OnClaim::Released,
            // Above a fence, only the try that made the fence may claim.
            Some(Self::Fenced(fence)) if ballot > *fence && ballot.nonce == fence.nonce => {
                OnClaim::Take
            }
            Some(Self::Fenced(fence)) => OnClaim::Fenced(*fence),
            Some(Self::OtherUser) => OnClaim::OtherUser,
        }
    }

    /// Decides about a fence; the result then holds.
    pub fn on_fence(this: Option<&Self>, ballot: Ballot) -> OnFence {
        match this {
            None => OnFence::Fenced(ballot),
            Some(Self::Ran { .. }) => OnFence::Have,
            // Attempt 0 only queries an existing fence.
            Some(Self::Fenced(fence)) if ballot.attempt == 0 => OnFence::Fenced(*fence),
            Some(Self::Fenced(fence)) => OnFence::Fenced(ballot.max(*fence)),
            Some(Self::OtherUser) => OnFence::OtherUser,
        }
    }
}
