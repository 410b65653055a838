//! The driver's end of a container's socket.

use std::{
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::BytesMut;
use polydev_proto::{
    frame,
    init::{FromInit, PROTOCOL_VERSION, ToInit, from_init, hello, to_init},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        UnixListener, UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    time::timeout,
};

/// Init reads whatever comes; one that does not for so long is dead.
const SEND: Duration = Duration::from_secs(10);

/// Why there is no talking to a container's init.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot listen in `{folder}`")]
    Listen { folder: PathBuf, source: io::Error },
    #[error("the connection to init broke")]
    Broken(#[source] io::Error),
    #[error("init does not speak its protocol")]
    Protocol(#[source] frame::Error),
    #[error("init speaks version {version} of its protocol, not {PROTOCOL_VERSION}")]
    Version { version: u32 },
    #[error("init did not begin by waiting for a command")]
    NotWaiting,
    #[error("init closed the connection")]
    Closed,
}

/// A socket in a folder made for one container, which is mounted into it. The
/// folders above belong to root alone; removed when dropped.
#[derive(Debug)]
pub(super) struct Listener {
    folder: tempfile::TempDir,
    socket: UnixListener,
}

impl Listener {
    pub(super) fn bind(parent: &Path) -> Result<Self, Error> {
        let listen = |source| Error::Listen {
            folder: parent.to_owned(),
            source,
        };
        let folder = tempfile::Builder::new()
            .prefix("")
            .tempdir_in(parent)
            .map_err(listen)?;
        let path = folder.path().join("init.sock");
        let socket = UnixListener::bind(&path).map_err(listen)?;
        // Init has the user of the image.
        let open_to_all =
            |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode));
        open_to_all(folder.path(), 0o755)
            .and_then(|()| open_to_all(&path, 0o666))
            .map_err(listen)?;
        Ok(Self { folder, socket })
    }

    pub(super) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Waits for the process `pid` to connect and greet. Whoever else connects is
    /// turned away: the command of a container cannot speak for its init.
    ///
    /// # Cancel safety
    /// Cancelling drops the connection; init tries again.
    pub(super) async fn accept(&self, pid: u32) -> Result<Link, Error> {
        loop {
            let (stream, _) = self.socket.accept().await.map_err(Error::Broken)?;
            let peer = stream.peer_cred().ok().and_then(|peer| peer.pid());
            if peer.is_none_or(|peer| peer.cast_unsigned() != pid) {
                tracing::warn!(
                    ?peer,
                    init = pid,
                    "a process that is not init was turned away"
                );
                continue;
            }
            let mut link = Link::new(stream);
            return match link.reader.next().await? {
                from_init::Message::Hello(hello) if hello.protocol_version != PROTOCOL_VERSION => {
                    Err(Error::Version {
                        version: hello.protocol_version,
                    })
                }
                from_init::Message::Hello(hello)
                    if matches!(hello.state, Some(hello::State::Waiting(_))) =>
                {
                    Ok(link)
                }
                _ => Err(Error::NotWaiting),
            };
        }
    }
}

/// A connection to one container's init.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) reader: Reader,
    pub(super) writer: Writer,
}

impl Link {
    fn new(stream: UnixStream) -> Self {
        let (reader, writer) = stream.into_split();
        Self {
            reader: Reader {
                socket: reader,
                input: BytesMut::new(),
            },
            writer: Writer {
                socket: writer,
                output: BytesMut::new(),
            },
        }
    }
}

#[derive(Debug)]
pub(super) struct Reader {
    socket: OwnedReadHalf,
    input: BytesMut,
}

impl Reader {
    /// The next message of init.
    ///
    /// # Cancel safety
    /// Loses nothing.
    pub(super) async fn next(&mut self) -> Result<from_init::Message, Error> {
        loop {
            if let Some(FromInit { message }) =
                frame::decode(&mut self.input).map_err(Error::Protocol)?
            {
                // A message of a newer init would be an empty one; it is not awaited here.
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
pub(super) struct Writer {
    socket: OwnedWriteHalf,
    output: BytesMut,
}

impl Writer {
    /// Sends one message whole. Not cancel safe: a message cut short ends the link.
    pub(super) async fn send(&mut self, message: to_init::Message) -> Result<(), Error> {
        self.output.clear();
        frame::encode(
            &ToInit {
                message: Some(message),
            },
            &mut self.output,
        )
        .map_err(Error::Protocol)?;
        match timeout(SEND, self.socket.write_all(&self.output)).await {
            Ok(sent) => sent.map_err(Error::Broken),
            Err(_) => Err(Error::Broken(io::ErrorKind::TimedOut.into())),
        }
    }
}
