//! The agent's end of its connection to init: its stdin, which is a socket.

use std::{
    fs::File,
    io::{self, ErrorKind, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use bytes::BytesMut;
use polydev_proto::{
    descriptors, frame,
    init::{FromAgent, ToAgent, from_agent, to_agent},
};

/// Bytes in one read.
const MAX_CHUNK: usize = 64 << 10;

/// The connection to init.
pub(crate) struct Control {
    socket: File,
    input: BytesMut,
    descriptors: Vec<OwnedFd>,
    is_over: bool,
}

impl Control {
    /// # Errors
    /// If stdin is closed.
    pub(crate) fn of_stdin() -> io::Result<Self> {
        Ok(Self {
            socket: io::stdin().as_fd().try_clone_to_owned()?.into(),
            input: BytesMut::new(),
            descriptors: Vec::new(),
            is_over: false,
        })
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// # Errors
    /// If init is gone.
    pub(crate) fn tell(&mut self, message: from_agent::Message) -> io::Result<()> {
        let mut frame = BytesMut::new();
        let message = FromAgent {
            message: Some(message),
        };
        frame::encode(&message, &mut frame).map_err(io::Error::other)?;
        self.socket.write_all(&frame)
    }

    /// Reads once; call it when there is something to read.
    ///
    /// # Errors
    /// If init is gone.
    pub(crate) fn receive(&mut self) -> io::Result<()> {
        let mut chunk = [0; MAX_CHUNK];
        let count = match descriptors::receive(&self.socket, &mut chunk, &mut self.descriptors) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            received => received?,
        };
        self.input.extend_from_slice(&chunk[..count]);
        self.is_over = count == 0;
        Ok(())
    }

    /// What init has sent, once it is there.
    ///
    /// # Errors
    /// If init does not keep to the protocol, or is gone.
    pub(crate) fn next_message(&mut self) -> io::Result<Option<to_agent::Message>> {
        let message = frame::decode::<ToAgent>(&mut self.input).map_err(io::Error::other)?;
        match message {
            None if self.is_over => Err(io::ErrorKind::UnexpectedEof.into()),
            message => Ok(message.and_then(|message| message.message)),
        }
    }

    /// The descriptor that has come with a message.
    pub(crate) fn descriptor(&mut self) -> Option<OwnedFd> {
        self.descriptors.pop()
    }

    /// The text of so many bytes that follows the prompt, once all of it is there.
    ///
    /// # Errors
    /// If init is gone.
    pub(crate) fn text(&mut self, length: usize) -> io::Result<Option<BytesMut>> {
        match self.input.len() >= length {
            true => Ok(Some(self.input.split_to(length))),
            false if self.is_over => Err(io::ErrorKind::UnexpectedEof.into()),
            false => Ok(None),
        }
    }

    /// Whatever has come and is no message, and whether more may come.
    pub(crate) fn take(&mut self) -> (BytesMut, bool) {
        (self.input.split(), !self.is_over)
    }
}
