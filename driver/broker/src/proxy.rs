//! A container's connections to other servers than its model's: the broker is its HTTP proxy
//! (RFC 9110, section 9.3.6; RFC 9112, section 3.2.2). TLS is not broken open.

use std::sync::Arc;

use http::{HeaderValue, Method, Request, Response, StatusCode, Uri, header};
use http_body_util::BodyExt;
use hyper::{body::Incoming, client::conn::http1, upgrade::OnUpgrade};
use hyper_util::rt::TokioIo;
use polydev_proto::egress::Host;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    sync::OwnedSemaphorePermit,
};
use tokio_util::io::{InspectReader, InspectWriter};

use crate::{
    answer::{self, AnswerBody, OfRun},
    attempt::{Attempt, Connection},
    container::{Container, Place},
    egress::{self, Egress, Target},
    grant::Grant,
    rate::Paced,
    request::{Refusal, without_hops},
    tunnel::carry,
};

const HTTP_PORT: u16 = 80;

/// Why a container gets no answer of a server.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(transparent)]
    Egress(#[from] egress::Error),
    #[error("the server broke the connection")]
    Broken(#[from] hyper::Error),
}

/// Whether a request is for a proxy, and not for the broker's own paths.
pub(crate) fn is_asked<B>(request: &Request<B>) -> bool {
    request.method() == Method::CONNECT || request.uri().authority().is_some()
}

/// Answers a request for a proxy.
///
/// # Errors
/// [`Refusal`]
///
/// # Cancel safety
/// Cancelling closes the connection to the server, unless it is a tunnel that is open.
pub(crate) async fn answer(
    container: &Arc<Container>,
    grant: &Arc<Grant>,
    egress: &Egress,
    place: &Place,
    request: Request<Incoming>,
) -> Result<Response<AnswerBody>, Refusal> {
    let target = target(request.method(), request.uri())?;
    let is_tunnel = request.method() == Method::CONNECT;
    let right = is_tunnel.then(|| container.tunnel()).transpose()?;
    let passed = async {
        let attempt = Attempt::new(container, grant, &target);
        let (stream, address) = match egress.connect(&target).await {
            Ok(connected) => connected,
            Err(error) => {
                if let egress::Error::Denied(denied) = &error {
                    attempt.denied(denied);
                }
                return Err(error.into());
            }
        };
        let stream = counted(stream, attempt.connected(address));
        match right {
            Some(right) => {
                let rights = (place.clone(), right);
                Ok(tunnel(container, grant, rights, request, stream))
            }
            None => Ok(send(container, grant, request, stream).await?),
        }
    };
    tokio::select! {
        passed = passed => Ok(passed.unwrap_or_else(|error: Error| refused(&target, &error))),
        () = grant.over().cancelled() => Err(Refusal::Over),
    }
}

fn target(method: &Method, uri: &Uri) -> Result<Target, Refusal> {
    let not_one = || Refusal::Target(uri.to_string().chars().take(200).collect());
    let authority = host_and_port(uri);
    // A port that is no number is none to `http`.
    let has_port = authority.len() > uri.host().unwrap_or_default().len();
    let port = match (uri.port_u16(), uri.scheme_str()) {
        (Some(port), None) if method == Method::CONNECT => port,
        (Some(port), Some("http")) if method != Method::CONNECT => port,
        (None, Some("http")) if method != Method::CONNECT && !has_port => HTTP_PORT,
        _ => return Err(not_one()),
    };
    let host = uri.host().and_then(Host::read);
    match host.filter(|_| port > 0) {
        Some(host) => Ok(Target { host, port }),
        None => Err(not_one()),
    }
}

/// `HOST` or `HOST:PORT`, without the user's name that may be before it.
fn host_and_port(uri: &Uri) -> &str {
    let authority = uri.authority().map_or("", |authority| authority.as_str());
    authority.rsplit('@').next().unwrap_or_default()
}

fn refused(target: &Target, error: &Error) -> Response<AnswerBody> {
    let status = match error {
        Error::Egress(egress::Error::Denied(_)) => StatusCode::FORBIDDEN,
        Error::Egress(_) | Error::Broken(_) => StatusCode::BAD_GATEWAY,
    };
    let message = format!("{target}: {}", polydev_proto::error::chain(error));
    answer::proxy_error(status, &message)
}

/// The connection, with what passes it on record.
fn counted(
    stream: TcpStream,
    connection: Connection,
) -> impl AsyncRead + AsyncWrite + Unpin + Send + 'static {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "cannot set TCP_NODELAY");
    }
    let connection = Arc::new(connection);
    let received = connection.clone();
    let received = move |piece: &[u8]| received.received(piece.len());
    let sent = move |piece: &[u8]| connection.sent(piece.len());
    InspectWriter::new(InspectReader::new(stream, received), sent)
}

/// Carries what follows in both directions, until one side or the run ends.
fn tunnel(
    container: &Arc<Container>,
    grant: &Arc<Grant>,
    rights: (Place, OwnedSemaphorePermit),
    mut request: Request<Incoming>,
    server: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
) -> Response<AnswerBody> {
    let upgrade: OnUpgrade = hyper::upgrade::on(&mut request);
    let (container, grant) = (container.clone(), grant.clone());
    tokio::spawn(async move {
        let _until_it_ends = rights;
        let carried = async {
            let ours = upgrade.await.map_err(std::io::Error::other)?;
            carry(TokioIo::new(ours), server, &container, |_| Ok(()), |_| {}).await
        };
        tokio::select! {
            carried = carried => if let Err(error) = carried {
                tracing::debug!(container = container.name(), %error, "a tunnel broke");
            },
            () = grant.over().cancelled() => {}
        }
    });
    Response::new(answer::empty())
}

/// Sends a request without TLS to its server, and passes the answer back.
async fn send(
    container: &Arc<Container>,
    grant: &Arc<Grant>,
    request: Request<Incoming>,
    server: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
) -> hyper::Result<Response<AnswerBody>> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(server)).await?;
    let (name, over) = (container.name().to_owned(), grant.over().clone());
    // It ends with the answer, because its only sender does.
    tokio::spawn(async move {
        if let Some(Err(error)) = over.run_until_cancelled(connection).await {
            tracing::debug!(container = name, %error, "a connection broke");
        }
    });
    let answered = sender.send_request(outgoing(container, request)).await?;
    let (mut parts, body) = answered.into_parts();
    // It would end HTTP here, and nobody has asked for it.
    if parts.status.is_informational() {
        let message = format!("the server answered with {}", parts.status);
        return Ok(answer::proxy_error(StatusCode::BAD_GATEWAY, &message));
    }
    parts.headers = without_hops(&parts.headers);
    let body = Paced::new(body, container.download.clone());
    Ok(Response::from_parts(
        parts,
        OfRun::new(body, grant).boxed_unsync(),
    ))
}

fn outgoing(container: &Container, request: Request<Incoming>) -> Request<Paced<Incoming>> {
    let (mut parts, body) = request.into_parts();
    let host = HeaderValue::from_str(host_and_port(&parts.uri));
    parts.headers = without_hops(&parts.headers);
    let host = host.expect("an authority is of visible letters");
    parts.headers.insert(header::HOST, host);
    let query = parts.uri.query().map(|query| format!("?{query}"));
    let path = format!("{}{}", parts.uri.path(), query.unwrap_or_default());
    parts.uri = path.parse().expect("it was a part of one");
    let body = Paced::new(body, container.upload.clone());
    Request::from_parts(parts, body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_a_host_and_a_port() {
        let target = |method: Method, uri: &str| {
            let found = target(&method, &uri.parse().expect("a URI"));
            found
                .map(|target| target.to_string())
                .map_err(|error| error.to_string())
        };
        let connect = |uri: &str| target(Method::CONNECT, uri);
        assert_eq!(connect("GitHub.com:443").as_deref(), Ok("github.com:443"));
        assert_eq!(connect("[::1]:80").as_deref(), Ok("[::1]:80"));
        let get = |uri: &str| target(Method::GET, uri);
        assert_eq!(
            get("http://example.org/path?query").as_deref(),
            Ok("example.org:80")
        );
        assert_eq!(
            get("http://user:word@10.0.0.1:8080/").as_deref(),
            Ok("10.0.0.1:8080")
        );
        assert_eq!(
            get("https://example.org/"),
            Err("`https://example.org/` is neither HOST:PORT nor a URL with http://".to_owned())
        );
        assert!(connect("github.com").is_err() && connect("127.1:80").is_err());
        assert!(connect("github.com:0").is_err());
        assert!(get("http://example.org:99999/").is_err());
    }
}
