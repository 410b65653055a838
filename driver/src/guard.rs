//! Keeps the rules of the slots' bridge in force. Other programs may remove them at any time.
//!
//! While they are not in force, no slot with a network interface is idle or gets a run, within a
//! second. If they cannot be set, the bridge is down: runs that go on have no network.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::Mutex,
    time::{Instant, MissedTickBehavior, interval},
};

use crate::{
    firewall::{Error, Firewall, Guard, Rules},
    netlink,
    site::Site,
};

/// How often the rules are looked at while a slot needs them.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// The same while none does.
const UNUSED_INTERVAL: Duration = Duration::from_secs(30);
/// How long a busy machine may take to say how the rules are.
const BUSY_TIMEOUT: Duration = Duration::from_secs(3);

/// Sets the rules and keeps them, until they are no longer `wanted`.
pub(crate) async fn keep(
    site: Arc<Site>,
    firewall: Firewall,
    interface: String,
    wanted: Arc<Mutex<bool>>,
    is_needed: impl Fn() -> bool,
) {
    // There is a bridge then.
    if site
        .ready
        .subscribe()
        .wait_for(|ready| *ready)
        .await
        .is_err()
    {
        return;
    }
    let mut keeper = Keeper {
        site,
        firewall,
        interface,
        known: None,
        looked: Instant::now(),
        answered: Instant::now(),
    };
    let mut ticks = interval(LOOK_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let is_fresh = keeper.known.is_some() && keeper.looked.elapsed() < UNUSED_INTERVAL;
        if is_fresh && !is_needed() {
            continue;
        }
        // The driver removes them only when it leaves.
        let wanted = wanted.lock().await;
        if !*wanted {
            return;
        }
        keeper.look().await;
    }
}

struct Keeper {
    site: Arc<Site>,
    firewall: Firewall,
    interface: String,
    /// The rules when they were last set. `None` while they are not in force.
    known: Option<Rules>,
    looked: Instant,
    answered: Instant,
}

impl Keeper {
    async fn look(&mut self) {
        self.looked = Instant::now();
        let now = self.firewall.look().await;
        match now {
            Ok(now) if self.known.as_ref() == Some(&now) => {
                self.answered = Instant::now();
                return;
            }
            Err(Error::TimedOut { .. })
                if self.known.is_some() && self.answered.elapsed() < BUSY_TIMEOUT =>
            {
                return;
            }
            _ => {}
        }
        if self.known.take().is_some() {
            let reason = match now {
                Ok(_) => "another program has changed them".to_owned(),
                Err(error) => crate::chain(&error),
            };
            tracing::warn!(reason, "the rules of the slots' bridge are not in force");
            self.is(Guard::Closed { reason });
        }
        match self.firewall.set().await {
            Ok(rules) => {
                self.answered = Instant::now();
                self.known = Some(rules);
                self.link(true);
                self.is(Guard::Open);
            }
            Err(error) => {
                self.link(false);
                let reason = crate::chain(&error);
                self.is(Guard::Closed { reason });
            }
        }
    }

    fn is(&self, now: Guard) {
        self.site.guard.send_if_modified(|guard| {
            let changed = *guard != now;
            if changed {
                tracing::info!(?now, "the rules of the slots' bridge");
                *guard = now;
            }
            changed
        });
    }

    /// Without its bridge, a container reaches nothing.
    fn link(&self, up: bool) {
        if let Err(error) = netlink::set_up(&self.interface, up) {
            tracing::warn!(%error, up, "cannot change the slots' bridge");
        }
    }
}
