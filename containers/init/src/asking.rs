//! Calls of tools on their way from the agent to the driver, and the answers back: over a socket of
//! their own, because the agent's stdin carries what the run's caller says.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    fs::File,
    io::{self, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
};

use bytes::BytesMut;
use polydev_proto::{
    agent::{MAX_ARGUMENTS, MAX_CALLS, MAX_TOOL_NAME},
    frame,
    init::{ToolAnswer, ToolCall},
};

use crate::{agent::next_frame, command::set_nonblocking};

/// What the files that came with a run are called.
const FILES: &str = "files";

/// The calls of one run.
#[derive(Debug)]
pub(crate) struct Asking {
    socket: File,
    input: BytesMut,
    /// What is in the conversation and was not written by the caller.
    entered: BTreeSet<String>,
    /// Whether the container may reach more than the model.
    reaches: bool,
    /// Without an answer.
    waiting: BTreeMap<u64, ToolCall>,
}

impl Asking {
    /// Both ends: ours, and the agent's.
    ///
    /// # Errors
    /// The kernel's error.
    pub(crate) fn new(has_files: bool, reaches: bool) -> io::Result<(Self, OwnedFd)> {
        let (ours, its_end) = UnixStream::pair()?;
        let socket = File::from(OwnedFd::from(ours));
        set_nonblocking(&socket);
        let asking = Self {
            socket,
            input: BytesMut::new(),
            entered: has_files.then(|| FILES.to_owned()).into_iter().collect(),
            reaches,
            waiting: BTreeMap::new(),
        };
        Ok((asking, its_end.into()))
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Reads what is there, and passes on the new calls and those that wait no longer. Returns whether
    /// more may come.
    pub(crate) fn receive(&mut self, mut pass_on: impl FnMut(ToolCall)) -> bool {
        loop {
            match next_frame::<ToolCall>(&mut self.socket, &mut self.input) {
                Ok(Some(call)) if call.withdrawn => {
                    if self.waiting.remove(&call.number).is_some() {
                        pass_on(ToolCall {
                            number: call.number,
                            withdrawn: true,
                            ..ToolCall::default()
                        });
                    }
                }
                Ok(Some(call)) => {
                    // An agent that is in order makes no such calls; a shim would not see them.
                    let is_too_much = self.waiting.len() >= MAX_CALLS
                        || call.name.len() > MAX_TOOL_NAME
                        || call.arguments.len() > MAX_ARGUMENTS;
                    if let Entry::Vacant(place) = self.waiting.entry(call.number)
                        && !is_too_much
                    {
                        let entered = self.entered.iter().cloned().collect();
                        let call = ToolCall {
                            entered,
                            reaches: self.reaches,
                            ..call
                        };
                        pass_on(place.insert(call).clone());
                    }
                }
                Ok(None) => return true,
                Err(_) => return false,
            }
        }
    }

    /// The calls that a driver may not know.
    pub(crate) fn waiting(&self) -> impl Iterator<Item = ToolCall> + '_ {
        self.waiting.values().cloned()
    }

    /// Passes on an answer. The answers to all calls that wait fit into the socket.
    pub(crate) fn answer(&mut self, answer: ToolAnswer) {
        let is_last = answer.wait_seconds == 0;
        match self.waiting.entry(answer.number) {
            Entry::Occupied(place) if is_last => drop(place.remove()),
            Entry::Occupied(_) => {}
            Entry::Vacant(_) => return, // It has one.
        }
        let mut frame = BytesMut::new();
        if frame::encode(&answer, &mut frame).is_ok() {
            // An agent that takes nothing goes without, and does not make the call.
            let _gone = self.socket.write_all(&frame);
        }
        if is_last && answer.allowed && !answer.enters.is_empty() {
            self.entered.insert(answer.enters);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn call(number: u64) -> ToolCall {
        ToolCall {
            number,
            name: "Bash".into(),
            arguments: "{}".into(),
            entered: vec!["it says so itself".into()],
            ..ToolCall::default()
        }
    }

    fn send(agent: &mut UnixStream, call: &ToolCall) {
        let mut frame = BytesMut::new();
        frame::encode(call, &mut frame).unwrap();
        agent.write_all(&frame).unwrap();
    }

    fn received(asking: &mut Asking) -> Vec<ToolCall> {
        let mut calls = Vec::new();
        assert!(asking.receive(|call| calls.push(call)));
        calls
    }

    fn answer(number: u64, enters: &str) -> ToolAnswer {
        ToolAnswer {
            number,
            allowed: true,
            enters: enters.into(),
            ..ToolAnswer::default()
        }
    }

    #[test]
    fn what_has_entered_a_conversation_is_said_with_every_later_call() {
        let (mut asking, agent) = Asking::new(true, false).unwrap();
        let mut agent = UnixStream::from(agent);
        send(&mut agent, &call(1));
        assert_eq!(received(&mut asking)[0].entered, ["files"]);
        asking.answer(answer(1, "web"));
        send(&mut agent, &call(2));
        let calls = received(&mut asking);
        assert_eq!(calls[0].entered, ["files", "web"]);
        assert_eq!(asking.waiting().collect::<Vec<_>>(), calls);
        asking.answer(answer(2, ""));
        assert_eq!(asking.waiting().count(), 0);
    }

    #[test]
    fn a_call_is_answered_once_and_cannot_become_another_one() {
        let (mut asking, agent) = Asking::new(false, false).unwrap();
        let mut agent = UnixStream::from(agent);
        send(&mut agent, &call(1));
        let other = ToolCall {
            name: "other".into(),
            ..call(1)
        };
        send(&mut agent, &other);
        assert_eq!(received(&mut asking).len(), 1);
        assert_eq!(asking.waiting().next().unwrap().name, "Bash");
        asking.answer(answer(1, ""));
        asking.answer(answer(1, ""));
        drop(asking);
        let mut answers = BytesMut::new();
        let mut bytes = Vec::new();
        agent.read_to_end(&mut bytes).unwrap();
        answers.extend_from_slice(&bytes);
        assert!(frame::decode::<ToolAnswer>(&mut answers).unwrap().is_some());
        assert!(answers.is_empty());
    }

    #[test]
    fn a_call_that_waits_for_an_approval_waits_until_it_has_one_or_is_withdrawn() {
        let (mut asking, agent) = Asking::new(false, false).unwrap();
        let mut agent = UnixStream::from(agent);
        for number in [1, 2] {
            send(&mut agent, &call(number));
        }
        assert_eq!(received(&mut asking).len(), 2);
        let waits = ToolAnswer {
            wait_seconds: 300,
            ..answer(1, "web")
        };
        asking.answer(waits);
        assert_eq!(asking.waiting().count(), 2);
        assert!(asking.entered.is_empty());
        let withdrawn = ToolCall {
            number: 2,
            withdrawn: true,
            ..ToolCall::default()
        };
        for _ in 0..2 {
            send(&mut agent, &withdrawn);
        }
        assert_eq!(received(&mut asking), [withdrawn]);
        asking.answer(answer(1, "web"));
        assert_eq!(asking.waiting().count(), 0);
        assert!(asking.entered.contains("web"));
    }

    #[test]
    fn no_more_calls_wait_than_fit() {
        let (mut asking, agent) = Asking::new(false, false).unwrap();
        let mut agent = UnixStream::from(agent);
        for number in 0..=MAX_CALLS as u64 {
            send(&mut agent, &call(number));
        }
        assert_eq!(received(&mut asking).len(), MAX_CALLS);
        drop(agent);
        assert!(!asking.receive(|_| {}));
    }
}
