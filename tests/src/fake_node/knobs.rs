//! Makes a node misbehave.

use std::{
    io,
    net::Shutdown,
    os::{fd::AsFd, unix::net::UnixStream as Connection},
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use tokio::{net::UnixStream, sync::watch};
use tonic::Status;

use super::lock;

/// The effect of a claim that gets no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// The run is in its slot.
    Taken,
    /// The node has never seen the claim.
    NotTaken,
}

pub(super) struct Knobs {
    /// Whether the node keeps connections, so that it can break them.
    keeps: bool,
    stalled: watch::Sender<bool>,
    away: AtomicBool,
    refusal: Mutex<Option<Status>>,
    loss: Mutex<Option<Loss>>,
    connections: Mutex<Vec<Connection>>,
}

impl Knobs {
    pub(super) fn new(keeps: bool) -> Self {
        Self {
            keeps,
            stalled: watch::Sender::new(false),
            away: AtomicBool::new(false),
            refusal: Mutex::default(),
            loss: Mutex::default(),
            connections: Mutex::default(),
        }
    }

    /// An incoming connection; `None` if the node is away.
    pub(super) fn accept(&self, stream: io::Result<UnixStream>) -> Option<io::Result<UnixStream>> {
        if self.away.load(Ordering::SeqCst) {
            return None;
        }
        Some(stream.and_then(|stream| {
            if self.keeps {
                let copy = stream.as_fd().try_clone_to_owned()?;
                lock(&self.connections).push(Connection::from(copy));
            }
            Ok(stream)
        }))
    }

    pub(super) fn break_connections(&self) {
        for connection in lock(&self.connections).drain(..) {
            let _broken_already = connection.shutdown(Shutdown::Both);
        }
    }

    pub(super) fn leave(&self) {
        self.away.store(true, Ordering::SeqCst);
        self.break_connections();
    }

    pub(super) fn stall(&self, stalled: bool) {
        self.stalled.send_replace(stalled);
    }

    pub(super) fn refuse(&self, refusal: Option<Status>) {
        *lock(&self.refusal) = refusal;
    }

    pub(super) fn lose(&self, loss: Loss) {
        *lock(&self.loss) = Some(loss);
    }

    pub(super) fn obey(&self) {
        self.refuse(None);
        self.stall(false);
        self.away.store(false, Ordering::SeqCst);
    }

    /// Waits until the node answers requests.
    pub(super) async fn answers(&self) {
        let mut stalled = self.stalled.subscribe();
        // The channel stays open: `self` has the sender.
        drop(stalled.wait_for(|stalled| !*stalled).await);
    }

    /// # Errors
    /// The status that the node refuses with.
    pub(super) fn refusal(&self) -> Result<(), Status> {
        match &*lock(&self.refusal) {
            Some(status) => Err(status.clone()),
            None => Ok(()),
        }
    }

    /// The effect of the claim that has just arrived.
    pub(super) fn loss(&self) -> Option<Loss> {
        lock(&self.loss).take()
    }
}
