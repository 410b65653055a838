//! Fills a slot: starts a hardened container, connects to its init and opens its limits.

use std::{
    collections::HashMap,
    os::fd::OwnedFd,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use polydev_proto::{
    broker::{self, Open},
    id::Generation,
    init::{self, from_init, hello},
};
use polydev_transport::upstream::Unreadable;
use tokio::time::timeout;

use super::{Slot, Slots, agent, breaker};
use crate::{
    broker::Opened,
    docker::{self, ContainerSpec, Docker},
    identity::{LABEL_GENERATION, LABEL_INSTANCE, LABEL_SLOT, LABEL_START},
    images::{self, Policy, Step, Use, Want},
    limits,
    link::{self, Connection, Greeted, Listener, Occupant},
    process::Held,
    site::Site,
};

const LABEL_PROVIDER: &str = "dev.polydev.provider";

/// Time from the container's start until init waits for a command. With the idle CPU limit
/// it is usually well under a second; a busy node may need many.
const INIT_TIMEOUT: Duration = Duration::from_secs(60);
/// The user of a runtime image that names its user `runtime`.
const RUNTIME_UID: u32 = 1000;

/// Why a slot could not be filled.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("`slot.image` cannot be used")]
    Image(#[from] images::Error),
    #[error(
        "`slot.image`: `{image}` runs as `{user}`; a slot's image must run as `runtime` or a numeric user other than 0"
    )]
    RootImage { image: String, user: String },
    #[error("cannot run a container")]
    Docker(#[from] docker::Error),
    #[error(transparent)]
    InitEnded(#[from] docker::Ended),
    #[error("init was not ready within {} s", INIT_TIMEOUT.as_secs())]
    InitTimedOut,
    #[error("init cannot be used")]
    Link(#[from] link::Error),
    #[error("the container ended as soon as it was ready")]
    Gone(#[source] std::io::Error),
    #[error(transparent)]
    Upstream(#[from] Unreadable),
    #[error("cannot open the container's limits")]
    Limits(#[from] limits::Error),
    #[error(transparent)]
    Agent(#[from] agent::Error),
    #[error("not tried for now: {0}")]
    Open(#[from] breaker::Open),
    #[error("the slot was stopped while it was being filled")]
    Stopped,
}

impl Error {
    /// Whether another attempt may succeed without a change to the job.
    #[must_use]
    pub fn is_recoverable(&self) -> bool {
        match self {
            Self::RootImage { .. } | Self::Stopped => false,
            Self::Image(error) => error.is_recoverable(),
            Self::Docker(_)
            | Self::Open(_)
            | Self::InitEnded(_)
            | Self::InitTimedOut
            | Self::Link(_)
            | Self::Gone(_)
            | Self::Upstream(_)
            | Self::Agent(_)
            | Self::Limits(_) => true,
        }
    }

    /// Whether Docker could not be reached.
    pub(super) fn is_silence(&self) -> bool {
        match self {
            Self::Docker(error) => !error.is_answer(),
            Self::Image(images::Error::Docker(error)) => !error.is_answer(),
            _ => false,
        }
    }

    /// Whether another container of the same image would probably also fail.
    fn is_the_images(&self) -> bool {
        matches!(
            self,
            Self::InitEnded(_) | Self::InitTimedOut | Self::Link(_)
        )
    }
}

/// A slot's container, ready for one run.
#[derive(Debug)]
pub(super) struct Container {
    pub(super) id: String,
    pub(super) connection: Connection,
    pub(super) limits: Arc<limits::Handle>,
    /// The public key of its init, to seal secrets with.
    pub(super) public_key: Bytes,
    /// What init says of its agent. `None` without one.
    pub(super) agent: Option<init::Agent>,
    /// What the broker knows of it.
    pub(super) opened: Opened,
    pub(super) image_id: String,
    /// When it was ready, in this life of the driver.
    pub(super) ready: Instant,
    pub(super) _image: Use,
}

impl Container {
    pub(super) fn occupant(&self) -> Occupant {
        Occupant {
            container: self.id.clone(),
            pid: self.connection.pid,
            pid_start: self.connection.init.start,
            link: self.connection.listener.folder().to_owned(),
        }
    }

    /// Waits until the idle container can no longer be used; returns the reason.
    ///
    /// # Cancel safety
    /// Loses nothing.
    pub(super) async fn dies(&mut self) -> String {
        let link = self.connection.link.as_mut();
        let link = link.expect("a slot is filled with its init connected");
        // A waiting init sends no messages but the end of its agent.
        match link.reader.next().await {
            Ok(from_init::Message::Agent(agent)) => format!("its agent is gone: {}", agent.reason),
            Ok(_) => "init sent an unexpected message".to_owned(),
            Err(error) => crate::chain(&error),
        }
    }
}

/// Makes a slot's container of one generation.
///
/// # Errors
/// [`Error`]; a container may be left, for [`clean`](super::clear::clean).
///
/// # Cancel safety
/// None: do not cancel it.
pub(super) async fn fill(
    slots: &Slots,
    slot: &Slot,
    generation: Generation,
) -> Result<Container, Error> {
    // Only the waits before `make` may be cancelled: Docker would still create a requested
    // container, after nobody looks for it any longer.
    let mut ready = slots.site.ready.subscribe();
    let is_guarded = async {
        drop(ready.wait_for(|ready| *ready).await);
        slot.guarded(&slots.site).await;
    };
    tokio::select! {
        () = is_guarded => {}
        () = slot.drain.cancelled() => return Err(Error::Stopped),
    }
    let (image, held) = tokio::select! {
        image = find_image(&slots.site, slot) => image?,
        () = slot.drain.cancelled() => return Err(Error::Stopped),
    };
    let (reference, image_id) = (&slot.config.image, image.id.clone());
    slots.breakers.check(reference, &image_id, Instant::now())?;
    let _turn = tokio::select! {
        turn = slots.fills.acquire() => turn.expect("it is never closed"),
        () = slot.drain.cancelled() => return Err(Error::Stopped),
    };
    let made = make(&slots.site, slot, generation, image, held).await;
    if let Err(error) = &made
        && error.is_the_images()
    {
        let (reason, now) = (crate::chain(error), Instant::now());
        slots.breakers.failed(reference, &image_id, &reason, now);
    }
    made
}

/// Looks for the image on the node, and pulls it only if missing.
async fn find_image(site: &Site, slot: &Slot) -> Result<(docker::Image, Use), Error> {
    let reference = &slot.config.image;
    let want = Want {
        reference,
        policy: Policy::IfMissing,
        archive: None,
        auth: None,
        auth_soft_fail: false,
        timeout: None,
    };
    let tell = |step: Step| site.events.send(&slot.identity, step.message(reference));
    Ok(site.images.get(&want, tell).await?)
}

async fn make(
    site: &Site,
    slot: &Slot,
    generation: Generation,
    image: docker::Image,
    held: Use,
) -> Result<Container, Error> {
    let (uid, gid) = user_of(&image).ok_or_else(|| Error::RootImage {
        image: slot.config.image.clone(),
        user: image.user.clone(),
    })?;
    let listener = Listener::bind(&site.link_dir)?;

    let nonce = rand::random::<u32>();
    let id = site
        .docker
        .create(&ContainerSpec {
            // No dashed UUID: Nomad's own Docker driver claims containers with such names.
            name: format!("{}-{}-{nonce:08x}", site.name, slot.config.provider),
            image: slot.config.image.clone(),
            labels: HashMap::from([
                (LABEL_INSTANCE.into(), site.instance.clone()),
                (LABEL_SLOT.into(), slot.identity.slot_id().into()),
                (LABEL_PROVIDER.into(), slot.config.provider.to_string()),
                (LABEL_GENERATION.into(), generation.to_string()),
                (LABEL_START.into(), site.start_id.clone()),
            ]),
            init: site.init.clone(),
            link: listener.folder().to_owned(),
            resolv_conf: site.resolv_conf.clone(),
            network: slot.has_network().then(|| site.name.clone()),
            limits: slot.idle,
            uid,
            gid,
        })
        .await?;
    site.docker.start(&id).await?;
    let greeted = greet(&site.docker, &listener, &id).await?;
    let (pid, public_key) = (greeted.pid, greeted.public_key);
    let requests = greeted.requests.ok_or(link::Error::NotListening)?;
    let init = Held::open(pid).map_err(Error::Gone)?;
    let limits = open_limits(slot, pid).await?;
    let mut container = Container {
        opened: open(site, slot, &id, requests)?,
        id,
        connection: Connection {
            listener,
            init,
            pid,
            link: Some(greeted.link),
        },
        limits: Arc::new(limits),
        public_key,
        image_id: image.id,
        agent: None,
        ready: Instant::now(),
        _image: held,
    };
    if slot.config.agent {
        let class = site.config.class(slot.config.provider);
        let Container {
            connection, limits, ..
        } = &mut container;
        container.agent = match agent::park(slot, connection, limits, &class).await {
            // Commands have their container all the same, and prompts start cold.
            Err(agent::Error::Gone(reason)) => {
                let slot_id = slot.identity.slot_id();
                tracing::warn!(%slot_id, reason, "no agent waits in the slot");
                Some(agent::gone(reason))
            }
            Err(agent::Error::Stopped) => return Err(Error::Stopped),
            parked => Some(parked?),
        };
    }
    Ok(container)
}

/// Opens the limits of a container of the slot.
pub(super) async fn open_limits(slot: &Slot, pid: u32) -> Result<limits::Handle, limits::Error> {
    let (idle, has_network) = (slot.idle, slot.has_network());
    let open = move || match has_network {
        true => {
            let limits = limits::Handle::open(pid, &idle)?;
            limits.isolate()?;
            Ok(limits)
        }
        // Its traffic is the broker's, which has the rate.
        false => limits::Handle::open_shaped(pid, None),
    };
    let opened = tokio::task::spawn_blocking(open).await;
    opened.expect("opening limits does not panic")
}

/// Lets the broker serve the requests of a container, which come from `requests`.
pub(super) fn open(
    site: &Site,
    slot: &Slot,
    container: &str,
    requests: OwnedFd,
) -> Result<Opened, Unreadable> {
    let vendor = slot.config.provider.vendor().ok();
    let upstream = slot.config.upstream.as_ref().zip(vendor);
    let upstream = upstream.map(|(upstream, vendor)| upstream.read(vendor));
    let allow = slot.config.egress.listed().map(<[String]>::to_vec);
    let open = Open {
        container: container.to_owned(),
        bytes_per_second: slot.idle.bytes_per_second(),
        upstreams: upstream.transpose()?.into_iter().collect(),
        egress: allow.map(|allow| broker::Egress { allow }),
        grant: None,
        rehearses: slot.config.agent,
    };
    Ok(site.broker.open(open, requests))
}

async fn greet(docker: &Docker, listener: &Listener, id: &str) -> Result<Greeted, Error> {
    let state = docker.state(id).await?;
    if state.pid == 0 {
        return Err(docker.end(id, &state).await.into());
    }
    let accept = timeout(INIT_TIMEOUT, listener.accept(|pid| pid == state.pid));
    tokio::select! {
        accepted = accept => match accepted {
            Ok(Ok(greeted)) if matches!(greeted.state, hello::State::Waiting(_)) => Ok(greeted),
            Ok(Ok(_)) => Err(link::Error::NotWaiting.into()),
            Ok(Err(error)) => Err(error.into()),
            Err(_) => Err(Error::InitTimedOut),
        },
        ended = docker.ended(id) => Err(ended?.into()),
    }
}

/// Owner of the home folder; `None` for root and for unknown names.
fn user_of(image: &docker::Image) -> Option<(u32, u32)> {
    let (user, group) = image.user.split_once(':').unwrap_or((&image.user, ""));
    let uid = match user.parse() {
        Ok(uid) => uid,
        Err(_) if user == "runtime" => RUNTIME_UID,
        // Only the image knows which user a name stands for.
        Err(_) => 0,
    };
    (uid != 0).then(|| (uid, group.parse().unwrap_or(uid)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_never_runs_as_root() {
        let user = |user: &str| {
            user_of(&docker::Image {
                user: user.into(),
                ..Default::default()
            })
        };
        assert_eq!(user("1000:1000"), Some((1000, 1000)));
        assert_eq!(user("1001"), Some((1001, 1001)));
        assert_eq!(user("runtime"), Some((1000, 1000)));
        for root in ["", "root", "0", "0:1000", "root:root", "www-data"] {
            assert_eq!(user(root), None, "{root}");
        }
    }
}
