//! Calls of tools that wait for an answer of init's. A call without an answer is not made.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, ErrorKind, Read, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::{Duration, Instant},
};

use bytes::BytesMut;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use polydev_proto::{
    agent::{MAX_ARGUMENTS, MAX_CALLS, MAX_TOOL_NAME},
    frame,
    init::{ToolAnswer, ToolCall},
};
use serde_json::Value;

/// A shim decides within milliseconds. It may be starting, or on its way back to the node.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes in one read.
const MAX_CHUNK: usize = 4096;

/// A call that the CLI wants to make.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Question {
    /// What the CLI recognizes the answer by. Null for a call that it does not ask about.
    pub(crate) id: Value,
    /// The call's id in what the run's caller hears.
    pub(crate) call_id: String,
    /// The CLI's name of the tool.
    pub(crate) name: String,
    pub(crate) arguments: Value,
    pub(crate) asked_at: Instant,
}

impl Question {
    /// The CLI makes the call, and waits for nothing.
    pub(crate) fn has_begun(&self) -> bool {
        self.id.is_null()
    }
}

/// Whether it may.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) allowed: bool,
    /// Why not, for the model and for people.
    pub(crate) reason: String,
}

impl Answer {
    pub(crate) fn no(reason: impl Into<String>) -> Self {
        Self {
            allowed: false,
            reason: reason.into(),
        }
    }
}

/// The calls that wait, and where their answers come from.
#[derive(Debug)]
pub(crate) struct Asks {
    /// `None` if init is gone.
    socket: Option<File>,
    input: BytesMut,
    last: u64,
    waiting: BTreeMap<u64, (Question, Instant)>,
    /// Those that need nobody's answer.
    refused: Vec<(Question, Answer)>,
}

impl Asks {
    /// # Errors
    /// The kernel's error.
    pub(crate) fn of(socket: OwnedFd) -> io::Result<Self> {
        fcntl(&socket, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        Ok(Self {
            socket: Some(socket.into()),
            input: BytesMut::new(),
            last: 0,
            waiting: BTreeMap::new(),
            refused: Vec::new(),
        })
    }

    pub(crate) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.socket.as_ref().map(AsFd::as_fd)
    }

    /// Passes on a call, whose answer comes later.
    pub(crate) fn ask(&mut self, question: Question, now: Instant) {
        if let Err(answer) = self.pass_on(&question) {
            return self.refused.push((question, answer));
        }
        self.waiting
            .insert(self.last, (question, now + ANSWER_TIMEOUT));
    }

    fn pass_on(&mut self, question: &Question) -> Result<(), Answer> {
        let arguments = question.arguments.to_string();
        if arguments.len() > MAX_ARGUMENTS || question.name.len() > MAX_TOOL_NAME {
            let bytes = arguments.len();
            return Err(Answer::no(format!(
                "the call has {bytes} bytes; at most {MAX_ARGUMENTS} can be decided about"
            )));
        }
        if self.waiting.len() >= MAX_CALLS {
            let reason = format!("{MAX_CALLS} calls wait for a decision already");
            return Err(Answer::no(reason));
        }
        let mut frame = BytesMut::new();
        let call = ToolCall {
            number: self.last + 1,
            name: question.name.clone(),
            arguments: arguments.into(),
            entered: Vec::new(),
            reaches: false,
        };
        frame::encode(&call, &mut frame).map_err(|error| Answer::no(error.to_string()))?;
        let gone = || Answer::no("nobody can decide about the call");
        let socket = self.socket.as_mut().ok_or_else(gone)?;
        write_all(socket, &frame).map_err(|_| gone())?;
        self.last += 1;
        Ok(())
    }

    /// Reads what is there; call it when there is something to read.
    pub(crate) fn receive(&mut self) {
        let mut chunk = [0; MAX_CHUNK];
        let Some(socket) = &mut self.socket else {
            return;
        };
        match socket.read(&mut chunk) {
            Ok(count) if count > 0 => self.input.extend_from_slice(&chunk[..count]),
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            _ => self.socket = None,
        }
    }

    /// The next call with its answer.
    pub(crate) fn answered(&mut self, now: Instant) -> Option<(Question, Answer)> {
        if let Some(refused) = self.refused.pop() {
            return Some(refused);
        }
        while let Ok(Some(answer)) = frame::decode::<ToolAnswer>(&mut self.input) {
            if let Some((question, _)) = self.waiting.remove(&answer.number) {
                let ToolAnswer {
                    allowed, reason, ..
                } = answer;
                return Some((question, Answer { allowed, reason }));
            }
        }
        let is_over = |until: Instant| until <= now || self.socket.is_none();
        let late = self.waiting.iter().find(|(_, (_, until))| is_over(*until));
        let number = *late?.0;
        let (question, _) = self.waiting.remove(&number)?;
        let seconds = ANSWER_TIMEOUT.as_secs();
        let reason = format!("nobody has decided about the call within {seconds} s");
        Some((question, Answer::no(reason)))
    }

    /// Whether a call waits that has begun.
    pub(crate) fn holds(&self) -> bool {
        let mut waiting = self.waiting.values();
        waiting.any(|(question, _)| question.has_begun())
    }

    /// When the first call has waited for too long.
    pub(crate) fn until(&self) -> Option<Instant> {
        self.waiting.values().map(|(_, until)| *until).min()
    }

    /// A call that has not begun and still waits. It waits no longer.
    pub(crate) fn take(&mut self) -> Option<Question> {
        let mut waiting = self.waiting.iter();
        let (&number, _) = waiting.find(|(_, (question, _))| !question.has_begun())?;
        let (question, _) = self.waiting.remove(&number)?;
        Some(question)
    }
}

/// Init reads at all times, and the calls that wait are more than its socket holds.
fn write_all(socket: &mut File, mut bytes: &[u8]) -> io::Result<()> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    while !bytes.is_empty() {
        match socket.write(bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                let mut polled = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
                poll(&mut polled, PollTimeout::NONE)?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    fn asks() -> (Asks, UnixStream) {
        let (ours, inits) = UnixStream::pair().unwrap();
        (Asks::of(ours.into()).unwrap(), inits)
    }

    static NOW: std::sync::LazyLock<Instant> = std::sync::LazyLock::new(Instant::now);

    fn question(id: u64, text: &str) -> Question {
        Question {
            id: id.into(),
            call_id: String::new(),
            name: "Bash".into(),
            arguments: serde_json::json!({ "command": text }),
            asked_at: *NOW,
        }
    }

    fn answer(init: &mut UnixStream, number: u64, allowed: bool) {
        let mut frame = BytesMut::new();
        let answer = ToolAnswer {
            number,
            allowed,
            reason: "because".into(),
            enters: String::new(),
        };
        frame::encode(&answer, &mut frame).unwrap();
        init.write_all(&frame).unwrap();
    }

    #[test]
    fn each_call_has_the_answer_that_was_given_to_it_in_whatever_order() {
        let (mut asks, mut init) = asks();
        let now = Instant::now();
        asks.ask(question(7, "a"), now);
        asks.ask(question(8, "b"), now);
        assert_eq!(asks.answered(now), None);
        answer(&mut init, 2, false);
        answer(&mut init, 2, true);
        answer(&mut init, 1, true);
        asks.receive();
        let (second, refused) = asks.answered(now).unwrap();
        assert_eq!((second, refused.allowed), (question(8, "b"), false));
        let (first, allowed) = asks.answered(now).unwrap();
        assert_eq!((first, allowed.allowed), (question(7, "a"), true));
        assert_eq!(asks.answered(now), None);
    }

    #[test]
    fn a_call_that_nobody_can_answer_is_refused() {
        let (mut asks, init) = asks();
        let now = Instant::now();
        asks.ask(question(1, "a"), now);
        let until = asks.until().unwrap();
        assert_eq!(asks.answered(until - Duration::from_millis(1)), None);
        let (_, late) = asks.answered(until).unwrap();
        assert!(!late.allowed && late.reason.contains("within 30 s"));
        asks.ask(question(2, &"x".repeat(MAX_ARGUMENTS)), now);
        let (_, long) = asks.answered(now).unwrap();
        assert!(!long.allowed && long.reason.contains("bytes"));
        for id in 0..=MAX_CALLS as u64 {
            asks.ask(question(id, "a"), now);
        }
        let (_, many) = asks.answered(now).unwrap();
        assert!(!many.allowed && many.reason.contains("already"));
        drop(init);
        asks.receive();
        for _ in 0..MAX_CALLS {
            assert!(!asks.answered(now).unwrap().1.allowed);
        }
        asks.ask(question(3, "a"), now);
        assert!(!asks.answered(now).unwrap().1.allowed);
        assert_eq!(asks.answered(now), None);
    }
}
