//! Messages to the driver: init's state, the command's output, and its end.

use polydev_proto::{
    frame::MAX_DATA,
    init::{Collected, Data, Hello, PROTOCOL_VERSION, Running, Waiting, from_init, hello},
    stream::Stream,
};

use super::{State, Supervisor};
use crate::{account::Account, agent::Agent};

impl Supervisor {
    /// Sends the first message of a connection, and the output that the driver may have
    /// missed.
    pub(super) fn greet(&mut self) {
        for (_, output) in self.outputs.iter_mut() {
            output.rewind();
        }
        let state = match &self.state {
            State::Waiting => hello::State::Waiting(Waiting {
                agent: self.agent.as_ref().map(Agent::told),
            }),
            State::Receiving(receiving) => {
                hello::State::Receiving(polydev_proto::init::Receiving {
                    run_id: receiving.start.run_id.clone(),
                    stdin_offset: receiving.taken,
                })
            }
            State::Running(command) => hello::State::Running(Running {
                run_id: command.run_id.clone(),
                stdin_offset: command.input.offset(),
                form: command.form.clone(),
            }),
            State::Exited(exited) => hello::State::Exited(exited.clone()),
            State::NotStarted(not_started) => hello::State::NotStarted(not_started.clone()),
        };
        // The end is reported again after the output, which may be resent too.
        self.end_is_told = false;
        if let Some(left) = &mut self.left {
            left.is_told = false;
        }
        self.link.send(from_init::Message::Hello(Hello {
            protocol_version: PROTOCOL_VERSION,
            state: Some(state),
            public_key: self.public_key.clone(),
        }));
        if let Some(account) = &mut self.account {
            account.rewind();
        }
        if let State::Running(command) = &self.state
            && let Some(asking) = &command.asking
        {
            for call in asking.waiting() {
                self.link.send(from_init::Message::ToolCall(call));
            }
        }
    }

    /// Frames as much as the link has room for; the end follows the last byte.
    pub(super) fn send_output(&mut self) {
        self.send_account();
        for (stream, output) in self.outputs.iter_mut() {
            if stream == Stream::Artifacts
                && self.link.has_room()
                && let Some(left) = self.left.as_mut().filter(|left| !left.is_told)
            {
                left.is_told = true;
                self.link.send(from_init::Message::Collected(Collected {
                    artifacts: Some(left.artifacts.clone()),
                    exited: match &self.state {
                        State::Exited(exited) => Some(exited.clone()),
                        _ => None,
                    },
                }));
            }
            while self.link.has_room()
                && let Some((offset, data)) = output.take_unsent(MAX_DATA)
            {
                let stream = stream.number();
                self.link.send(from_init::Message::Data(Data {
                    stream,
                    offset,
                    data,
                }));
            }
        }
        if self.end_is_told || !self.link.has_room() || self.has_unsent() {
            return;
        }
        let message = match &self.state {
            State::Waiting | State::Receiving(_) | State::Running(_) => return,
            State::Exited(exited) => from_init::Message::Exited(exited.clone()),
            State::NotStarted(refused) => from_init::Message::NotStarted(refused.clone()),
        };
        self.end_is_told = true;
        self.link.send(message);
    }

    pub(super) fn send_account(&mut self) {
        if self.link.has_room()
            && let Some(refreshed) = self.account.as_mut().and_then(Account::take_untold)
        {
            self.link.send(from_init::Message::Refreshed(refreshed));
        }
    }
}
