//! Places for connections whose callers have not shown yet who they are.
//!
//! There is always a place for the next one. If there are too many in all, or of one peer, the
//! oldest of the peer that has most gives up its place: who opens many takes them from itself.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, Ipv4Addr},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use parking_lot::Mutex;
use tokio::sync::oneshot;

/// The other end of a connection, as far as one attacker can have it: an address, or the network
/// of which a machine can choose its addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Peer {
    V4(Ipv4Addr),
    /// The first half of an address.
    V6([u16; 4]),
}

impl Peer {
    #[must_use]
    pub fn of(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(address) => Self::V4(address),
            IpAddr::V6(address) => {
                let [a, b, c, d, ..] = address.segments();
                Self::V6([a, b, c, d])
            }
        }
    }
}

/// The places of one listener.
#[derive(Debug)]
pub struct Places {
    taken: Mutex<Taken>,
    most: usize,
    most_of_peer: usize,
}

#[derive(Debug, Default)]
struct Taken {
    next: u64,
    count: usize,
    of_peers: HashMap<Peer, Held>,
    /// The peers by how many they have, and those with as many by how old the oldest is.
    weights: BTreeSet<(usize, Reverse<u64>, Peer)>,
}

/// The places of a peer, in the order in which they came.
type Held = BTreeMap<u64, oneshot::Sender<()>>;

/// A place. Dropping it leaves it.
#[derive(Debug)]
pub struct Place {
    places: Arc<Places>,
    peer: Peer,
    number: u64,
    given_up: oneshot::Receiver<()>,
}

impl Places {
    /// At most so many in all, and of one peer.
    #[must_use]
    pub fn new(most: usize, most_of_peer: usize) -> Arc<Self> {
        Arc::new(Self {
            taken: Mutex::default(),
            most,
            most_of_peer,
        })
    }

    /// A place for the next connection of the peer.
    #[must_use]
    pub fn enter(self: &Arc<Self>, peer: Peer) -> Place {
        let mut taken = self.taken.lock();
        let of_peer = taken.of_peers.get(&peer).map_or(0, BTreeMap::len);
        if of_peer >= self.most_of_peer {
            taken.end_oldest(peer);
        } else if taken.count >= self.most
            && let Some((_, _, heaviest)) = taken.weights.last().copied()
        {
            taken.end_oldest(heaviest);
        }
        let number = taken.next;
        taken.next += 1;
        let (ends, given_up) = oneshot::channel();
        taken.change(peer, |places| {
            places.insert(number, ends);
        });
        Place {
            places: self.clone(),
            peer,
            number,
            given_up,
        }
    }

    #[cfg(test)]
    fn count(&self) -> usize {
        self.taken.lock().count
    }
}

impl Taken {
    fn end_oldest(&mut self, peer: Peer) {
        self.change(peer, |places| {
            places.pop_first();
        });
        tracing::debug!(
            ?peer,
            "too many callers are unknown: the oldest of a peer is given up"
        );
    }

    /// Changes the places of a peer.
    fn change(&mut self, peer: Peer, change: impl FnOnce(&mut Held)) {
        let weight = |held: &Held| {
            let oldest = held.first_key_value().map(|(number, _)| *number)?;
            Some((held.len(), Reverse(oldest), peer))
        };
        let held = self.of_peers.entry(peer).or_default();
        if let Some(before) = weight(held) {
            self.weights.remove(&before);
            self.count -= held.len();
        }
        change(held);
        match weight(held) {
            Some(now) => {
                self.weights.insert(now);
                self.count += held.len();
            }
            None => {
                self.of_peers.remove(&peer);
            }
        }
    }
}

impl Place {
    /// Waits until the place is another connection's.
    ///
    /// # Cancel safety
    /// Loses nothing.
    pub async fn given_up(&mut self) {
        std::future::poll_fn(|context| self.poll_given_up(context)).await;
    }

    /// As [`Place::given_up`].
    pub fn poll_given_up(&mut self, context: &mut Context) -> Poll<()> {
        // Nothing is ever sent: the other half is dropped.
        Pin::new(&mut self.given_up).poll(context).map(drop)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.taken.lock().change(self.peer, |places| {
            places.remove(&self.number);
        });
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn peer(number: u8) -> Peer {
        Peer::of(IpAddr::from([10, 0, 0, number]))
    }

    fn has_given_up(place: &mut Place) -> bool {
        let mut context = Context::from_waker(std::task::Waker::noop());
        place.poll_given_up(&mut context).is_ready()
    }

    #[test]
    fn a_machine_is_one_peer_whatever_address_of_its_network_it_uses() {
        let of = |address: &str| Peer::of(address.parse().unwrap());
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:1"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
        assert_eq!(of("::ffff:10.0.0.1"), peer(1));
    }

    #[test]
    fn who_has_most_loses_the_oldest() {
        let places = Places::new(4, 3);
        let mut one = places.enter(peer(1));
        let mut many: Vec<_> = (0..3).map(|_| places.enter(peer(2))).collect();
        // It has as many as it may have.
        many.push(places.enter(peer(2)));
        let gone: Vec<_> = many.iter_mut().map(has_given_up).collect();
        assert_eq!(gone, [true, false, false, false]);
        // There are as many as there may be.
        let mut another = places.enter(peer(3));
        assert!(has_given_up(&mut many[1]) && !has_given_up(&mut many[2]));
        assert!(!has_given_up(&mut one) && !has_given_up(&mut another));
        drop((one, many, another));
        assert_eq!(places.count(), 0);
    }

    proptest! {
        #[test]
        fn there_are_never_more_than_allowed_and_a_lonely_peer_keeps_its_place(
            steps in prop::collection::vec((1u8..6, any::<bool>()), 1..200),
        ) {
            let places = Places::new(8, 4);
            let mut lonely = places.enter(peer(0));
            let mut held = Vec::new();
            for (number, enters) in steps {
                match enters {
                    true => held.push(places.enter(peer(number))),
                    false => drop(held.pop()),
                }
                let taken = places.taken.lock();
                prop_assert!(taken.count <= 8);
                prop_assert!(taken.of_peers.values().all(|places| places.len() <= 4));
                let sum: usize = taken.of_peers.values().map(BTreeMap::len).sum();
                prop_assert_eq!((sum, taken.weights.len()), (taken.count, taken.of_peers.len()));
            }
            // When there are too many, one of the five others has two.
            prop_assert!(!has_given_up(&mut lonely));
        }
    }
}
