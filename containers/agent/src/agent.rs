//! The life of an agent, in the order in which it happens.

mod calls;
mod turns;

use std::{
    io::{self, Write},
    os::fd::AsFd,
    time::{Duration, Instant, SystemTime},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::Signal,
        signalfd::{SfdFlags, SignalFd},
    },
};
use polydev_proto::{
    init::{
        Failed, Offer, Prompt, Ready, Taken, Tools, from_agent::Message,
        to_agent::Message as FromInit,
    },
    prompt::Options,
    provider::Vendor,
};

use crate::{
    End,
    anthropic::Claude,
    asks::Asks,
    cli::{Cli, Event, Out},
    control::Control,
    conversation::Conversation,
    google::Gemini,
    openai::Codex,
    process::{Process, awaited_signals},
    quiet::Quiet,
    told::Told,
};

/// From the start to the answer to the rehearsal. Gemini CLI 0.61 takes 3 s on half a core, and
/// 17 s on a tenth.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// For the answer of a CLI that was stopped. It takes a millisecond, or some more if its memory
/// has to be read again.
const CHECK_TIMEOUT: Duration = Duration::from_millis(750);
/// For another session of a CLI that was stopped.
const RENEW_TIMEOUT: Duration = Duration::from_secs(2);
/// For what a CLI has written before its end.
const LAST_WORDS_TIMEOUT: Duration = Duration::from_secs(1);
/// Bytes of the CLI's complaints that are kept until they are needed.
const MAX_COMPLAINTS: usize = 2000;

/// Why an agent cannot go on.
enum Stop {
    /// The CLI has ended.
    Ended(End),
    /// The CLI is of no use; the reason is for people.
    Failed(String),
    /// Init is gone, and the container with it.
    Alone,
}

impl From<io::Error> for Stop {
    fn from(_: io::Error) -> Self {
        Self::Alone
    }
}

pub(crate) fn run(provider: Vendor, asks: bool) -> End {
    let Ok(mut control) = Control::of_stdin() else {
        return End::Code(1);
    };
    let mut agent = match start(provider, asks) {
        Ok((cli, process, signals)) => Agent {
            asks,
            ..Agent::new(provider, control, cli, process, signals)
        },
        Err(error) => {
            let reason = format!("cannot start the CLI: {error}");
            let _alone = control.tell(Message::Failed(Failed { reason }));
            return End::Code(1);
        }
    };
    let prompt = match agent.wait_for_prompt() {
        Ok(prompt) => prompt,
        Err(stop) => {
            agent.process.signal(Signal::SIGKILL);
            let reason = agent.reason(&stop);
            let _alone = agent.control.tell(Message::Failed(Failed { reason }));
            return End::Code(1);
        }
    };
    match agent.answer_all(prompt) {
        Ok(code) => End::Code(code),
        // A signal that was passed on has ended it, though it may call that a success.
        Err(Stop::Ended(End::Code(0))) => match agent.passed_on {
            Some(signal) => End::Signal(signal),
            None => complain("the CLI has ended without an answer"),
        },
        Err(Stop::Ended(end)) => end,
        Err(Stop::Failed(reason)) => complain(&reason),
        Err(Stop::Alone) => End::Code(1),
    }
}

/// Ends a run that has no answer.
fn complain(reason: &str) -> End {
    let _nobody_reads = writeln!(io::stderr(), "polydev-agent: {reason}");
    End::Code(1)
}

/// Starts the CLI. It inherits a mask without signals.
fn start(provider: Vendor, asks: bool) -> io::Result<(Box<dyn Cli>, Process, SignalFd)> {
    let (cli, process) = start_cli(provider, asks, Options::default(), Tools::All)?;
    let awaited = awaited_signals();
    awaited.thread_block()?;
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    Ok((cli, process, SignalFd::with_flags(&awaited, flags)?))
}

/// Starts the CLI in this folder.
fn start_cli(
    provider: Vendor,
    asks: bool,
    options: Options,
    tools: Tools,
) -> io::Result<(Box<dyn Cli>, Process)> {
    let options = match asks {
        true => options.asking(provider, tools),
        false => options,
    };
    let work_dir = std::env::current_dir()?.to_string_lossy().into_owned();
    let cli = cli_of(provider, work_dir, asks);
    let process = Process::start(provider, &*cli, &options)?;
    Ok((cli, process))
}

/// The provider's CLI, which works in the folder `work_dir`, and asks before each call of a tool if it
/// is to.
pub(crate) fn cli_of(provider: Vendor, work_dir: String, asks: bool) -> Box<dyn Cli> {
    match provider {
        Vendor::Anthropic => Box::new(Claude::new(asks)),
        Vendor::OpenAi => Box::new(Codex::new(work_dir, asks)),
        Vendor::Google => Box::new(Gemini::new(work_dir, asks)),
    }
}

/// Whether the prompt needs a CLI that starts now. One that an argv may have instead does not come
/// here.
fn starts_again(prompt: &Prompt) -> bool {
    !prompt.cold_reason.is_empty()
}

/// The day of the container's clock, which is UTC.
fn day() -> u64 {
    let since = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    since.as_secs() / (24 * 3600)
}

/// Whether the agent reads what init sends.
#[derive(Clone, Copy, PartialEq)]
enum Heeds {
    Cli,
    Init,
}

/// Who may have something for the agent.
enum Source {
    Signals,
    Stdout,
    Stderr,
    /// It takes more.
    Stdin,
    Init,
    /// Answers to calls of tools.
    Answers,
}

struct Agent {
    provider: Vendor,
    control: Control,
    cli: Box<dyn Cli>,
    process: Process,
    signals: SignalFd,
    /// Whether the CLI works for a run: what it says on stderr is the run's then.
    is_taken: bool,
    /// The end of what it has said before.
    complaints: Vec<u8>,
    /// The last signal that the CLI was sent on somebody's behalf.
    passed_on: Option<Signal>,
    /// When what the CLI has written is read; set once it has ended.
    silent_at: Option<Instant>,
    /// Where more prompts come from.
    conversation: Option<Conversation>,
    /// Whether the CLI has a prompt that it has not answered.
    is_asked: bool,
    /// Bytes of answers.
    printed: u64,
    /// Whether each call of a tool waits for an answer.
    asks: bool,
    /// The calls that wait, once there is a prompt.
    waiting: Option<Asks>,
}

impl Agent {
    fn new(
        provider: Vendor,
        control: Control,
        cli: Box<dyn Cli>,
        process: Process,
        signals: SignalFd,
    ) -> Self {
        Self {
            provider,
            control,
            cli,
            process,
            signals,
            is_taken: false,
            complaints: Vec::new(),
            passed_on: None,
            silent_at: None,
            conversation: None,
            is_asked: false,
            printed: 0,
            asks: false,
            waiting: None,
        }
    }

    /// Rehearses, stops the CLI once it is quiet, and returns when there is a prompt and the CLI
    /// has shown that it is alive.
    fn wait_for_prompt(&mut self) -> Result<Prompt, Stop> {
        self.ask(|cli, out| cli.begin(true, out))?;
        self.until(&Event::Ready, START_TIMEOUT)?;
        let ready_on = day();
        self.control.tell(Message::Ready(Ready {}))?;
        let mut quiet = Some(Quiet::new(&self.process));
        let Offer { prompt, has_files } = loop {
            let next_look = quiet.as_ref().map(|quiet| quiet.next_look);
            self.wait(Heeds::Init, next_look)?;
            if let Some(FromInit::Offer(offer)) = self.control.next_message()? {
                break offer;
            }
            let is_quiet = |quiet: &mut Quiet| quiet.is_reached(&self.process);
            if quiet.as_mut().is_some_and(is_quiet) {
                self.process.signal(Signal::SIGSTOP);
                quiet = None;
            }
        };
        let mut prompt = prompt.unwrap_or_default();
        if self.asks {
            let socket = self.control.descriptor().ok_or(Stop::Alone)?;
            self.waiting = Some(Asks::of(socket)?);
        }
        if !starts_again(&prompt) {
            match self.show_life(has_files || day() != ready_on) {
                // No argv can take its place.
                Err(stop @ (Stop::Failed(_) | Stop::Ended(_)))
                    if prompt.conversation || self.asks =>
                {
                    prompt.cold_reason = self.reason(&stop);
                }
                shown => shown?,
            }
        }
        if starts_again(&prompt) {
            self.start_again(&prompt).map_err(Stop::Failed)?;
        }
        let cold_reason = prompt.cold_reason.clone();
        self.control.tell(Message::Taken(Taken { cold_reason }))?;
        while !matches!(self.control.next_message()?, Some(FromInit::Go(_))) {
            self.wait(Heeds::Init, None)?;
        }
        self.is_taken = true;
        Ok(prompt)
    }

    /// Lets the CLI go on, and waits until it has answered.
    fn show_life(&mut self, renews: bool) -> Result<(), Stop> {
        self.process.signal(Signal::SIGCONT);
        match renews {
            false => {
                self.ask(|cli, out| cli.check(out))?;
                self.until(&Event::Checked, CHECK_TIMEOUT)
            }
            true => {
                self.ask(|cli, out| cli.renew(out))?;
                self.until(&Event::Checked, RENEW_TIMEOUT)
            }
        }
    }

    /// Puts another CLI in the place of the one that waits, for what it reads when it starts.
    fn start_again(&mut self, prompt: &Prompt) -> Result<(), String> {
        let options = Options::of(self.provider, &prompt.system, prompt.tools());
        let options = options.map_err(|error| error.to_string())?;
        self.process.end();
        (self.cli, self.process) = start_cli(self.provider, self.asks, options, prompt.tools())
            .map_err(|error| format!("cannot start the CLI again: {error}"))?;
        Ok(())
    }

    fn ask(&mut self, ask: impl FnOnce(&mut dyn Cli, &mut Out)) -> Result<(), Stop> {
        let mut out = Out::default();
        ask(&mut *self.cli, &mut out);
        self.put(out)
    }

    /// Sends to the CLI, and to the run's caller.
    fn put(&mut self, out: Out) -> Result<(), Stop> {
        self.process.send(&out.lines);
        // What it did before is nobody's.
        let told = out.told.iter().filter(|_| self.is_taken);
        for line in told.flat_map(Told::lines) {
            self.control.tell(Message::Event(line.into()))?;
        }
        Ok(())
    }

    /// Waits for this event; the CLI's answers to itself are passed over.
    fn until(&mut self, wanted: &Event, time: Duration) -> Result<(), Stop> {
        let end = Instant::now() + time;
        loop {
            match self.next_event(Some(end))? {
                event if event == *wanted => return Ok(()),
                Event::Failed(reason) => return Err(Stop::Failed(reason)),
                _ => {}
            }
        }
    }

    fn next_event(&mut self, end: Option<Instant>) -> Result<Event, Stop> {
        loop {
            if end.is_some_and(|end| Instant::now() >= end) {
                return Err(Stop::Failed("it does not answer".into()));
            }
            while let Some(line) = self.next_line()? {
                let mut out = Out::default();
                let event = self.cli.on_line(&line, &mut out);
                self.put(out)?;
                if let Some(event) = self.take_call(event)? {
                    return Ok(event);
                }
            }
            self.answer_calls()?;
            // It may have ended after its last words, which are read first. A process that it has
            // started may hold its stdout open.
            let has_said_all = self.process.stdout.is_none()
                || (self.silent_at).is_some_and(|silent_at| Instant::now() >= silent_at);
            if has_said_all && let Some(end) = self.process.ended() {
                return Err(Stop::Ended(end));
            }
            self.listen()?;
            self.wait(self.heeds(), end.or(self.silent_at))?;
        }
    }

    /// Waits until the CLI, a signal or init has something, and reads it; or until `end`.
    fn wait(&mut self, heeds: Heeds, end: Option<Instant>) -> Result<(), Stop> {
        let calls = self.waiting.as_ref().and_then(Asks::until);
        let end = end.into_iter().chain(calls).min();
        let timeout = match end.map(|end| end.saturating_duration_since(Instant::now())) {
            None => PollTimeout::NONE,
            // Rounded up, because waking early would only spin.
            Some(left) => {
                PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
            }
        };
        let awake = self.awake(heeds, timeout)?;
        for source in awake {
            match source {
                Source::Stdout => self.process.receive(),
                Source::Stderr => {
                    let said = self.process.complaint();
                    self.hear(&said)?;
                }
                Source::Stdin => self.process.flush(),
                Source::Init => self.control.receive()?,
                Source::Answers => {
                    if let Some(waiting) = &mut self.waiting {
                        waiting.receive();
                    }
                }
                Source::Signals => {}
            }
        }
        self.read_signals()
    }

    /// Who has something, when somebody has.
    fn awake(&self, heeds: Heeds, timeout: PollTimeout) -> io::Result<Vec<Source>> {
        let input = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let Process { stdout, stderr, .. } = &self.process;
        let polled = [
            (Source::Signals, Some(input(self.signals.as_fd()))),
            (
                Source::Stdout,
                stdout.as_ref().map(|pipe| input(pipe.as_fd())),
            ),
            (
                Source::Stderr,
                stderr.as_ref().map(|pipe| input(pipe.as_fd())),
            ),
            (
                Source::Stdin,
                (self.process.waiting()).map(|fd| PollFd::new(fd, PollFlags::POLLOUT)),
            ),
            (
                Source::Init,
                (heeds == Heeds::Init).then(|| input(self.control.fd())),
            ),
            (
                Source::Answers,
                self.waiting.as_ref().and_then(Asks::fd).map(input),
            ),
        ];
        let polled = polled
            .into_iter()
            .filter_map(|(source, fd)| Some((source, fd?)));
        let (sources, mut polled): (Vec<_>, Vec<_>) = polled.unzip();
        match poll(&mut polled, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let pairs = sources.into_iter().zip(polled);
        let awake = pairs.filter(|(_, fd)| fd.any().unwrap_or(true));
        Ok(awake.map(|(source, _)| source).collect())
    }

    fn read_signals(&mut self) -> Result<(), Stop> {
        while let Ok(Some(info)) = self.signals.read_signal() {
            let signal = i32::try_from(info.ssi_signo).ok();
            match signal.and_then(|number| Signal::try_from(number).ok()) {
                Some(Signal::SIGCHLD) | None => {}
                Some(signal) => {
                    self.passed_on = Some(signal);
                    self.process.signal(signal);
                }
            }
        }
        match self.process.ended() {
            Some(end) if !self.is_taken => Err(Stop::Ended(end)),
            Some(_) if self.silent_at.is_none() => {
                self.process.signal(Signal::SIGKILL);
                self.silent_at = Some(Instant::now() + LAST_WORDS_TIMEOUT);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn hear(&mut self, said: &[u8]) -> io::Result<()> {
        if self.is_taken {
            return io::stderr().write_all(said);
        }
        self.complaints.extend_from_slice(said);
        let surplus = self.complaints.len().saturating_sub(MAX_COMPLAINTS);
        self.complaints.drain(..surplus);
        Ok(())
    }

    /// Why it stopped before it had a prompt, with the last line that the CLI has said.
    fn reason(&self, stop: &Stop) -> String {
        let what = match stop {
            Stop::Ended(End::Code(code)) => format!("the CLI exited with status {code}"),
            Stop::Ended(End::Signal(signal)) => format!("the CLI was ended by {signal}"),
            Stop::Failed(reason) => format!("the CLI failed: {reason}"),
            Stop::Alone => "init is gone".into(),
        };
        let said = String::from_utf8_lossy(&self.complaints);
        match said.lines().map(str::trim).rfind(|line| !line.is_empty()) {
            Some(last) => format!("{what}; it said: {last}"),
            None => what,
        }
    }
}
