//! Calls of tools that wait for an answer.

use std::time::Instant;

use nix::sys::signal::Signal;
use serde_json::Value;

use super::{Agent, Stop};
use crate::{
    asks::{Answer, Asks, Heard, Question},
    cli::{Event, Out},
    told::Told,
};

impl Agent {
    /// The next line of the CLI. What it has said after a call that has begun waits for the answer, too.
    pub(super) fn next_line(&mut self) -> Result<Option<Value>, Stop> {
        match self.waiting.as_ref().is_some_and(Asks::holds) {
            true => Ok(None),
            false => self.process.next_line().map_err(Stop::Failed),
        }
    }

    /// Passes on a call of the CLI. Returns any other event.
    pub(super) fn take_call(&mut self, event: Option<Event>) -> Result<Option<Event>, Stop> {
        match event {
            Some(Event::Asks(question)) => self.pass_on(question)?,
            Some(Event::Calls(question)) => {
                // It waits until it is answered, and its model does not hear of the call.
                self.process.signal(Signal::SIGSTOP);
                self.pass_on(question)?;
            }
            other => return Ok(other),
        }
        Ok(None)
    }

    fn pass_on(&mut self, question: Question) -> Result<(), Stop> {
        match &mut self.waiting {
            Some(waiting) => {
                waiting.ask(question, Instant::now());
                self.answer_calls()
            }
            // It has no prompt yet.
            None => self.answer_call(&question, &Answer::no("nobody has asked for it")),
        }
    }

    /// Tells the CLI what was answered.
    pub(super) fn answer_calls(&mut self) -> Result<(), Stop> {
        while let Some(waiting) = &mut self.waiting
            && let Some(heard) = waiting.heard(Instant::now())
        {
            match heard {
                Heard::Answer(question, answer) => self.answer_call(&question, &answer)?,
                Heard::ApprovalRequired {
                    call_id: id,
                    name,
                    reason,
                    wait,
                } => {
                    let mut out = Out::default();
                    out.tell(Told::ToolApprovalRequired {
                        id,
                        name,
                        reason,
                        wait,
                    });
                    self.put(out)?;
                }
            }
        }
        Ok(())
    }

    /// Answers all calls that wait and have not begun.
    pub(super) fn refuse_calls(&mut self, reason: &str) -> Result<(), Stop> {
        while let Some(question) = self.waiting.as_mut().and_then(|waiting| waiting.take()) {
            self.answer_call(&question, &Answer::no(reason))?;
        }
        Ok(())
    }

    fn answer_call(&mut self, question: &Question, answer: &Answer) -> Result<(), Stop> {
        let mut out = Out::default();
        out.tell(Told::ToolDecision {
            id: question.call_id.clone(),
            name: question.name.clone(),
            allowed: answer.allowed,
            reason: answer.reason.clone(),
            waited: question.asked_at.elapsed(),
        });
        if !question.has_begun() {
            self.cli.answer(question, answer, &mut out);
        }
        self.put(out)?;
        match question.has_begun() {
            true if answer.allowed => self.process.signal(Signal::SIGCONT),
            true => {
                let Question { name, .. } = question;
                let Answer { reason, .. } = answer;
                self.process.end();
                return Err(Stop::Failed(format!("the CLI has used `{name}`: {reason}")));
            }
            false => {}
        }
        Ok(())
    }
}
