//! What a driver decides about a run id from what it knows of it. Pure: the book asks it, and
//! so does the model of the claim protocol in `tests/model`.

use super::Ballot;

/// What is known of a run id that somebody has asked about.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Standing<Spec> {
    /// It was claimed here, however that ended; its results may be kept no longer.
    Ran { spec: Spec, kept: bool },
    /// It has not run here. Of its claims only those above this ballot and with its nonce
    /// are taken.
    Fenced(Ballot),
}

/// What becomes of a claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnClaim {
    /// It may have a slot.
    Take,
    /// It was granted before.
    Repeat,
    /// It was granted before, and nothing is left to be told.
    Released,
    /// The id is another command's.
    OtherCommand,
    /// Another try stands before it.
    Fenced(Ballot),
}

/// What becomes of a fence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnFence {
    /// The run is here.
    Have,
    /// It stands at this ballot, the highest that was shown.
    Fenced(Ballot),
}

impl<Spec: PartialEq> Standing<Spec> {
    /// Decides about a claim of `spec`.
    pub fn on_claim(this: Option<&Self>, spec: &Spec, ballot: Ballot) -> OnClaim {
        match this {
            None => OnClaim::Take,
            Some(Self::Ran { spec: other, .. }) if other != spec => OnClaim::OtherCommand,
            Some(Self::Ran { kept: true, .. }) => OnClaim::Repeat,
            Some(Self::Ran { kept: false, .. }) => OnClaim::Released,
            // Above a fence it is the turn of who made it, and of nobody else.
            Some(Self::Fenced(fence)) if ballot > *fence && ballot.nonce == fence.nonce => {
                OnClaim::Take
            }
            Some(Self::Fenced(fence)) => OnClaim::Fenced(*fence),
        }
    }

    /// Decides about a fence; what it answers stands from then on.
    pub fn on_fence(this: Option<&Self>, ballot: Ballot) -> OnFence {
        match this {
            None => OnFence::Fenced(ballot),
            Some(Self::Ran { .. }) => OnFence::Have,
            // Attempt 0 only asks, where there is a fence.
            Some(Self::Fenced(fence)) if ballot.attempt == 0 => OnFence::Fenced(*fence),
            Some(Self::Fenced(fence)) => OnFence::Fenced(ballot.max(*fence)),
        }
    }
}
