//! The driver's end of a container's socket, for messages to and from init. [`connection`]
//! is the connection to one container, and how it ends.

mod connection;

pub(crate) use connection::Connection;
pub use connection::Occupant;

use std::{
    fs, io,
    os::{
        fd::{BorrowedFd, OwnedFd},
        unix::fs::PermissionsExt,
    },
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use polydev_proto::{
    descriptors, frame,
    init::{FromInit, Hello, PROTOCOL_VERSION, ToInit, from_init, hello, to_init},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Interest},
    net::{
        UnixListener, UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    time::timeout,
};

/// Init always reads; an init that does not read for this long is dead.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);

/// Why the driver cannot communicate with a container's init.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot listen in `{folder}`")]
    Listen { folder: PathBuf, source: io::Error },
    #[error("the connection to init broke")]
    Broken(#[source] io::Error),
    #[error("init violates its protocol")]
    Protocol(#[source] frame::Error),
    #[error("init uses protocol version {version}, not {PROTOCOL_VERSION}")]
    Version { version: u32 },
    #[error("the first message of init was not a greeting")]
    NotGreeted,
    #[error("init is not waiting for a command")]
    NotWaiting,
    #[error("init does not listen for requests to the broker")]
    NotListening,
    #[error("init closed the connection")]
    Closed,
}

/// A socket in a folder that is made for one container and mounted into it. The parent
/// folders belong to root alone.
#[derive(Debug)]
pub(crate) struct Listener {
    folder: Folder,
    socket: UnixListener,
}

impl Listener {
    pub(crate) fn bind(parent: &Path) -> Result<Self, Error> {
        let listen = |source| Error::Listen {
            folder: parent.to_owned(),
            source,
        };
        let folder = tempfile::Builder::new()
            .prefix("")
            .tempdir_in(parent)
            .map_err(listen)?;
        let folder = Folder {
            path: folder.keep(),
            keep: false,
        };
        let path = folder.path.join("init.sock");
        Self::listen(folder, &path).map_err(listen)
    }

    /// Listens again in a folder from an earlier life of the driver.
    pub(crate) fn bind_again(folder: &Path) -> Result<Self, Error> {
        let listen = |source| Error::Listen {
            folder: folder.to_owned(),
            source,
        };
        let path = folder.join("init.sock");
        let folder = Folder {
            path: folder.to_owned(),
            keep: true,
        };
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(listen(error)),
            _ => {}
        }
        Self::listen(folder, &path).map_err(listen)
    }

    fn listen(folder: Folder, path: &Path) -> io::Result<Self> {
        let socket = UnixListener::bind(path)?;
        // Init runs as the user of the image.
        let open_to_all =
            |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode));
        open_to_all(&folder.path, 0o755)?;
        open_to_all(path, 0o666)?;
        Ok(Self { folder, socket })
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder.path
    }

    /// From now on the folder outlives this process, so that the container can reconnect to
    /// the next one. Whoever destroys the container removes the folder.
    pub(crate) fn keep(&mut self) {
        self.folder.keep = true;
    }

    /// The container is no longer needed, and neither is the folder.
    pub(crate) fn let_go(&mut self) {
        self.folder.keep = false;
    }

    /// Waits until the container's init connects and sends its greeting. Other processes
    /// are rejected, because a command must not pass for its init.
    ///
    /// # Cancel safety
    /// Cancelling drops the connection; init reconnects.
    pub(crate) async fn accept(&self, is_init: impl Fn(u32) -> bool) -> Result<Greeted, Error> {
        loop {
            let (stream, _) = self.socket.accept().await.map_err(Error::Broken)?;
            let peer = stream.peer_cred().ok().and_then(|peer| peer.pid());
            let Some(pid) = peer.map(i32::cast_unsigned).filter(|pid| is_init(*pid)) else {
                tracing::warn!(
                    ?peer,
                    "rejected a connection from a process that is not init"
                );
                continue;
            };
            let (mut input, mut sockets) = (BytesMut::new(), Vec::new());
            let FromInit { message } = loop {
                if let Some(first) = frame::decode(&mut input).map_err(Error::Protocol)? {
                    break first;
                }
                let mut piece = [0; 4096];
                let receive = || descriptors::receive(&stream, &mut piece, &mut sockets);
                let received = stream.async_io(Interest::READABLE, receive).await;
                match received.map_err(Error::Broken)? {
                    0 => return Err(Error::Closed),
                    count => input.extend_from_slice(&piece[..count]),
                }
            };
            let requests = sockets.pop();
            let link = Link::new(stream, input);
            return match message.ok_or(Error::NotGreeted)? {
                from_init::Message::Hello(Hello {
                    protocol_version: PROTOCOL_VERSION,
                    state: Some(state),
                    public_key,
                }) => Ok(Greeted {
                    pid,
                    link,
                    state,
                    public_key,
                    requests,
                }),
                from_init::Message::Hello(hello) if hello.protocol_version != PROTOCOL_VERSION => {
                    Err(Error::Version {
                        version: hello.protocol_version,
                    })
                }
                _ => Err(Error::NotGreeted),
            };
        }
    }
}

/// A connected init.
#[derive(Debug)]
pub(crate) struct Greeted {
    pub(crate) pid: u32,
    pub(crate) link: Link,
    pub(crate) state: hello::State,
    /// The key to seal secrets with.
    pub(crate) public_key: Bytes,
    /// Where the container listens for requests to the broker.
    pub(crate) requests: Option<OwnedFd>,
}

/// Removed when dropped, unless it is kept.
#[derive(Debug)]
struct Folder {
    path: PathBuf,
    keep: bool,
}

impl Drop for Folder {
    fn drop(&mut self) {
        if !self.keep
            && let Err(error) = fs::remove_dir_all(&self.path)
        {
            tracing::debug!(%error, "cannot remove a socket's folder");
        }
    }
}

/// A connection to one container's init.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) reader: Reader,
    pub(crate) writer: Writer,
}

impl Link {
    fn new(stream: UnixStream, input: BytesMut) -> Self {
        let (reader, writer) = stream.into_split();
        Self {
            reader: Reader {
                socket: reader,
                input,
            },
            writer: Writer {
                socket: writer,
                output: BytesMut::new(),
            },
        }
    }
}

#[derive(Debug)]
pub(crate) struct Reader {
    socket: OwnedReadHalf,
    input: BytesMut,
}

impl Reader {
    /// Returns init's next message.
    ///
    /// # Cancel safety
    /// Loses nothing.
    pub(crate) async fn next(&mut self) -> Result<from_init::Message, Error> {
        loop {
            if let Some(FromInit { message }) =
                frame::decode(&mut self.input).map_err(Error::Protocol)?
            {
                // A newer init's unknown message decodes as an empty one; it is skipped.
                match message {
                    Some(message) => return Ok(message),
                    None => continue,
                }
            }
            match self.socket.read_buf(&mut self.input).await {
                Ok(0) => return Err(Error::Closed),
                Ok(_) => {}
                Err(source) => return Err(Error::Broken(source)),
            }
        }
    }
}

#[derive(Debug)]
pub(crate) struct Writer {
    socket: OwnedWriteHalf,
    output: BytesMut,
}

impl Writer {
    /// Sends one whole message. Not cancel safe: a partial message ends the link.
    pub(crate) async fn send(&mut self, message: to_init::Message) -> Result<(), Error> {
        self.output.clear();
        frame::encode(
            &ToInit {
                message: Some(message),
            },
            &mut self.output,
        )
        .map_err(Error::Protocol)?;
        self.write(0).await
    }

    /// Sends one whole message, with descriptors attached to its first byte.
    pub(crate) async fn send_with(
        &mut self,
        message: to_init::Message,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(), Error> {
        self.output.clear();
        let message = ToInit {
            message: Some(message),
        };
        frame::encode(&message, &mut self.output).map_err(Error::Protocol)?;
        let stream: &UnixStream = self.socket.as_ref();
        let send = || descriptors::send(stream, &self.output, descriptors);
        let sent = timeout(SEND_TIMEOUT, stream.async_io(Interest::WRITABLE, send)).await;
        match sent {
            Ok(sent) => self.write(sent.map_err(Error::Broken)?).await,
            Err(_) => Err(Error::Broken(io::ErrorKind::TimedOut.into())),
        }
    }

    /// Writes the encoded message, from byte `sent` on.
    async fn write(&mut self, sent: usize) -> Result<(), Error> {
        match timeout(SEND_TIMEOUT, self.socket.write_all(&self.output[sent..])).await {
            Ok(sent) => sent.map_err(Error::Broken),
            Err(_) => Err(Error::Broken(io::ErrorKind::TimedOut.into())),
        }
    }
}
