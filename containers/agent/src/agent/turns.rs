//! The prompts of a run, one turn after the other.

use std::io::{self, Write};

use polydev_proto::init::Prompt;

use super::{Agent, Heeds, START_TIMEOUT, Stop, complain, starts_again};
use crate::{
    cli::{Event, Out},
    conversation::{self, Conversation, Next},
    told::Told,
};

/// The exit status of a turn that its caller has ended, as by SIGINT.
const CANCELLED: u8 = 130;
/// The exit status of what is no prompt.
const NO_PROMPT: u8 = 2;

impl Agent {
    /// Answers the prompt, and in a conversation those that follow. Returns the exit status of the
    /// last turn.
    pub(super) fn answer_all(&mut self, prompt: Prompt) -> Result<u8, Stop> {
        let text = match prompt.stdin_bytes {
            0 => prompt.text.clone(),
            length => self.rest_of_input(length)?,
        };
        if starts_again(&prompt) {
            self.ask(|cli, out| cli.begin(false, out))?;
            self.until(&Event::Ready, START_TIMEOUT)?;
        }
        if !prompt.conversation {
            return self.answer(&text, &prompt.model);
        }
        self.conversation = Some(Conversation::new(self.provider));
        let (mut code, mut first_model) = match text.is_empty() {
            true => (0, prompt.model),
            false => (self.answer(&text, &prompt.model)?, String::new()),
        };
        while let Some(next) = self.next_prompt()? {
            code = match next {
                Next::Prompt(conversation::Prompt { text, model }) => {
                    let first_model = std::mem::take(&mut first_model);
                    let model = Some(model).filter(|model| !model.is_empty());
                    self.answer(&text, &model.unwrap_or(first_model))?
                }
                Next::Cancelled => self.end_turn(CANCELLED, true)?,
                Next::Wrong(reason) => {
                    complain(&reason);
                    let told = [Told::Error(reason)].into();
                    self.put(Out {
                        told,
                        ..Out::default()
                    })?;
                    self.end_turn(NO_PROMPT, false)?
                }
            };
        }
        Ok(code)
    }

    /// Gives the prompt to the CLI and prints its answer. Returns the turn's exit status.
    fn answer(&mut self, text: &str, model: &str) -> Result<u8, Stop> {
        self.is_asked = true;
        self.ask(|cli, out| cli.prompt(text, model, out))?;
        loop {
            match self.next_event(None)? {
                Event::Print(text) => self.print(&text)?,
                Event::Done { text, error, code } => {
                    self.print(&text)?;
                    io::stderr().write_all(error.as_bytes())?;
                    return self.end_turn(code, false);
                }
                Event::Cancelled => return self.end_turn(CANCELLED, true),
                Event::Failed(reason) => return Err(Stop::Failed(reason)),
                Event::Ready | Event::Checked | Event::Asks(_) | Event::Calls(_) => {}
            }
        }
    }

    fn print(&mut self, text: &str) -> io::Result<()> {
        let mut stdout = io::stdout().lock();
        stdout.write_all(text.as_bytes())?;
        self.printed += text.len() as u64;
        stdout.flush()
    }

    fn end_turn(&mut self, exit_code: u8, cancelled: bool) -> Result<u8, Stop> {
        self.is_asked = false;
        self.refuse_calls("the turn is over")?;
        let ended = Told::TurnEnded {
            exit_code,
            cancelled,
            stdout_bytes: self.printed,
        };
        let told = [ended].into();
        self.put(Out {
            told,
            ..Out::default()
        })?;
        Ok(exit_code)
    }

    /// The next prompt of a conversation; `None` after the last.
    fn next_prompt(&mut self) -> Result<Option<Next>, Stop> {
        loop {
            self.listen()?;
            let Some(conversation) = &mut self.conversation else {
                return Ok(None);
            };
            if let Some(next) = conversation.next() {
                return Ok(Some(next));
            }
            if !conversation.is_open() {
                return Ok(None);
            }
            if let Some(end) = self.process.ended() {
                return Err(Stop::Ended(end));
            }
            self.wait(Heeds::Init, None)?;
            // What it does between two turns.
            while let Some(line) = self.next_line()? {
                let mut out = Out::default();
                let event = self.cli.on_line(&line, &mut out);
                self.put(out)?;
                if let Some(Event::Failed(reason)) = self.take_call(event)? {
                    return Err(Stop::Failed(reason));
                }
            }
            self.answer_calls()?;
        }
    }

    /// Hears what the caller of a conversation has said.
    pub(super) fn listen(&mut self) -> Result<(), Stop> {
        let Some(conversation) = &mut self.conversation else {
            return Ok(());
        };
        let (said, is_open) = self.control.take();
        conversation.push(&said);
        if !is_open {
            conversation.end();
        }
        match conversation.read() && self.is_asked {
            true => {
                self.refuse_calls("the turn was cancelled")?;
                self.ask(|cli, out| cli.cancel(out))
            }
            false => Ok(()),
        }
    }

    /// Whom a CLI at work is heard with.
    pub(super) fn heeds(&self) -> Heeds {
        let hears = |conversation: &Conversation| conversation.is_open() && conversation.has_room();
        match self.conversation.as_ref().is_some_and(hears) {
            true => Heeds::Init,
            false => Heeds::Cli,
        }
    }

    /// The text of a prompt that comes as the run's stdin.
    fn rest_of_input(&mut self, length: u64) -> Result<String, Stop> {
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let text = loop {
            match self.control.text(length)? {
                Some(text) => break text,
                None => self.wait(Heeds::Init, None)?,
            }
        };
        let text = String::from_utf8(text.into());
        text.map_err(|_| Stop::Failed("the prompt is not UTF-8".into()))
    }
}
