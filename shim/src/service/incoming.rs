//! Connections of callers, and the name of the caller of each connection.

use std::io;

use futures_util::{Stream, StreamExt, stream};
use polydev_transport::{
    accept::accept,
    address::Listener,
    connection::{Connection, Origin},
    incoming::incoming as secured,
};
use tokio::net::{TcpStream, UnixStream};

/// The connections that arrive at any of `listeners`.
pub(super) fn incoming(
    listeners: Vec<Listener>,
) -> impl Stream<Item = io::Result<Connection>> + Send {
    let connections = listeners.into_iter().map(|listener| match listener {
        Listener::Unix(listener) => accept(listener).filter_map(async |s| unix(s).ok()).boxed(),
        Listener::Loopback(listener) => accept(listener)
            .filter_map(async |s| loopback(s).ok())
            .boxed(),
        Listener::Tls(listener, files) => secured(listener, files).boxed(),
    });
    stream::select_all(connections).map(Ok)
}

/// # Errors
/// If the connection is gone.
fn unix(stream: UnixStream) -> io::Result<Connection> {
    let peer = stream.peer_cred()?;
    let (uid, pid) = (peer.uid(), peer.pid());
    let origin = Origin::Process { uid, pid };
    Ok(Connection::new(stream, format!("uid:{uid}"), origin))
}

/// # Errors
/// If the connection is gone.
fn loopback(stream: TcpStream) -> io::Result<Connection> {
    stream.set_nodelay(true)?;
    let origin = Origin::Address(stream.peer_addr()?);
    Ok(Connection::new(stream, "loopback".into(), origin))
}
