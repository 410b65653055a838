//! The record of idle containers, which the next life of the driver may take over.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use parking_lot::{Mutex, MutexGuard};
use polydev_proto::id::{Generation, SlotId};

use super::Slot;
use crate::{
    config::Egress,
    limits::Limits,
    link::Occupant,
    process::Held,
    site::Site,
    state::{files, records::Records},
};

/// How long Nomad may take after the driver's start to ask for a slot. Afterwards the
/// reaper removes the slot's container.
const ASK_TIMEOUT: Duration = Duration::from_secs(60);

/// An idle container, as recorded for the next life of the driver.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Idle {
    pub slot_id: SlotId,
    pub generation: Generation,
    pub occupant: Occupant,
    pub image: String,
    pub image_id: String,
    /// How the container was made; it is not taken over if it would be made differently now.
    pub made: Made,
}

/// What determines how a slot's container is made, apart from its image.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Made {
    /// The driver's version.
    pub version: String,
    /// Named after its content.
    pub init: PathBuf,
    /// The text of the file, which the container keeps.
    pub resolv_conf: String,
    pub limits: Limits,
    /// What it may reach.
    #[serde(default)] // The record may have been written before the option existed.
    pub egress: Egress,
    /// Whether an agent waits in it.
    #[serde(default)] // As before.
    pub agent: bool,
}

impl Made {
    pub(super) fn by(site: &Site, slot: &Slot) -> Self {
        Self {
            version: env!("CARGO_PKG_VERSION").into(),
            init: site.init.clone(),
            resolv_conf: std::fs::read_to_string(&site.resolv_conf).unwrap_or_default(),
            limits: slot.idle,
            egress: slot.config.egress.clone(),
            agent: slot.config.agent,
        }
    }
}

impl Idle {
    /// Ends a container that cannot be used. Docker's part of it stays, for
    /// [`clean`](super::clear::clean) or the reaper.
    pub(super) fn discard(&self) {
        let Occupant {
            pid,
            pid_start,
            link,
            ..
        } = &self.occupant;
        if let Some(init) = Held::find(*pid, *pid_start) {
            init.kill();
        }
        let _gone_already = std::fs::remove_dir_all(link);
    }
}

/// The records, by slot.
#[derive(Debug)]
pub struct Shelf {
    records: Records<Idle>,
    left: Mutex<HashMap<SlotId, Left>>,
    opened: Instant,
}

/// What an earlier life of the driver left in a slot.
#[derive(Debug)]
struct Left {
    idle: Idle,
    /// Nomad has asked for the slot.
    asked: bool,
}

impl Shelf {
    /// Reads what an earlier life of the driver left, and drops records of ended
    /// containers.
    ///
    /// # Errors
    /// [`files::Error`] if the folder cannot be made.
    pub fn open(state_dir: &Path) -> Result<Self, files::Error> {
        let records = Records::open(state_dir.join("idle"))?;
        let mut left = HashMap::new();
        for found in records.read() {
            let idle: Idle = found.record;
            let Occupant { pid, pid_start, .. } = idle.occupant;
            if Held::find(pid, pid_start).is_some() {
                let asked = false;
                left.insert(idle.slot_id.clone(), Left { idle, asked });
            } else {
                records.remove(&name(&idle.slot_id));
            }
        }
        Ok(Self {
            records,
            left: left.into(),
            opened: Instant::now(),
        })
    }

    /// The folders of their sockets, which are in use.
    pub fn links(&self) -> Vec<PathBuf> {
        let left = self.left();
        let links = left.values().map(|left| left.idle.occupant.link.clone());
        links.collect()
    }

    /// Whether the container may still be taken over.
    #[must_use]
    pub fn holds(&self, container: &str) -> bool {
        let left = self.left();
        left.values().any(|left| {
            left.idle.occupant.container == container
                && (left.asked || self.opened.elapsed() < ASK_TIMEOUT)
        })
    }

    /// Nobody asked for the container: removes everything of it except Docker's part.
    pub(crate) fn give_up(&self, container: &str) {
        let mut left = self.left();
        let mut unasked = left.values().filter(|left| !left.asked);
        let found = unasked.find(|left| left.idle.occupant.container == container);
        if let Some(slot_id) = found.map(|left| left.idle.slot_id.clone())
            && let Some(Left { idle, .. }) = left.remove(&slot_id)
        {
            self.records.remove(&name(&slot_id));
            idle.discard();
        }
    }

    /// What an earlier life of the driver left in the slot that Nomad asks for.
    pub(super) fn ask(&self, slot_id: &SlotId) -> Option<Idle> {
        let mut left = self.left();
        let left = left.get_mut(slot_id)?;
        left.asked = true;
        Some(left.idle.clone())
    }

    /// Records a slot's container in place of the previous one. If that fails, the next
    /// life of the driver makes a new one.
    pub(super) fn put(&self, idle: &Idle) {
        self.left().remove(&idle.slot_id);
        if let Err(error) = self.records.write(&name(&idle.slot_id), idle) {
            let (slot, error) = (&idle.slot_id, crate::chain(&error));
            tracing::warn!(%slot, error, "cannot record an idle container");
        }
    }

    /// Removes the record, because a run has the container or it has ended.
    pub(crate) fn forget(&self, slot_id: &SlotId) {
        self.left().remove(slot_id);
        self.records.remove(&name(slot_id));
    }

    fn left(&self) -> MutexGuard<'_, HashMap<SlotId, Left>> {
        self.left.lock()
    }
}

fn name(slot_id: &SlotId) -> String {
    slot_id.as_str().replace('/', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn idle(slot_id: &str, pid: u32, pid_start: u64) -> Idle {
        Idle {
            slot_id: slot_id.into(),
            generation: Generation(3),
            occupant: Occupant {
                container: format!("container of {slot_id}"),
                pid,
                pid_start,
                link: "/state/link/1".into(),
            },
            image: "image:1".into(),
            image_id: "sha256:1".into(),
            made: Made {
                version: "1".into(),
                init: "/state/init-1".into(),
                resolv_conf: "nameserver 192.0.2.1\n".into(),
                limits: Limits::IDLE,
                egress: Egress::default(),
                agent: false,
            },
        }
    }

    #[tokio::test]
    async fn what_lives_is_found_after_a_restart_until_it_is_settled() {
        let folder = tempfile::tempdir().unwrap();
        let own = Held::open(std::process::id()).unwrap();
        let (lives, ended) = (
            idle("node/lives", std::process::id(), own.start),
            idle("node/ended", std::process::id(), own.start + 1),
        );
        let shelf = Shelf::open(folder.path()).unwrap();
        shelf.put(&lives);
        shelf.put(&ended);
        assert!(!shelf.holds(&lives.occupant.container), "it is this life's");

        let shelf = Shelf::open(folder.path()).unwrap();
        assert_eq!(shelf.ask(&"node/ended".into()), None);
        assert!(shelf.holds(&lives.occupant.container));
        assert_eq!(shelf.links(), ["/state/link/1"].map(PathBuf::from));
        assert_eq!(shelf.ask(&"node/lives".into()), Some(lives.clone()));
        shelf.give_up(&lives.occupant.container);
        assert!(
            shelf.holds(&lives.occupant.container),
            "Nomad has asked for it"
        );
        shelf.put(&lives);
        assert!(!shelf.holds(&lives.occupant.container), "it is this life's");

        let shelf = Shelf::open(folder.path()).unwrap();
        assert_eq!(shelf.ask(&"node/lives".into()), Some(lives));
        shelf.forget(&"node/lives".into());
        assert!(shelf.links().is_empty());
        let shelf = Shelf::open(folder.path()).unwrap();
        assert_eq!(shelf.ask(&"node/lives".into()), None);
    }

    #[tokio::test]
    async fn what_nobody_asks_for_is_ended_with_its_record_and_its_folder() {
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join("link");
        std::fs::create_dir(&link).unwrap();
        let mut process = std::process::Command::new("sleep");
        let mut process = process.arg("1000").spawn().unwrap();
        let held = Held::open(process.id()).unwrap();
        let mut left = idle("node/left", process.id(), held.start);
        left.occupant.link = link.clone();
        Shelf::open(folder.path()).unwrap().put(&left);

        let shelf = Shelf::open(folder.path()).unwrap();
        shelf.give_up(&left.occupant.container);
        process.wait().unwrap();
        assert!(!link.exists());
        assert_eq!(shelf.ask(&"node/left".into()), None);
        let shelf = Shelf::open(folder.path()).unwrap();
        assert_eq!(shelf.ask(&"node/left".into()), None);
    }
}
