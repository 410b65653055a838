//! One request of a container, from the check to the last byte of the API's answer.

use std::sync::Arc;

use http::{Request, Response, StatusCode};
use http_body::Body as _;
use http_body_util::BodyExt;
use hyper::body::Incoming;

use crate::{
    answer::{self, AnswerBody, OfRun},
    container::Container,
    events::Events,
    grant::Grant,
    rate::Paced,
    request::{self, Asked, Refusal},
    upstream::Connections,
    websocket,
};

/// Answers a request of a container. The answer's body follows the API's, piece by piece.
///
/// # Cancel safety
/// Cancelling ends the request to the API.
pub(crate) async fn answer(
    container: &Arc<Container>,
    events: &Events,
    request: Request<Incoming>,
) -> Response<AnswerBody> {
    match forward(container, events, request).await {
        Ok(answer) => answer,
        Err(refusal) => {
            tracing::info!(container = container.name, %refusal, "refused a request");
            answer::error(refusal.status(), &refusal.to_string())
        }
    }
}

async fn forward(
    container: &Arc<Container>,
    events: &Events,
    mut request: Request<Incoming>,
) -> Result<Response<AnswerBody>, Refusal> {
    let upgrade = hyper::upgrade::on(&mut request);
    let (parts, body) = request.into_parts();
    let asked = request::read(&parts)?;
    let (connections, grant) = container.granted()?;
    let outgoing = with_key(&asked, container, &grant)?;

    let answered = async {
        if asked.is_websocket {
            return websocket::open(container, &grant, &connections, outgoing, upgrade).await;
        }
        let answered = send(&connections, outgoing, body, container).await?;
        Ok(of_the_api(answered, &asked, container, &grant, events))
    };
    tokio::select! {
        answered = answered => Ok(answered.unwrap_or_else(|error| unreachable_api(&asked, error))),
        () = grant.over().cancelled() => Err(Refusal::Over),
    }
}

/// The request to the API, with the key of the run that has the container.
fn with_key(
    asked: &Asked,
    container: &Container,
    grant: &Grant,
) -> Result<reqwest::Request, Refusal> {
    let provider = asked.api.provider;
    let (name, key) = grant.credential(provider).ok_or(Refusal::NoKey(provider))?;
    let url = format!("{}{}", container.upstreams.base_url(asked.api), asked.path);
    let url = url.parse().map_err(|_| Refusal::Path {
        provider,
        path: asked.path.clone(),
    })?;
    let mut outgoing = reqwest::Request::new(asked.method.clone(), url);
    *outgoing.headers_mut() = asked.headers.clone();
    outgoing.headers_mut().insert(name, key.clone());
    Ok(outgoing)
}

async fn send(
    connections: &Connections,
    mut outgoing: reqwest::Request,
    body: Incoming,
    container: &Container,
) -> reqwest::Result<reqwest::Response> {
    if !body.is_end_stream() {
        let body = Paced::new(body, container.upload.clone());
        *outgoing.body_mut() = Some(reqwest::Body::wrap(body));
    }
    connections.requests.execute(outgoing).await
}

/// The API's answer, for the container.
fn of_the_api(
    answered: reqwest::Response,
    asked: &Asked,
    container: &Container,
    grant: &Grant,
    events: &Events,
) -> Response<AnswerBody> {
    let status = answered.status();
    let provider = asked.api.provider;
    if status.is_redirection() {
        let message =
            format!("{provider} answered with a redirect ({status}), which is not followed");
        return answer::error(StatusCode::BAD_GATEWAY, &message);
    }
    if status.is_client_error() || status.is_server_error() {
        events.answered(container, grant, provider, status);
    }
    let (mut parts, body) = Response::<reqwest::Body>::from(answered).into_parts();
    parts.headers = answer::headers(&parts.headers);
    parts.version = http::Version::HTTP_11;
    if [StatusCode::UNAUTHORIZED, StatusCode::FORBIDDEN].contains(&status) {
        answer::do_not_retry(&mut parts.headers);
    }
    let body = Paced::new(body, container.download.clone());
    Response::from_parts(parts, OfRun::new(body, grant).boxed_unsync())
}

fn unreachable_api(asked: &Asked, error: reqwest::Error) -> Response<AnswerBody> {
    let provider = asked.api.provider;
    let reason = polydev_proto::error::chain(&error.without_url());
    tracing::warn!(%provider, reason, "cannot reach an API");
    let message = format!("cannot reach the API of {provider}: {reason}");
    answer::error(StatusCode::BAD_GATEWAY, &message)
}
