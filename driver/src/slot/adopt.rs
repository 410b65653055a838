//! Idle containers across restarts of the driver. [`keep`] records each container before
//! it is offered. After a restart the containers still wait, and [`adopt`] takes them over
//! without asking Docker.
//!
//! A container that was ever granted to a run is not taken over, even if the run never
//! reached it.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use polydev_proto::init::hello;
use polydev_transport::upstream::Unreadable;
use tokio::time::timeout;

use super::{
    Slot, Slots, agent,
    fill::{Container, open, open_limits},
    shelf::{Idle, Made},
};
use crate::{
    limits,
    link::{self, Connection, Greeted, Listener},
    process::Held,
};

/// Init tries to reconnect several times a second.
const RETURN_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a container is not taken over. The slot makes a new one.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("it differs from one that would be made now")]
    Other,
    #[error("it has ended")]
    Ended,
    #[error("init cannot be used")]
    Link(#[from] link::Error),
    #[error("init did not reconnect within {} s", RETURN_TIMEOUT.as_secs())]
    Away,
    #[error("its agent is not ready")]
    NoAgent,
    #[error(transparent)]
    Upstream(#[from] Unreadable),
    #[error("cannot open the container's limits")]
    Limits(#[from] limits::Error),
}

/// Ensures that the next life of the driver can take over the slot's container.
pub(super) fn keep(slots: &Slots, slot: &Slot, container: &mut Container) {
    container.connection.listener.keep();
    slots.idle.put(&Idle {
        slot_id: slot.identity.slot_id(),
        generation: slot.life().generation(),
        occupant: container.occupant(),
        image: slot.config.image.clone(),
        image_id: container.image_id.clone(),
        made: Made::by(&slots.site, slot),
    });
}

/// Takes over the slot's container if it matches one that would be made now. Otherwise ends
/// it and returns `None`.
///
/// # Cancel safety
/// None: do not cancel it.
pub(super) async fn adopt(slots: &Slots, slot: &Slot, idle: Idle) -> Option<Container> {
    let slot_id = slot.identity.slot_id();
    let container = &idle.occupant.container;
    match take_up(slots, slot, &idle).await {
        Ok(adopted) => {
            tracing::info!(slot = %slot_id, container, "taking over an idle container");
            Some(adopted)
        }
        Err(error) => {
            let error = crate::chain(&error);
            tracing::info!(
                slot = %slot_id,
                container,
                error,
                "not taking over an idle container"
            );
            slots.idle.forget(&slot_id);
            idle.discard();
            None
        }
    }
}

async fn take_up(slots: &Slots, slot: &Slot, idle: &Idle) -> Result<Container, Error> {
    let Idle {
        occupant,
        image,
        image_id,
        made,
        ..
    } = idle;
    if *made != Made::by(&slots.site, slot) || *image != slot.config.image {
        return Err(Error::Other);
    }
    let pid = occupant.pid;
    let init = Held::find(pid, occupant.pid_start).ok_or(Error::Ended)?;
    let mut listener = Listener::bind_again(&occupant.link)?;
    let accept = timeout(RETURN_TIMEOUT, listener.accept(|peer| peer == pid));
    let (link, public_key, agent, requests) = tokio::select! {
        biased;
        () = init.ended() => return Err(Error::Ended),
        accepted = accept => match accepted.map_err(|_| Error::Away)?? {
            Greeted { state: hello::State::Waiting(waiting), link, public_key, requests, .. } => {
                if slot.config.agent && !agent::is_ready(waiting.agent.as_ref()) {
                    return Err(Error::NoAgent);
                }
                let requests = requests.ok_or(link::Error::NotListening)?;
                (link, public_key, waiting.agent, requests)
            }
            Greeted { .. } => return Err(link::Error::NotWaiting.into()),
        },
    };
    let limits = open_limits(slot, pid).await?;
    // Until it is kept again.
    listener.let_go();
    let opened = open(&slots.site, slot, &occupant.container, requests)?;
    Ok(Container {
        opened,
        id: occupant.container.clone(),
        connection: Connection {
            listener,
            init,
            pid,
            link: Some(link),
        },
        limits: Arc::new(limits),
        public_key,
        agent,
        image_id: image_id.clone(),
        ready: Instant::now(),
        _image: slots.site.images.hold(image),
    })
}
