//! The connection to the driver. It may break and be restored at any time. A restart of the
//! driver loses nothing: the supervisor starts every new connection with its state, and
//! resends what was not acknowledged.

use std::{
    io::{self, ErrorKind, Write},
    net::TcpListener,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use bytes::{Buf, BytesMut};
use nix::{
    errno::Errno,
    sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket},
};
use polydev_proto::{
    descriptors, frame,
    init::{FromInit, ToInit, from_init},
};

/// Most output that waits for the socket; beyond it nothing more is framed.
const HIGH_WATER: usize = 128 << 10;
/// A restarted driver is usually back within one or two seconds.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);
const MAX_RETRY_INTERVAL: Duration = Duration::from_millis(250);
/// A driver that removes the socket usually creates it again within moments.
const FORSAKEN_TIMEOUT: Duration = Duration::from_secs(10);

/// The connection to the driver, if there is one.
#[derive(Debug)]
pub(crate) struct Link {
    path: PathBuf,
    stream: Option<UnixStream>,
    input: BytesMut,
    /// Descriptors received with the input, until the message that announces them takes them.
    descriptors: Vec<OwnedFd>,
    output: BytesMut,
    /// Goes with the first byte of every connection: where the container asks the broker.
    requests: Option<TcpListener>,
    /// Whether the first byte of this connection has been sent.
    has_begun: bool,
    retry_at: Instant,
    retry_after: Duration,
    /// When the socket was first missing.
    missing_since: Option<Instant>,
}

impl Link {
    pub(crate) fn new(path: &Path, requests: Option<TcpListener>, now: Instant) -> Self {
        Self {
            path: path.to_owned(),
            stream: None,
            input: BytesMut::new(),
            descriptors: Vec::new(),
            output: BytesMut::new(),
            requests,
            has_begun: false,
            retry_at: now,
            retry_after: RETRY_INTERVAL,
            missing_since: None,
        }
    }

    pub(crate) fn stream(&self) -> Option<&UnixStream> {
        self.stream.as_ref()
    }

    /// Time until the next attempt to connect; `None` while connected.
    pub(crate) fn retry_in(&self, now: Instant) -> Option<Duration> {
        self.stream
            .is_none()
            .then(|| self.retry_at.saturating_duration_since(now))
    }

    /// Connects if it is due. Returns true for a new connection.
    pub(crate) fn connect_if_due(&mut self, now: Instant) -> bool {
        if self.stream.is_some() || now < self.retry_at {
            return false;
        }
        match open(&self.path) {
            Ok(stream) => {
                self.stream = Some(stream);
                self.has_begun = false;
                self.retry_after = RETRY_INTERVAL;
                self.missing_since = None;
                true
            }
            Err(error) => {
                self.missing_since = match error.kind() {
                    ErrorKind::NotFound => self.missing_since.or(Some(now)),
                    _ => None,
                };
                self.retry_at = now + self.retry_after;
                self.retry_after = MAX_RETRY_INTERVAL.min(self.retry_after * 2);
                false
            }
        }
    }

    /// Whether no driver will connect any longer. A driver that dies leaves its socket; a
    /// driver that no longer needs the container removes it.
    pub(crate) fn is_forsaken(&self, now: Instant) -> bool {
        self.missing_since
            .is_some_and(|since| now.duration_since(since) > FORSAKEN_TIMEOUT)
    }

    /// Closes the connection; another attempt follows.
    pub(crate) fn disconnect(&mut self, now: Instant) {
        self.stream = None;
        self.input = BytesMut::new();
        self.descriptors.clear();
        self.output = BytesMut::new();
        self.retry_at = now + self.retry_after;
    }

    /// The descriptors received so far.
    pub(crate) fn take_descriptors(&mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.descriptors)
    }

    /// Whether more output should be framed now.
    pub(crate) fn has_room(&self) -> bool {
        self.stream.is_some() && self.output.len() < HIGH_WATER
    }

    pub(crate) fn has_output(&self) -> bool {
        !self.output.is_empty()
    }

    /// Queues a message. Without a connection it is dropped; the next Hello reports the state.
    pub(crate) fn send(&mut self, message: from_init::Message) {
        if self.stream.is_some() {
            let message = FromInit {
                message: Some(message),
            };
            frame::encode(&message, &mut self.output)
                .expect("init's messages are far below the frame limit");
        }
    }

    /// Writes as much as the socket accepts.
    pub(crate) fn flush(&mut self, now: Instant) {
        while let Some(stream) = &mut self.stream {
            if self.output.is_empty() {
                break;
            }
            let written = match self.requests.as_ref().filter(|_| !self.has_begun) {
                Some(requests) => descriptors::send(&*stream, &self.output, &[requests.as_fd()]),
                None => stream.write(&self.output),
            };
            match written {
                Ok(count) => {
                    self.has_begun = true;
                    self.output.advance(count);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => self.disconnect(now),
            }
        }
    }

    /// Reads available bytes into `frames`; disconnects a driver that breaks the protocol.
    pub(crate) fn receive(&mut self, now: Instant, frames: &mut Vec<ToInit>) {
        let mut chunk = [0; 16 << 10];
        while let Some(stream) = &mut self.stream {
            match descriptors::receive(stream, &mut chunk, &mut self.descriptors) {
                Ok(0) => self.disconnect(now),
                Ok(count) => {
                    self.input.extend_from_slice(&chunk[..count]);
                    loop {
                        match frame::decode(&mut self.input) {
                            Ok(Some(message)) => frames.push(message),
                            Ok(None) => break,
                            Err(_) => return self.disconnect(now),
                        }
                    }
                    if count < chunk.len() {
                        break;
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => self.disconnect(now),
            }
        }
        if self.input.is_empty() {
            self.input = BytesMut::new();
        }
    }
}

/// Connects without blocking: a driver with a full backlog must not delay the command's
/// deadline.
fn open(path: &Path) -> io::Result<UnixStream> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket: OwnedFd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    match connect(socket.as_raw_fd(), &UnixAddr::new(path)?) {
        Ok(()) => Ok(UnixStream::from(socket)),
        Err(Errno::EAGAIN) => Err(ErrorKind::WouldBlock.into()),
        Err(errno) => Err(errno.into()),
    }
}
