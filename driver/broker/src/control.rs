//! The connection of the driver. One at a time: a new one takes the place of the one before,
//! because a new life of the driver may come before the end of the last is seen.

use std::{
    collections::VecDeque,
    io::{self, IoSliceMut},
    mem::MaybeUninit,
    os::fd::OwnedFd,
    sync::Arc,
};

use bytes::BytesMut;
use polydev_proto::{
    broker::{FromBroker, Hello, Open, PROTOCOL_VERSION, ToBroker, from_broker, to_broker},
    frame,
};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tokio::{
    io::{AsyncWriteExt, Interest},
    net::{TcpListener, UnixListener, UnixStream},
    sync::mpsc,
};

use crate::broker::Broker;

/// Most descriptors that come with one read. The driver sends one with a frame.
const MAX_DESCRIPTORS: usize = 8;
/// Most bytes of one read.
const MAX_READ: usize = 64 << 10;

/// Why a connection of the driver cannot be used any longer.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("the connection broke")]
    Broken(#[from] io::Error),
    #[error("the driver violates the protocol")]
    Protocol(#[from] frame::Error),
    #[error("a container was opened without a socket")]
    NoSocket,
    #[error("the driver closed the connection")]
    Closed,
}

/// Serves the driver, for ever.
///
/// # Errors
/// If no connection can be accepted any longer.
pub async fn serve(
    listener: UnixListener,
    broker: Arc<Broker>,
    mut told: mpsc::Receiver<from_broker::Message>,
) -> io::Result<()> {
    let (mut stream, _) = listener.accept().await?;
    loop {
        let next = tokio::select! {
            error = drive(stream, &broker, &mut told) => {
                tracing::info!(error = polydev_proto::error::chain(&error), "the driver is away");
                listener.accept().await?
            }
            next = listener.accept() => next?,
        };
        stream = next.0;
    }
}

/// Does what the driver asks until the connection ends; returns the reason.
async fn drive(
    stream: UnixStream,
    broker: &Broker,
    told: &mut mpsc::Receiver<from_broker::Message>,
) -> Error {
    let mut connection = Driver {
        stream,
        input: BytesMut::new(),
        sockets: VecDeque::new(),
    };
    let hello = Hello {
        protocol_version: PROTOCOL_VERSION,
        public_key: broker.public_key(),
        containers: broker.containers(),
    };
    let mut outgoing = from_broker::Message::Hello(hello);
    loop {
        if let Err(error) = connection.send(outgoing).await {
            return error;
        }
        outgoing = loop {
            tokio::select! {
                asked = connection.next() => {
                    if let Err(error) = asked.and_then(|asked| connection.act(broker, asked)) {
                        return error;
                    }
                }
                Some(message) = told.recv() => break message,
            }
        };
    }
}

struct Driver {
    stream: UnixStream,
    input: BytesMut,
    /// Those that have come, and whose frame has not been read yet.
    sockets: VecDeque<OwnedFd>,
}

impl Driver {
    /// Returns the driver's next message.
    ///
    /// # Cancel safety
    /// Loses nothing.
    async fn next(&mut self) -> Result<to_broker::Message, Error> {
        loop {
            if let Some(ToBroker { message }) = frame::decode(&mut self.input)? {
                match message {
                    Some(message) => return Ok(message),
                    None => continue, // From a newer driver.
                }
            }
            if self.read().await? == 0 {
                return Err(Error::Closed);
            }
        }
    }

    async fn read(&mut self) -> io::Result<usize> {
        let (input, sockets) = (&mut self.input, &mut self.sockets);
        let read = || {
            let mut piece = [0; MAX_READ];
            let mut space =
                [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let mut pieces = [IoSliceMut::new(&mut piece)];
            let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
            let received = recvmsg(&self.stream, &mut pieces, &mut ancillary, flags)?;
            for message in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                    sockets.extend(descriptors);
                }
            }
            input.extend_from_slice(&piece[..received.bytes]);
            Ok(received.bytes)
        };
        self.stream.async_io(Interest::READABLE, read).await
    }

    fn act(&mut self, broker: &Broker, asked: to_broker::Message) -> Result<(), Error> {
        match asked {
            to_broker::Message::Open(open) => self.open(broker, &open)?,
            to_broker::Message::Grant(grant) => broker.grant(&grant),
            to_broker::Message::Revoke(revoke) => broker.revoke(&revoke.container),
            to_broker::Message::Close(close) => broker.close(&close.container),
        }
        Ok(())
    }

    fn open(&mut self, broker: &Broker, open: &Open) -> Result<(), Error> {
        let socket = self.sockets.pop_front().ok_or(Error::NoSocket)?;
        let socket = std::net::TcpListener::from(socket);
        socket.set_nonblocking(true)?;
        let listener = TcpListener::from_std(socket)?;
        if let Err(error) = broker.open(open, listener) {
            let error = polydev_proto::error::chain(&error);
            tracing::error!(container = open.container, error, "cannot open a container");
        }
        Ok(())
    }

    async fn send(&mut self, message: from_broker::Message) -> Result<(), Error> {
        let mut frame = BytesMut::new();
        let message = FromBroker {
            message: Some(message),
        };
        frame::encode(&message, &mut frame)?;
        Ok(self.stream.write_all(&frame).await?)
    }
}
