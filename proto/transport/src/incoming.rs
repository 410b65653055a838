//! Connections with TLS that arrive: a handshake with the certificates as their files are now,
//! and the end of a connection whose certificate is taken back.

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures_util::{Stream, StreamExt, stream};
use polydev_proto::error::chain;
use rustls::{ServerConfig, pki_types::CertificateDer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::oneshot,
    task::JoinSet,
    time::{Interval, interval, timeout},
};
use tokio_rustls::TlsAcceptor;
use x509_parser::parse_x509_certificate;

use crate::{
    accept::accept,
    connection::{Connection, Origin},
    places::{Peer, Place, Places},
    reload::Reloaded,
    revoked::{Id, Revoked},
    tls::{Callers, Error, Files, name},
};

/// Time for a connection to complete its handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// How often the lists of revoked certificates are looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// Most connections in a handshake, or of callers that have not identified themselves.
const MAX_UNKNOWN: usize = 4096;
/// Those of one address. Whoever wants to end the handshake of a proper caller with the same
/// address has to make so many connections meanwhile.
const MAX_UNKNOWN_OF_PEER: usize = 1024;

/// A server's configuration that follows its files.
#[derive(Debug)]
pub struct Reloading {
    files: Files,
    protocols: &'static [&'static str],
    callers: Callers,
    loaded: Reloaded<(Arc<ServerConfig>, Revoked)>,
}

impl Reloading {
    /// For a server of `protocols` (ALPN).
    ///
    /// # Errors
    /// [`Error`] if the files cannot be used now.
    pub fn new(
        files: Files,
        protocols: &'static [&'static str],
        callers: Callers,
    ) -> Result<Self, Error> {
        let paths = [&files.certificate, &files.key, &files.authority];
        let paths = paths.into_iter().chain(&files.revoked).cloned().collect();
        let load = || files.server(protocols, callers);
        let loaded = Reloaded::new(paths, load)?;
        Ok(Self {
            files,
            protocols,
            callers,
            loaded,
        })
    }

    /// What the files say now. Newer ones that are unusable are logged.
    fn now(&self) -> Arc<(Arc<ServerConfig>, Revoked)> {
        let load = || self.files.server(self.protocols, self.callers);
        let (loaded, refused) = self.loaded.get(load);
        if let Some(error) = refused {
            let error = chain(&error);
            tracing::warn!(
                error,
                "cannot use the new certificates, keeping the old ones"
            );
        }
        loaded
    }
}

/// Connections to `listener` with a successful handshake. Slow handshakes do not delay others,
/// however many there are.
pub fn incoming(
    listener: TcpListener,
    files: Arc<Reloading>,
) -> impl Stream<Item = Connection> + Send {
    let incoming = Incoming {
        accepted: Box::pin(accept(listener)),
        places: Places::new(MAX_UNKNOWN, MAX_UNKNOWN_OF_PEER),
        handshakes: JoinSet::new(),
        certified: Vec::new(),
        ticks: interval(LOOK_INTERVAL),
        files,
    };
    stream::unfold(incoming, |mut incoming| async {
        let connection = incoming.next().await;
        Some((connection, incoming))
    })
}

struct Incoming<S> {
    accepted: S,
    files: Arc<Reloading>,
    places: Arc<Places>,
    handshakes: JoinSet<(SocketAddr, io::Result<Done>)>,
    /// The certificates of connections, which end when these halves say so. Who drops them ends
    /// none: a server that stops accepting serves on.
    certified: Vec<(Id, oneshot::Sender<()>)>,
    ticks: Interval,
}

/// A handshake that has succeeded, with the caller's certificate.
type Done = (Connection, Option<Id>);

impl<S: Stream<Item = TcpStream> + Unpin> Incoming<S> {
    async fn next(&mut self) -> Connection {
        loop {
            tokio::select! {
                _ = self.ticks.tick(), if self.files.files.revoked.is_some() => self.end_revoked(),
                Some(stream) = self.accepted.next() => {
                    // One that is gone has no address.
                    let Ok(address) = stream.peer_addr() else { continue };
                    let config = self.files.now().0.clone();
                    let place = self.places.enter(Peer::of(address.ip()));
                    let handshake = handshake(config, stream, Origin::Address(address), place);
                    self.handshakes.spawn(async move { (address, handshake.await) });
                }
                Some(done) = self.handshakes.join_next() => match done {
                    Ok((_, Ok((connection, None)))) => return connection,
                    Ok((_, Ok((connection, Some(id))))) => return self.watch(connection, id),
                    Ok((address, Err(error))) => {
                        tracing::info!(%address, %error, "rejected a caller");
                    }
                    Err(error) => tracing::error!(%error, "a handshake panicked"),
                },
            }
        }
    }

    /// Ends the connection when the certificate is taken back.
    fn watch(&mut self, connection: Connection, id: Id) -> Connection {
        if self.files.files.revoked.is_none() {
            return connection;
        }
        let (ends, ended) = oneshot::channel();
        self.certified.push((id, ends));
        connection.unless(ended)
    }

    fn end_revoked(&mut self) {
        let now = self.files.now();
        let over = |(id, ends): &mut (Id, oneshot::Sender<()>)| ends.is_closed() || now.1.has(id);
        for (_, ends) in self.certified.extract_if(.., over) {
            if ends.send(()).is_ok() {
                tracing::info!("ended a connection: its certificate is revoked");
            }
        }
    }
}

async fn handshake(
    config: Arc<ServerConfig>,
    stream: TcpStream,
    origin: Origin,
    mut place: Place,
) -> io::Result<Done> {
    stream.set_nodelay(true)?;
    let accepted = tokio::select! {
        accepted = timeout(HANDSHAKE_TIMEOUT, TlsAcceptor::from(config).accept(stream)) => accepted,
        () = place.given_up() => return Err(io::Error::other("too many others are in a handshake")),
    };
    let stream = accepted.map_err(|_| io::Error::other("it did not finish its handshake"))??;
    let (_, session) = stream.get_ref();
    let certificate = session.peer_certificates().and_then(|chain| chain.first());
    let Some(certificate) = certificate else {
        return Ok((Connection::of_nobody(stream, origin, place), None));
    };
    let certificate = certificate.clone().into_owned();
    let name = name(&certificate);
    let name = name.ok_or_else(|| io::Error::other("its certificate contains no name"))?;
    let not_after = not_after(&certificate)
        .ok_or_else(|| io::Error::other("its certificate has no end that can be read"))?;
    let id = Id::of(&certificate);
    let connection = Connection::new(stream, name, origin).until(not_after);
    Ok((connection, id))
}

/// When a certificate expires.
fn not_after(certificate: &CertificateDer) -> Option<SystemTime> {
    let (_, certificate) = parse_x509_certificate(certificate).ok()?;
    let seconds = certificate.validity().not_after.timestamp();
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds.try_into().ok()?))
}
