//! A connection to the broker.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};

use bytes::{Buf, Bytes, BytesMut};
use polydev_proto::{
    broker::{FromBroker, Open, PROTOCOL_VERSION, ToBroker, from_broker, to_broker},
    descriptors, frame,
};
use tokio::{
    io::Interest,
    net::UnixStream,
    time::{error::Elapsed, timeout},
};

/// A broker that does not read for this long is given up. It reads at once, but not while it
/// sends.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);

/// Why the broker cannot be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("the connection to the broker broke")]
    Broken(#[from] io::Error),
    #[error("the broker violates the protocol")]
    Protocol(#[from] frame::Error),
    #[error("the broker speaks protocol version {version}, not {PROTOCOL_VERSION}")]
    Version { version: u32 },
    #[error("the broker did not say first what it holds")]
    NotGreeted,
    #[error("the broker does not answer")]
    Silent(#[from] Elapsed),
    #[error("the broker has not answered a grant")]
    Hung,
    #[error("the broker closed the connection")]
    Closed,
}

/// What a broker says first.
pub(super) struct Greeted {
    pub(super) public_key: Bytes,
    pub(super) held: Vec<Open>,
    pub(super) seed: OwnedFd,
}

pub(super) struct Wire {
    stream: UnixStream,
    input: BytesMut,
    /// Those that have come.
    descriptors: Vec<OwnedFd>,
}

impl Wire {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            input: BytesMut::new(),
            descriptors: Vec::new(),
        }
    }

    /// What the broker says first: what keys are sealed to, what it holds, and the memory with
    /// the seed of its key.
    pub(super) async fn greeted(&mut self) -> Result<Greeted, Error> {
        timeout(HELLO_TIMEOUT, self.greeting()).await?
    }

    async fn greeting(&mut self) -> Result<Greeted, Error> {
        let from_broker::Message::Hello(hello) = self.next().await? else {
            return Err(Error::NotGreeted);
        };
        let version = hello.protocol_version;
        if version != PROTOCOL_VERSION {
            return Err(Error::Version { version });
        }
        let mut held = Vec::new();
        for _ in 0..hello.held {
            let from_broker::Message::Held(container) = self.next().await? else {
                return Err(Error::NotGreeted);
            };
            held.push(*container);
        }
        Ok(Greeted {
            public_key: hello.public_key,
            held,
            seed: self.descriptors.pop().ok_or(Error::NotGreeted)?,
        })
    }

    /// # Cancel safety
    /// Loses nothing.
    pub(super) async fn next(&mut self) -> Result<from_broker::Message, Error> {
        loop {
            if let Some(FromBroker { message }) = frame::decode(&mut self.input)? {
                match message {
                    Some(message) => return Ok(message),
                    None => continue, // From a newer broker.
                }
            }
            let mut piece = [0; 4096];
            let receive = || descriptors::receive(&self.stream, &mut piece, &mut self.descriptors);
            match self.stream.async_io(Interest::READABLE, receive).await? {
                0 => return Err(Error::Closed),
                count => self.input.extend_from_slice(&piece[..count]),
            }
        }
    }

    /// Sends one whole message, with a socket attached to its first byte. Not cancel safe: a
    /// partial message ends the connection.
    pub(super) async fn send(
        &mut self,
        message: to_broker::Message,
        socket: Option<&OwnedFd>,
    ) -> Result<(), Error> {
        let message = ToBroker {
            message: Some(message),
        };
        let mut output = BytesMut::new();
        frame::encode(&message, &mut output)?;
        let mut socket = socket.map(AsFd::as_fd);
        while !output.is_empty() {
            let send = || descriptors::send(&self.stream, &output, socket.as_slice());
            let sent = self.stream.async_io(Interest::WRITABLE, send);
            output.advance(timeout(SEND_TIMEOUT, sent).await??);
            socket = None;
        }
        Ok(())
    }
}
