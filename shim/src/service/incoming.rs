//! Connections of callers, and who is at the other end of each.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use futures_util::{Stream, StreamExt, stream};
use polydev_proto::tls;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::UnixStream,
};
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};
use tonic::transport::server::Connected;

use crate::{access::Caller, address::Listener};

/// A connection of a caller who is known.
pub(super) struct Connection {
    stream: Box<dyn Bytes>,
    caller: Caller,
}

trait Bytes: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Bytes for T {}

impl Connection {
    fn new(stream: impl Bytes + 'static, caller: String) -> Self {
        Self {
            stream: Box::new(stream),
            caller: Caller(caller),
        }
    }
}

/// Those that come to any of `listeners`.
pub(super) fn incoming(
    listeners: Vec<Listener>,
) -> impl Stream<Item = io::Result<Connection>> + Send {
    stream::select_all(listeners.into_iter().map(|listener| {
        match listener {
            Listener::Unix(listener) => UnixListenerStream::new(listener)
                .map(|stream| unix(stream?))
                .boxed(),
            Listener::Loopback(listener) => TcpListenerStream::new(listener)
                .map(|stream| {
                    let stream = stream?;
                    stream.set_nodelay(true)?;
                    Ok(Connection::new(stream, "loopback".into()))
                })
                .boxed(),
            Listener::Tls(listener, files) => tls::incoming(listener, files)
                .map(|(stream, name)| Ok(Connection::new(stream, name)))
                .boxed(),
        }
    }))
}

fn unix(stream: UnixStream) -> io::Result<Connection> {
    let uid = stream.peer_cred()?.uid();
    Ok(Connection::new(stream, format!("uid:{uid}")))
}

impl Connected for Connection {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        self.caller.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context,
        buf: &mut ReadBuf,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context,
        bufs: &[io::IoSlice],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
