//! One request of a container, from the check to the last byte of the API's answer.

use std::{error::Error, sync::Arc};

use http::{Method, Request, Response, StatusCode};
use http_body::Body as _;
use http_body_util::BodyExt;
use hyper::body::Incoming;

use crate::{
    answer::{self, AnswerBody, OfRun},
    attempt,
    container::{Container, Place},
    grant::Grant,
    meter::{Meter, Metered},
    proxy,
    rate::Paced,
    rehearsal,
    request::{self, Asked, Refusal},
    websocket,
};

/// Answers a request of a container. The answer's body follows the API's, piece by piece.
///
/// # Cancel safety
/// Cancelling ends the request to the API.
pub(crate) async fn answer(
    container: &Arc<Container>,
    place: &Place,
    request: Request<Incoming>,
) -> Response<AnswerBody> {
    let refusal = match container.granted() {
        Err(Refusal::NoRun) if container.rehearses() => match rehearsal::answer(request).await {
            Ok(answer) => return answer,
            Err(refusal) => refusal,
        },
        Err(refusal) => refusal,
        Ok(grant) => match forward(container, &grant, place, request).await {
            Ok(answer) => return answer,
            Err(refusal) => {
                if attempt::refused(&grant, &refusal) {
                    container.changed();
                }
                refusal
            }
        },
    };
    // A command may ask as often as it likes, and somebody reads the log.
    tracing::debug!(container = container.name(), %refusal, "refused a request");
    answer::error(refusal.status(), &refusal.to_string())
}

async fn forward(
    container: &Arc<Container>,
    grant: &Arc<Grant>,
    place: &Place,
    mut request: Request<Incoming>,
) -> Result<Response<AnswerBody>, Refusal> {
    let egress = grant.egress.as_ref();
    if let Some(egress) = egress.filter(|_| proxy::is_asked(&request)) {
        return proxy::answer(container, grant, egress, place, request).await;
    }
    let upgrade = hyper::upgrade::on(&mut request);
    let (parts, body) = request.into_parts();
    let asked = request::read(&parts)?;
    let access = grant.access(asked.api.provider)?;
    let outgoing = access.request(&asked)?;
    // On a WebSocket, each message asks.
    if asked.is_charged() {
        container.ask(grant)?;
    }

    let answered = async {
        if asked.is_websocket {
            let client = &access.connections.websockets;
            let place = place.clone();
            let meter = Meter::new(asked.api.provider, container, grant);
            return websocket::open(container, grant, client, outgoing, upgrade, place, meter)
                .await;
        }
        let answered = send(&access.connections.requests, outgoing, body, container).await?;
        Ok(of_the_api(answered, &asked, container, grant))
    };
    tokio::select! {
        answered = answered => Ok(answered.unwrap_or_else(|error| {
            let is_the_apis = !is_the_containers(&error);
            if is_the_apis {
                grant.seen.unreached(asked.api.provider);
                container.changed();
            }
            unreachable_api(&asked, error, is_the_apis)
        })),
        () = grant.over().cancelled() => Err(Refusal::Over),
    }
}

async fn send(
    client: &reqwest::Client,
    mut outgoing: reqwest::Request,
    body: Incoming,
    container: &Container,
) -> reqwest::Result<reqwest::Response> {
    if !body.is_end_stream() {
        let body = Paced::new(body, container.upload.clone());
        *outgoing.body_mut() = Some(reqwest::Body::wrap(body));
    }
    client.execute(outgoing).await
}

/// The API's answer, for the container.
fn of_the_api(
    answered: reqwest::Response,
    asked: &Asked,
    container: &Arc<Container>,
    grant: &Arc<Grant>,
) -> Response<AnswerBody> {
    let status = answered.status();
    let provider = asked.api.provider;
    // 101 would end HTTP here, and nobody has asked for it.
    if status.is_redirection() || status.is_informational() {
        let message = format!("{provider} answered with {status}, which is not followed");
        return answer::error(StatusCode::BAD_GATEWAY, &message);
    }
    // A key may be good for prompts, and still not for a list of models.
    let credential_refused = status == StatusCode::UNAUTHORIZED
        || (status == StatusCode::FORBIDDEN && asked.method == Method::POST);
    let mut meter = Meter::new(provider, container, grant);
    meter.answered(status, credential_refused);
    let (mut parts, body) = Response::<reqwest::Body>::from(answered).into_parts();
    parts.headers = answer::headers(&parts.headers);
    parts.version = http::Version::HTTP_11;
    if credential_refused {
        answer::do_not_retry(&mut parts.headers);
    }
    // Another status has said it all.
    let is_counted = asked.is_charged() && status.is_success();
    let body = Metered::new(body, is_counted.then_some(meter));
    let body = Paced::new(body, container.download.clone());
    Response::from_parts(parts, OfRun::new(body, grant).boxed_unsync())
}

/// Whether the container has broken off its own request.
fn is_the_containers(error: &reqwest::Error) -> bool {
    let mut causes = std::iter::successors(error.source(), |cause| (*cause).source());
    causes.any(|cause| {
        let cause = cause.downcast_ref::<hyper::Error>();
        cause.is_some_and(hyper::Error::is_user)
    })
}

fn unreachable_api(
    asked: &Asked,
    error: reqwest::Error,
    is_the_apis: bool,
) -> Response<AnswerBody> {
    let provider = asked.api.provider;
    let reason = polydev_proto::error::chain(&error.without_url());
    // A container may break off as often as it likes, and somebody reads the log.
    match is_the_apis {
        true => tracing::warn!(%provider, reason, "cannot reach an API"),
        false => tracing::debug!(%provider, reason, "a container broke off its request"),
    }
    let message = format!("cannot reach the API of {provider}: {reason}");
    answer::error(StatusCode::BAD_GATEWAY, &message)
}
