//! Messages from the driver: the command's start, its files and stdin, signals.

use std::{fs::File, path::Path, time::Instant};

use nix::sys::signal::Signal;
use polydev_proto::{
    init::{
        Form, NotStarted, Script, Start, Started, Stdin, StdinAck, from_init, not_started::Reason,
        to_init,
    },
    stream::{PerStream, Stream},
};

use super::{ENDING, MAX_OUTPUT_BUFFER, Receiving, State, Supervisor};
use crate::{
    agent::Agent,
    command::Command,
    home, interpreter,
    output::Output,
    workspace::{self, Incoming},
};

impl Supervisor {
    pub(super) fn on_message(&mut self, message: to_init::Message, now: Instant) {
        match (message, &mut self.state) {
            (to_init::Message::Start(start), State::Waiting) => {
                let capacity = MAX_OUTPUT_BUFFER.min(start.output_buffer_bytes as usize);
                self.outputs = PerStream::from_fn(|_| Output::new(capacity));
                self.is_plain = start.task.is_some();
                match Incoming::new(workspace::path(), &start.files) {
                    Ok(files) if files.is_complete() => self.start(*start, now),
                    Ok(files) => {
                        self.state = State::Receiving(Box::new(Receiving {
                            start: *start,
                            files,
                            taken: 0,
                        }));
                    }
                    Err(message) => self.refuse(start.run_id, message),
                }
            }
            (to_init::Message::Park(park), State::Waiting) if self.agent.is_none() => {
                self.asks = park.asks;
                let started = Agent::start(&park, self.oom_score.as_mut());
                let agent = match started {
                    Ok(agent) => self.agent.insert(agent).told(),
                    Err(reason) => Agent::none(reason),
                };
                self.link.send(from_init::Message::Agent(agent));
                self.reap();
            }
            // Only one Start is accepted; a second one is a driver's mistake, and is not run.
            (to_init::Message::Start(_), _) => self.link.disconnect(now),
            (to_init::Message::DataAck(ack), _) => {
                if let Some(stream) = Stream::of_number(ack.stream) {
                    self.outputs[stream].acknowledge(ack.offset);
                }
            }
            (to_init::Message::Stdin(frame), State::Receiving(_)) => self.receive(&frame, now),
            (to_init::Message::Signal(signal), State::Receiving(receiving)) => {
                let signal = Signal::try_from(signal.number);
                if !signal.is_ok_and(|signal| ENDING.contains(&signal)) {
                    return;
                }
                let run_id = receiving.start.run_id.clone();
                self.refuse(run_id, "it was ended before its files had arrived".into());
            }
            (to_init::Message::Resize(size), State::Running(command)) => command.resize(size),
            (to_init::Message::Resize(size), State::Receiving(receiving)) => {
                if let Some(terminal) = &mut receiving.start.terminal {
                    *terminal = size;
                }
            }
            (to_init::Message::Stdin(frame), State::Running(command)) => {
                if command.input.accept(&frame).is_err() {
                    return self.link.disconnect(now);
                }
                let ack = command.input.flush();
                self.link.send(from_init::Message::StdinAck(ack));
            }
            (to_init::Message::Signal(signal), State::Running(command)) => {
                command.signal_number(signal.number);
            }
            (to_init::Message::ToolAnswer(answer), State::Running(command)) => {
                if let Some(asking) = &mut command.asking {
                    asking.answer(answer);
                }
            }
            // Too late for a command that has ended, or too early for Release.
            (
                to_init::Message::ToolAnswer(_)
                | to_init::Message::Stdin(_)
                | to_init::Message::Signal(_)
                | to_init::Message::Resize(_)
                | to_init::Message::Park(_)
                | to_init::Message::Release(_),
                _,
            ) => {}
        }
    }

    /// Receives bytes of the files, and possibly the first bytes of stdin.
    fn receive(&mut self, frame: &Stdin, now: Instant) {
        let State::Receiving(receiving) = &mut self.state else {
            return;
        };
        let known = receiving.taken.checked_sub(frame.offset);
        let Some(known) = known.and_then(|known| usize::try_from(known).ok()) else {
            return self.link.disconnect(now); // A gap is a driver's mistake.
        };
        let new = frame.data.get(known..).unwrap_or_default();
        let (taken, problem) = match receiving.files.write(new) {
            Ok(taken) => (taken as u64, None),
            Err(message) => (0, Some(message)),
        };
        receiving.taken += taken;
        let (taken, total) = (receiving.taken, receiving.files.total());
        let is_complete = receiving.files.is_complete();
        let ended = (frame.close && !is_complete)
            .then(|| format!("its files ended after {taken} of {total} bytes"));
        if let Some(message) = problem.or(ended) {
            let run_id = receiving.start.run_id.clone();
            return self.refuse(run_id, message);
        }
        if is_complete {
            let start = std::mem::take(&mut receiving.start);
            self.start(start, now);
        }
        match &mut self.state {
            // The rest belongs to the command.
            State::Running(_) => self.on_message(to_init::Message::Stdin(frame.clone()), now),
            _ => self.link.send(from_init::Message::StdinAck(StdinAck {
                offset: taken,
                closed: false,
            })),
        }
    }

    fn start(&mut self, start: Start, now: Instant) {
        match self.start_in_some_form(start, now) {
            Ok(mut command) => {
                self.account = command.account.take();
                self.link.send(from_init::Message::Started(Started {
                    pid: command.pid.as_raw().cast_unsigned(),
                    form: command.form.clone(),
                }));
                self.state = State::Running(Box::new(command));
                self.reap();
            }
            Err(refused) => self.state = State::NotStarted(refused),
        }
    }

    /// Gives a prompt to the agent. If that is not possible, or the run is no prompt, ends the
    /// agent and starts the argv.
    fn start_in_some_form(&mut self, start: Start, now: Instant) -> Result<Command, NotStarted> {
        let key = self.key.take().expect("only one Start is accepted");
        let mut form = None;
        let mut agent = self.agent.take();
        let asks = self.asks;
        if let Some(prompt) = &start.prompt {
            let starts_again = prompt.conversation || asks && prompt.starts_again;
            let given = match (prompt.cold_reason.as_str(), &mut agent) {
                (reason, _) if !reason.is_empty() && !starts_again => Err(reason.to_owned()),
                (_, Some(agent)) => agent.give(prompt, !start.files.is_empty(), start.reaches),
                (_, None) => Err(String::new()),
            };
            match given {
                Err(reason) if prompt.conversation || asks => {
                    let reason = match reason.is_empty() {
                        true => "the slot has none",
                        false => &reason,
                    };
                    let what = match prompt.conversation {
                        true => "a conversation needs an agent",
                        false => "a pool with `slot.tool_policy` needs an agent",
                    };
                    return Err(not_for_agent(
                        agent,
                        start.run_id,
                        &format!("{what}: {reason}"),
                    ));
                }
                Err(reason) => {
                    let parked = false;
                    form = Some(Form { parked, reason });
                }
                Ok(form) => {
                    let agent = agent.expect("it has taken the prompt");
                    return Ok(Command::parked(agent, form, start, now));
                }
            }
        } else if asks {
            let why = "a pool with `slot.tool_policy` runs prompts alone";
            return Err(not_for_agent(agent, start.run_id, why));
        }
        if let Some(interpreter) = agent.as_mut().filter(|agent| agent.is_interpreter)
            && let Some(script) = interpreter::script_of(&start)
        {
            match give_script(interpreter, script, &start) {
                Ok((form, stdin)) => {
                    let agent = agent.expect("it has taken the script");
                    return Ok(Command::script(agent, stdin, form, start, now));
                }
                Err(reason) => {
                    let parked = false;
                    form = Some(Form { parked, reason });
                }
            }
        }
        if let Some(agent) = agent {
            agent.end();
            // The CLI has left its settings, with the broker's address, and its sessions.
            home::reset(Path::new(home::SEED), home::path().as_deref()).map_err(|error| {
                NotStarted {
                    run_id: start.run_id.clone(),
                    reason: Reason::Invalid.into(),
                    message: format!("cannot clear the home of what an agent left: {error}"),
                }
            })?;
        }
        let descriptors = self.link.take_descriptors();
        let (oom_score, drains) = (self.oom_score.as_mut(), &mut self.drains);
        let mut command = Command::start(start, &key, descriptors, drains, oom_score, now)?;
        command.form = form;
        Ok(command)
    }

    /// Records that the command does not run.
    fn refuse(&mut self, run_id: String, message: String) {
        self.state = State::NotStarted(NotStarted {
            run_id,
            reason: Reason::Invalid.into(),
            message,
        });
    }
}

/// Ends the agent of a run that nothing else may have.
fn not_for_agent(agent: Option<Agent>, run_id: String, why: &str) -> NotStarted {
    if let Some(agent) = agent {
        agent.end();
    }
    NotStarted {
        run_id,
        reason: Reason::Invalid.into(),
        message: why.into(),
    }
}

/// Gives an interpreter the script of a run. Returns where the script's input goes, too.
fn give_script(
    interpreter: &mut Agent,
    script: Script,
    start: &Start,
) -> Result<(Form, Option<File>), String> {
    if !start.sealed_secrets.is_empty() {
        return Err("the run has secrets".into());
    }
    let (stdin, input) = interpreter::stdin(start).map_err(|error| error.to_string())?;
    Ok((interpreter.give_script(script, stdin)?, input))
}
