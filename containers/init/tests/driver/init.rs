//! The real program and its driver's end of a real socket.

use std::{
    io::{Read, Write},
    os::{
        fd::BorrowedFd,
        unix::net::{UnixListener, UnixStream},
    },
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use polydev_proto::{
    descriptors, frame,
    init::{DataAck, Exited, FromInit, Hello, Start, Stream, ToInit, from_init, hello, to_init},
};
use tempfile::TempDir;

pub(crate) struct Init {
    pub(crate) process: Child,
    pub(crate) listener: UnixListener,
    pub(crate) folder: TempDir,
}

pub(crate) struct Link {
    pub(crate) stream: UnixStream,
    input: BytesMut,
}

impl Init {
    pub(crate) fn start() -> Self {
        Self::start_with(|_, _| {})
    }

    /// `prepare` gets the command and its home folder.
    pub(crate) fn start_with(prepare: impl FnOnce(&mut Command, &Path)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("init.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_polydev-init"));
        command
            .arg(&socket)
            .env("HOME", folder.path())
            .stdin(Stdio::null());
        prepare(&mut command, folder.path());
        Self {
            process: command.spawn().unwrap(),
            listener,
            folder,
        }
    }

    /// The next connection and what init says of itself.
    pub(crate) fn connect(&self) -> (Link, hello::State) {
        let (link, hello) = self.greeted();
        (link, hello.state.unwrap())
    }

    /// The first connection, and the key to which secrets are sealed.
    pub(crate) fn connect_for_key(&self) -> (Link, Bytes) {
        let (link, hello) = self.greeted();
        (link, hello.public_key)
    }

    pub(crate) fn greeted(&self) -> (Link, Hello) {
        let (stream, _) = self.listener.accept().unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        let mut link = Link {
            stream,
            input: BytesMut::new(),
        };
        match link.next() {
            from_init::Message::Hello(hello) => {
                assert_eq!(
                    hello.protocol_version,
                    polydev_proto::init::PROTOCOL_VERSION
                );
                (link, hello)
            }
            other => panic!("the first message is {other:?}"),
        }
    }
}

impl Drop for Init {
    fn drop(&mut self) {
        let _ended = self.process.kill();
        let _reaped = self.process.wait();
    }
}

impl Link {
    /// With descriptors beside the first byte.
    pub(crate) fn send_with(
        &mut self,
        message: to_init::Message,
        descriptors: [BorrowedFd<'_>; 2],
    ) {
        let message = ToInit {
            message: Some(message),
        };
        let mut bytes = BytesMut::new();
        frame::encode(&message, &mut bytes).unwrap();
        descriptors::send(&self.stream, &bytes, &descriptors).unwrap();
    }

    pub(crate) fn send(&mut self, message: to_init::Message) {
        let mut bytes = BytesMut::new();
        frame::encode(
            &ToInit {
                message: Some(message),
            },
            &mut bytes,
        )
        .unwrap();
        self.stream.write_all(&bytes).unwrap();
    }

    pub(crate) fn next(&mut self) -> from_init::Message {
        loop {
            if let Some(FromInit { message }) = frame::decode(&mut self.input).unwrap() {
                return message.unwrap();
            }
            let mut chunk = [0; 4096];
            let count = self.stream.read(&mut chunk).unwrap();
            assert!(count > 0, "init closed the connection");
            self.input.extend_from_slice(&chunk[..count]);
        }
    }

    /// Reads to the end of the run, acknowledging what comes.
    pub(crate) fn finish(&mut self, stdout: &mut Vec<u8>) -> Exited {
        loop {
            match self.next() {
                from_init::Message::Data(data) => {
                    if data.stream == i32::from(Stream::Stdout) {
                        let at = usize::try_from(data.offset).unwrap();
                        assert!(at <= stdout.len(), "a gap");
                        stdout.truncate(at);
                        stdout.extend_from_slice(&data.data);
                    }
                    let offset = data.offset + data.data.len() as u64;
                    self.send(to_init::Message::DataAck(DataAck {
                        stream: data.stream,
                        offset,
                    }));
                }
                from_init::Message::Exited(exited) => return exited,
                _ => {}
            }
        }
    }
}

pub(crate) fn shell(script: &str) -> Start {
    Start {
        run_id: "run".into(),
        argv: ["sh", "-c", script]
            .map(|arg| Bytes::copy_from_slice(arg.as_bytes()))
            .into(),
        timeout_ms: 60_000,
        kill_timeout_ms: 1_000,
        output_buffer_bytes: 1 << 20,
        ..Default::default()
    }
}
