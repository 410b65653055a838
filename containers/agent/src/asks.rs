//! Calls of tools that wait for an answer of init's. A call without an answer is not made.

use std::{
    collections::{BTreeMap, VecDeque},
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
/// The longest wait for somebody's approval.
const MAX_APPROVAL_WAIT: Duration = Duration::from_secs(30 * 60);
/// A shim says itself that nobody has approved a call in time: this is for its way.
const APPROVAL_MARGIN: Duration = Duration::from_secs(5);
/// Calls that wait until there is room among those that wait for an answer. A CLI may want to read
/// some dozens of files at once.
const MAX_QUEUED: usize = 256;
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

/// What was heard about a call.
#[derive(Debug, PartialEq)]
pub(crate) enum Heard {
    Answer(Question, Answer),
    /// It waits for somebody's approval. Heard once.
    ApprovalRequired {
        call_id: String,
        name: String,
        reason: String,
        wait: Duration,
    },
}

/// A call that waits for an answer.
#[derive(Debug)]
struct Waiting {
    question: Question,
    until: Instant,
    /// `until` becomes no later than this.
    at_most_until: Instant,
    needs_approval: bool,
}

/// The calls that wait, and where their answers come from.
#[derive(Debug)]
pub(crate) struct Asks {
    /// `None` if init is gone.
    socket: Option<File>,
    input: BytesMut,
    last: u64,
    waiting: BTreeMap<u64, Waiting>,
    /// Those for which there is no room yet.
    queued: VecDeque<Question>,
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
            queued: VecDeque::new(),
            refused: Vec::new(),
        })
    }

    pub(crate) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.socket.as_ref().map(AsFd::as_fd)
    }

    /// Passes on a call, whose answer comes later.
    pub(crate) fn ask(&mut self, question: Question, now: Instant) {
        if self.queued.len() >= MAX_QUEUED {
            let most = MAX_CALLS + MAX_QUEUED;
            let answer = Answer::no(format!("{most} calls wait for a decision already"));
            return self.refused.push((question, answer));
        }
        self.queued.push_back(question);
        self.pass_on(now);
    }

    /// Passes on those that have waited for room.
    fn pass_on(&mut self, now: Instant) {
        while self.waiting.len() < MAX_CALLS
            && let Some(question) = self.queued.pop_front()
        {
            if let Err(answer) = self.send_call(&question) {
                self.refused.push((question, answer));
                continue;
            }
            let waiting = Waiting {
                question,
                until: now + ANSWER_TIMEOUT,
                at_most_until: now + MAX_APPROVAL_WAIT,
                needs_approval: false,
            };
            self.waiting.insert(self.last, waiting);
        }
    }

    fn send_call(&mut self, question: &Question) -> Result<(), Answer> {
        let arguments = question.arguments.to_string();
        if arguments.len() > MAX_ARGUMENTS || question.name.len() > MAX_TOOL_NAME {
            let bytes = arguments.len();
            return Err(Answer::no(format!(
                "the call has {bytes} bytes; at most {MAX_ARGUMENTS} can be decided about"
            )));
        }
        self.send(&ToolCall {
            number: self.last + 1,
            name: question.name.clone(),
            arguments: arguments.into(),
            ..ToolCall::default()
        })?;
        self.last += 1;
        Ok(())
    }

    fn send(&mut self, call: &ToolCall) -> Result<(), Answer> {
        let mut frame = BytesMut::new();
        frame::encode(call, &mut frame).map_err(|error| Answer::no(error.to_string()))?;
        let gone = || Answer::no("nobody can decide about the call");
        let socket = self.socket.as_mut().ok_or_else(gone)?;
        write_all(socket, &frame).map_err(|_| gone())
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

    /// The next that was heard about a call.
    pub(crate) fn heard(&mut self, now: Instant) -> Option<Heard> {
        if let Some((question, answer)) = self.refused.pop() {
            return Some(Heard::Answer(question, answer));
        }
        while let Ok(Some(answer)) = frame::decode::<ToolAnswer>(&mut self.input) {
            if let Some(heard) = self.read(answer, now) {
                return Some(heard);
            }
        }
        let is_over = |waiting: &Waiting| waiting.until <= now || self.socket.is_none();
        let mut waiting = self.waiting.iter();
        let (&number, late) = waiting.find(|(_, waiting)| is_over(waiting))?;
        let reason = match late.needs_approval {
            true => "nobody has approved the call in time".to_owned(),
            false => {
                let seconds = ANSWER_TIMEOUT.as_secs();
                format!("nobody has decided about the call within {seconds} s")
            }
        };
        let question = self.withdraw(number)?;
        self.pass_on(now);
        Some(Heard::Answer(question, Answer::no(reason)))
    }

    fn read(&mut self, answer: ToolAnswer, now: Instant) -> Option<Heard> {
        let ToolAnswer {
            number,
            allowed,
            reason,
            wait_seconds,
            ..
        } = answer;
        if wait_seconds == 0 {
            let Waiting { question, .. } = self.waiting.remove(&number)?;
            self.pass_on(now);
            return Some(Heard::Answer(question, Answer { allowed, reason }));
        }
        let waiting = self.waiting.get_mut(&number)?;
        if waiting.question.has_begun() {
            // Nobody can approve what may have happened.
            let question = self.withdraw(number)?;
            self.pass_on(now);
            let reason = format!("it needs an approval, and has begun: {reason}");
            return Some(Heard::Answer(question, Answer::no(reason)));
        }
        let wait = Duration::from_secs(wait_seconds.into());
        let until = (now + wait + APPROVAL_MARGIN).min(waiting.at_most_until);
        waiting.until = waiting.until.max(until);
        let is_told = std::mem::replace(&mut waiting.needs_approval, true);
        (!is_told).then(|| Heard::ApprovalRequired {
            call_id: waiting.question.call_id.clone(),
            name: waiting.question.name.clone(),
            reason,
            wait: waiting.until.duration_since(now),
        })
    }

    /// Whoever would answer this call need not.
    fn withdraw(&mut self, number: u64) -> Option<Question> {
        let Waiting { question, .. } = self.waiting.remove(&number)?;
        // If nobody hears it, nobody answers either.
        let _gone = self.send(&ToolCall {
            number,
            withdrawn: true,
            ..ToolCall::default()
        });
        Some(question)
    }

    /// Whether a call waits that has begun.
    pub(crate) fn holds(&self) -> bool {
        let waiting = self.waiting.values().map(|waiting| &waiting.question);
        let mut all = waiting.chain(&self.queued);
        all.any(Question::has_begun)
    }

    /// When the first call has waited for too long.
    pub(crate) fn until(&self) -> Option<Instant> {
        self.waiting.values().map(|waiting| waiting.until).min()
    }

    /// A call that has not begun and still waits. It waits no longer.
    pub(crate) fn take(&mut self) -> Option<Question> {
        let is_next = |question: &Question| !question.has_begun();
        if let Some(at) = self.queued.iter().position(is_next) {
            return self.queued.remove(at);
        }
        let mut waiting = self.waiting.iter();
        let (&number, _) = waiting.find(|(_, waiting)| is_next(&waiting.question))?;
        self.withdraw(number)
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

    fn send(init: &mut UnixStream, answer: &ToolAnswer) {
        let mut frame = BytesMut::new();
        frame::encode(answer, &mut frame).unwrap();
        init.write_all(&frame).unwrap();
    }

    fn answer(init: &mut UnixStream, number: u64, allowed: bool) {
        let answer = ToolAnswer {
            number,
            allowed,
            reason: "because".into(),
            ..ToolAnswer::default()
        };
        send(init, &answer);
    }

    /// What was answered, and to which call.
    #[track_caller]
    fn answered(asks: &mut Asks, now: Instant) -> (Value, Answer) {
        match asks.heard(now) {
            Some(Heard::Answer(question, answer)) => (question.id, answer),
            other => panic!("no answer: {other:?}"),
        }
    }

    fn calls(init: &mut UnixStream) -> Vec<ToolCall> {
        init.set_nonblocking(true).unwrap();
        let mut bytes = [0; 1 << 20];
        let count = init.read(&mut bytes).unwrap_or(0);
        let mut input = BytesMut::from(&bytes[..count]);
        std::iter::from_fn(|| frame::decode(&mut input).unwrap()).collect()
    }

    #[test]
    fn each_call_has_the_answer_that_was_given_to_it_in_whatever_order() {
        let (mut asks, mut init) = asks();
        let now = Instant::now();
        asks.ask(question(7, "a"), now);
        asks.ask(question(8, "b"), now);
        assert_eq!(asks.heard(now), None);
        answer(&mut init, 2, false);
        answer(&mut init, 2, true);
        answer(&mut init, 1, true);
        asks.receive();
        let (second, refused) = answered(&mut asks, now);
        assert_eq!((second, refused.allowed), (8.into(), false));
        let (first, allowed) = answered(&mut asks, now);
        assert_eq!((first, allowed.allowed), (7.into(), true));
        assert_eq!(asks.heard(now), None);
    }

    #[test]
    fn a_call_that_nobody_can_answer_is_refused_and_withdrawn() {
        let (mut asks, mut init) = asks();
        let now = Instant::now();
        asks.ask(question(1, "a"), now);
        let until = asks.until().unwrap();
        assert_eq!(asks.heard(until - Duration::from_millis(1)), None);
        let (_, late) = answered(&mut asks, until);
        assert!(!late.allowed && late.reason.contains("within 30 s"));
        let told = calls(&mut init);
        let told = told.iter().map(|call| (call.number, call.withdrawn));
        assert_eq!(told.collect::<Vec<_>>(), [(1, false), (1, true)]);
        asks.ask(question(2, &"x".repeat(MAX_ARGUMENTS)), now);
        let (_, long) = answered(&mut asks, now);
        assert!(!long.allowed && long.reason.contains("bytes"));
        asks.ask(question(3, "a"), now);
        drop(init);
        asks.receive();
        assert!(!answered(&mut asks, now).1.allowed);
        asks.ask(question(4, "a"), now);
        assert!(!answered(&mut asks, now).1.allowed);
        assert_eq!(asks.heard(now), None);
    }

    #[test]
    fn calls_beyond_those_that_may_wait_are_passed_on_one_by_one() {
        let (mut asks, mut init) = asks();
        let now = Instant::now();
        let all = MAX_CALLS + MAX_QUEUED;
        for id in 1..=all as u64 {
            asks.ask(question(id, "a"), now);
        }
        assert_eq!(calls(&mut init).len(), MAX_CALLS);
        asks.ask(question(999, "a"), now);
        let (id, refused) = answered(&mut asks, now);
        assert_eq!(id, 999);
        assert!(refused.reason.contains("272 calls wait"), "{refused:?}");
        for (number, place) in (1..).zip(1..=all) {
            answer(&mut init, number, true);
            asks.receive();
            assert_eq!(answered(&mut asks, now).0, number);
            let is_next = place + MAX_CALLS <= all;
            let passed_on = calls(&mut init).len();
            assert_eq!(passed_on, usize::from(is_next), "{number}");
        }
        assert_eq!(asks.until(), None);
    }

    #[test]
    fn a_call_waits_as_long_as_somebody_may_approve_it() {
        let (mut asks, mut init) = asks();
        let now = Instant::now();
        let waits = |number, wait_seconds| ToolAnswer {
            number,
            wait_seconds,
            reason: "ask somebody".into(),
            ..ToolAnswer::default()
        };
        asks.ask(question(1, "a"), now);
        send(&mut init, &waits(1, 300));
        asks.receive();
        let required = asks.heard(now).unwrap();
        assert!(
            matches!(&required, Heard::ApprovalRequired { reason, wait, .. }
                if reason == "ask somebody" && wait.as_secs() == 305),
            "{required:?}"
        );
        // Another shim says it too. However often they say it, the wait has an end.
        send(&mut init, &waits(1, 7200));
        asks.receive();
        assert_eq!(asks.heard(now), None);
        assert_eq!(asks.until(), Some(now + MAX_APPROVAL_WAIT));
        answer(&mut init, 1, true);
        asks.receive();
        assert!(answered(&mut asks, now).1.allowed);
        asks.ask(question(2, "a"), now);
        send(&mut init, &waits(2, 1));
        asks.receive();
        asks.heard(now).unwrap();
        let until = asks.until().unwrap();
        let (_, late) = answered(&mut asks, until);
        assert!(late.reason.contains("approved"), "{late:?}");
    }

    #[test]
    fn a_call_that_has_begun_waits_for_no_approval() {
        let (mut asks, mut init) = asks();
        let now = Instant::now();
        let begun = Question {
            id: Value::Null,
            ..question(1, "a")
        };
        asks.ask(begun, now);
        let waits = ToolAnswer {
            number: 1,
            wait_seconds: 300,
            ..ToolAnswer::default()
        };
        send(&mut init, &waits);
        asks.receive();
        assert!(answered(&mut asks, now).1.reason.contains("has begun"));
        assert!(!asks.holds());
        assert!(calls(&mut init).last().unwrap().withdrawn);
    }

    #[test]
    fn a_turn_that_ends_takes_its_calls_with_it() {
        let (mut asks, mut init) = asks();
        let now = Instant::now();
        for id in 1..=MAX_CALLS as u64 + 1 {
            asks.ask(question(id, "a"), now);
        }
        let taken = std::iter::from_fn(|| asks.take()).count();
        assert_eq!(taken, MAX_CALLS + 1);
        let withdrawn = calls(&mut init);
        let withdrawn = withdrawn.iter().filter(|call| call.withdrawn).count();
        assert_eq!(withdrawn, MAX_CALLS);
        assert_eq!(asks.heard(now), None);
    }
}
