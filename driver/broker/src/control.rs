//! The connection of the driver. One at a time: a new one takes the place of the one before,
//! because a new life of the driver may come before the end of the last is seen.

use std::{
    collections::VecDeque,
    io,
    os::fd::{BorrowedFd, OwnedFd},
    sync::Arc,
    time::Duration,
};

use bytes::{Buf, BytesMut};
use polydev_proto::{
    broker::{FromBroker, Hello, Open, PROTOCOL_VERSION, ToBroker, from_broker, to_broker},
    descriptors, frame,
};
use tokio::{
    io::Interest,
    net::{TcpListener, UnixListener, UnixStream},
    time::{sleep, timeout},
};

use crate::{broker::Broker, seed::Seed};

/// Most bytes of one read.
const MAX_READ: usize = 4096;

/// How long a broker whose driver does not come back serves its containers: longer than the
/// longest run, 24 hours.
const DRIVER_TIMEOUT: Duration = Duration::from_secs(25 * 60 * 60);
/// When no connection can be accepted, for example for want of descriptors.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);

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

/// Serves the driver until there is none any longer.
pub async fn serve(listener: UnixListener, broker: Arc<Broker>, seed: Seed) {
    let mut next = timeout(DRIVER_TIMEOUT, accept(&listener)).await.ok();
    while let Some(stream) = next {
        next = tokio::select! {
            error = drive(stream, &broker, &seed) => {
                tracing::info!(error = polydev_proto::error::chain(&error), "the driver is away");
                // Without a container, there is nothing that the next one could miss.
                let is_used = !broker.is_empty();
                let wait = if is_used { DRIVER_TIMEOUT } else { Duration::ZERO };
                timeout(wait, accept(&listener)).await.ok()
            }
            next = accept(&listener) => Some(next),
        };
    }
}

async fn accept(listener: &UnixListener) -> UnixStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept the driver's connection");
                sleep(RETRY_INTERVAL).await;
            }
        }
    }
}

/// Does what the driver asks until the connection ends; returns the reason.
async fn drive(stream: UnixStream, broker: &Broker, seed: &Seed) -> Error {
    let mut connection = Driver {
        stream,
        input: BytesMut::new(),
        sockets: VecDeque::new(),
    };
    if let Err(error) = connection.greet(broker, seed).await {
        return error;
    }
    loop {
        let outgoing = loop {
            tokio::select! {
                asked = connection.next() => {
                    match asked.and_then(|asked| connection.act(broker, asked)) {
                        Ok(None) => {}
                        Ok(Some(answer)) => break answer,
                        Err(error) => return error,
                    }
                }
                message = broker.news() => break message,
            }
        };
        if let Err(error) = connection.send(outgoing, None).await {
            return error;
        }
    }
}

struct Driver {
    stream: UnixStream,
    input: BytesMut,
    /// Those that have come, and whose frame has not been read yet.
    sockets: VecDeque<OwnedFd>,
}

impl Driver {
    /// Says what the broker holds.
    async fn greet(&mut self, broker: &Broker, seed: &Seed) -> Result<(), Error> {
        let held = broker.held();
        let hello = Hello {
            protocol_version: PROTOCOL_VERSION,
            public_key: broker.public_key(),
            held: u32::try_from(held.len()).expect("a node has fewer containers"),
        };
        let hello = from_broker::Message::Hello(hello);
        self.send(hello, Some(seed.memory())).await?;
        for container in held {
            self.send(from_broker::Message::Held(container.into()), None)
                .await?;
        }
        Ok(())
    }

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
            let mut piece = [0; MAX_READ];
            let receive = || descriptors::receive(&self.stream, &mut piece, &mut self.sockets);
            match self.stream.async_io(Interest::READABLE, receive).await? {
                0 => return Err(Error::Closed),
                count => self.input.extend_from_slice(&piece[..count]),
            }
        }
    }

    /// Returns the answer.
    fn act(
        &mut self,
        broker: &Broker,
        asked: to_broker::Message,
    ) -> Result<Option<from_broker::Message>, Error> {
        match asked {
            to_broker::Message::Open(open) => self.open(broker, &open)?,
            to_broker::Message::Grant(grant) => return Ok(Some(broker.grant(&grant))),
            to_broker::Message::Close(close) => {
                return Ok(Some(broker.close(&close.container)));
            }
        }
        Ok(None)
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

    /// Sends one whole message, with a descriptor attached to its first byte.
    async fn send(
        &mut self,
        message: from_broker::Message,
        mut descriptor: Option<BorrowedFd<'_>>,
    ) -> Result<(), Error> {
        let mut output = BytesMut::new();
        let message = FromBroker {
            message: Some(message),
        };
        frame::encode(&message, &mut output)?;
        while !output.is_empty() {
            let send = || descriptors::send(&self.stream, &output, descriptor.as_slice());
            output.advance(self.stream.async_io(Interest::WRITABLE, send).await?);
            descriptor = None;
        }
        Ok(())
    }
}
