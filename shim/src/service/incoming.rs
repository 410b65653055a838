//! Connections of callers, and the name of the caller of each connection.

use std::io;

use futures_util::{Stream, StreamExt, stream};
use polydev_transport::{address::Listener, connection::Connection, tls};
use tokio::net::{TcpStream, UnixStream};
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};

/// The connections that arrive at any of `listeners`.
pub(super) fn incoming(
    listeners: Vec<Listener>,
) -> impl Stream<Item = io::Result<Connection>> + Send {
    stream::select_all(listeners.into_iter().map(|listener| {
        match listener {
            Listener::Unix(listener) => UnixListenerStream::new(listener)
                .map(|stream| unix(stream?))
                .boxed(),
            Listener::Loopback(listener) => TcpListenerStream::new(listener)
                .map(|stream| loopback(stream?))
                .boxed(),
            Listener::Tls(listener, files) => tls::incoming(listener, files).map(Ok).boxed(),
        }
    }))
}

fn unix(stream: UnixStream) -> io::Result<Connection> {
    let uid = stream.peer_cred()?.uid();
    Ok(Connection::new(stream, format!("uid:{uid}")))
}

fn loopback(stream: TcpStream) -> io::Result<Connection> {
    stream.set_nodelay(true)?;
    Ok(Connection::new(stream, "loopback".into()))
}
