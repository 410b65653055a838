//! Keeps the rules of the slots' bridge in force. Other programs may remove them at any time.
//!
//! Then they are set again. Where that takes long or fails, no slot with a network interface is
//! idle or gets a run, within a second of the change. If they cannot be set, the bridge is down:
//! running runs have no network.
//!
//! The rules let containers reach the node's name servers, which may change too.

use std::{pin::pin, sync::Arc, time::Duration};

use tokio::{
    sync::Mutex,
    time::{Instant, MissedTickBehavior, interval, timeout},
};

use crate::{
    firewall::{Error, Firewall, Guard, Rules},
    netlink,
    site::Site,
    state::files,
};

/// How often the rules are looked at while a slot needs them.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// The same while none does.
const UNUSED_INTERVAL: Duration = Duration::from_secs(30);
/// Time to set them again without a word to the slots. Docker puts its own rules before ours
/// whenever it makes a network.
const CLOSE_AFTER: Duration = Duration::from_millis(200);

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
        names: std::fs::read_to_string(&site.resolv_conf).unwrap_or_default(),
        site,
        firewall,
        interface,
        known: None,
        is_stale: false,
        looked: Instant::now(),
    };
    let mut ticks = interval(LOOK_INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let names = keeper.new_names();
        let is_fresh = keeper.known.is_some() && keeper.looked.elapsed() < UNUSED_INTERVAL;
        if is_fresh && names.is_none() && !is_needed() {
            continue;
        }
        // The driver removes them only when it leaves.
        let wanted = wanted.lock().await;
        if !*wanted {
            return;
        }
        if let Some(names) = &names {
            keeper.firewall.follow(names);
            keeper.is_stale = true;
        }
        keeper.look().await;
        // Containers should know a server only once they reach it.
        if let Some(names) = names {
            keeper.rename(names);
        }
    }
}

struct Keeper {
    /// The containers' resolv.conf.
    names: String,
    site: Arc<Site>,
    firewall: Firewall,
    interface: String,
    /// The rules when they were last set. `None` while they are not in force.
    known: Option<Rules>,
    /// Whether other rules are wanted than those that were set.
    is_stale: bool,
    looked: Instant,
}

impl Keeper {
    /// The node's name servers, if they are other ones.
    fn new_names(&self) -> Option<String> {
        let now = files::resolv_conf();
        (now != self.names).then_some(now)
    }

    /// Tells containers the new name servers.
    fn rename(&mut self, names: String) {
        if let Err(error) = files::write_resolv_conf(&self.site.resolv_conf, &names) {
            tracing::warn!(
                error = crate::chain(&error),
                "cannot tell the new name servers"
            );
            return;
        }
        tracing::info!("containers have the node's new name servers");
        self.names = names;
    }

    async fn look(&mut self) {
        self.looked = Instant::now();
        let changed = match self.known.take() {
            None => None,
            Some(known) => match self.firewall.look().await {
                Ok(now) if now == known => {
                    self.known = Some(known);
                    if !self.is_stale {
                        return;
                    }
                    None
                }
                Ok(_) => Some("another program has changed them".to_owned()),
                Err(error) => Some(crate::chain(&error)),
            },
        };
        match self.set(changed).await {
            Ok(rules) => {
                self.known = Some(rules);
                self.is_stale = false;
                self.link(true);
                self.is(Guard::Open);
            }
            Err(error) => {
                self.known = None;
                // A busy machine says nothing about the rules: what runs keeps its network.
                if !matches!(error, Error::TimedOut { .. }) {
                    self.link(false);
                }
                let reason = crate::chain(&error);
                self.is(Guard::Closed { reason });
            }
        }
    }

    /// Sets the rules. If this takes long, nothing may begin until they are set.
    async fn set(&self, changed: Option<String>) -> Result<Rules, Error> {
        let mut set = pin!(self.firewall.set());
        let Some(reason) = changed else {
            return set.await;
        };
        tracing::warn!(reason, "the rules of the slots' bridge are not in force");
        match timeout(CLOSE_AFTER, &mut set).await {
            Ok(set) => set,
            Err(_) => {
                self.is(Guard::Closed { reason });
                set.await
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
