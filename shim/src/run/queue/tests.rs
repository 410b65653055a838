//! Turns, limits and eviction.

use super::*;
use proptest::prelude::*;

fn enter(queue: &Queue, provider: &'static str, user_id: &str) -> Result<Ticket, Full> {
    queue.enter(provider, &user_id.into(), Wants::Run(RunId::now()), false)
}

fn queue(running: Option<u32>, queued: u32) -> Queue {
    let per_user = PerUser {
        running,
        leases: 2,
        queued,
    };
    Queue::new(per_user, View::new())
}

fn place(ticket: &Ticket) -> Place {
    *ticket.place.borrow()
}

#[test]
fn users_take_turns_however_many_runs_each_brings() {
    let queue = queue(None, 10);
    let many: Vec<Ticket> = (0..3)
        .map(|_| enter(&queue, "openai", "alice").unwrap())
        .collect();
    let one = enter(&queue, "openai", "bob").unwrap();
    let other = enter(&queue, "google", "carol").unwrap();
    assert_eq!(place(&many[0]), Place::Next);
    assert_eq!(place(&one), Place::Behind(1));
    assert_eq!(place(&many[1]), Place::Behind(2));
    assert_eq!(place(&other), Place::Next, "each provider has its own");

    let mut many = many.into_iter();
    let running = many.next().unwrap().served();
    assert_eq!(place(&one), Place::Next, "alice has a run, bob has none");
    let bobs = one.served();
    let second = many.next().unwrap();
    assert_eq!(place(&second), Place::Next);
    drop(running);
    drop(bobs);
    assert_eq!(place(&second), Place::Next);
}

#[test]
fn a_run_with_a_lease_passes_a_full_queue_and_counts() {
    let queue = queue(Some(1), 1);
    let waits = enter(&queue, "openai", "alice").unwrap();
    enter(&queue, "openai", "alice").unwrap_err();
    assert_eq!(place(&waits), Place::Next);
    let running = queue.pass("openai", &"alice".into(), RunId::now());
    assert_eq!(place(&waits), Place::Held(0));
    drop(running);
    assert_eq!(place(&waits), Place::Next);
}

#[test]
fn a_user_at_the_limit_waits_and_holds_nobody_up() {
    let queue = queue(Some(1), 2);
    let running = enter(&queue, "openai", "alice").unwrap().served();
    let waits = enter(&queue, "openai", "alice").unwrap();
    let _third = enter(&queue, "openai", "alice").unwrap();
    assert_eq!(place(&waits), Place::Held(0));
    let refused = enter(&queue, "openai", "alice").unwrap_err().to_string();
    assert_eq!(
        refused,
        "user `alice` has 2 runs waiting already; this shim allows no more"
    );
    let bob = enter(&queue, "openai", "bob").unwrap();
    assert_eq!(place(&bob), Place::Next);
    drop(bob);
    drop(running);
    assert_eq!(place(&waits), Place::Next);
}

#[test]
fn a_run_that_nobody_has_approved_keeps_its_place_and_holds_nobody_up() {
    let queue = queue(Some(1), 1);
    let wants = Wants::Run(RunId::now());
    let waits = queue.enter("openai", &"alice".into(), wants, true).unwrap();
    let own = enter(&queue, "openai", "alice").unwrap();
    assert_eq!(place(&own), Place::Next, "not even her other run");
    drop(own);
    let bob = enter(&queue, "openai", "bob").unwrap();
    assert_eq!(place(&waits), Place::Held(0));
    assert_eq!(place(&bob), Place::Next);
    let carol = enter(&queue, "openai", "carol").unwrap();
    waits.approved();
    assert_eq!(place(&waits), Place::Next, "it came before them");
    assert_eq!(
        (place(&bob), place(&carol)),
        (Place::Behind(1), Place::Behind(2))
    );
}

#[test]
fn leases_are_counted_apart_and_with_runs() {
    let queue = queue(Some(3), 10);
    let alice = UserId::from("alice");
    let lease = || queue.enter("openai", &alice, Wants::Lease, false).unwrap();
    let (one, two) = (lease().served(), lease().served());
    let third = lease();
    assert_eq!(place(&third), Place::Held(0), "two leases are allowed");
    let run = enter(&queue, "openai", "alice").unwrap().served();
    let waits = enter(&queue, "openai", "alice").unwrap();
    assert_eq!(place(&waits), Place::Held(1), "three of all are allowed");
    drop(one);
    assert_eq!(place(&third), Place::Next);
    drop((two, run));
}

#[tokio::test]
async fn one_user_cannot_fill_the_queue() {
    let queue = queue(None, 2000);
    let mut many: Vec<Ticket> = (0..MAX_WAITING)
        .map(|_| enter(&queue, "openai", "alice").unwrap())
        .collect();
    assert_eq!(enter(&queue, "openai", "alice").unwrap_err(), Full::Shim);
    let bob = enter(&queue, "openai", "bob").unwrap();
    assert_eq!(place(&bob), Place::Behind(1));
    let evicted = many.last_mut().unwrap().turn().await.unwrap_err();
    assert!(matches!(evicted, Full::Evicted { .. }), "{evicted}");
    many[0].turn().await.unwrap();
    drop(many.pop());
    assert_eq!(queue.lock().waiting.len(), MAX_WAITING);
}

proptest! {
    /// Whatever runs come, are served, give up or end: exactly one waiting run of each
    /// provider is next, and in the end no user is remembered.
    #[test]
    fn somebody_is_always_next(steps in prop::collection::vec((0u8..4, 0usize..3, 0usize..9), 0..80)) {
        let queue = queue(None, 1000);
        let (mut waiting, mut running) = (Vec::<Ticket>::new(), Vec::<Running>::new());
        for (step, user, index) in steps {
            match step {
                0 => waiting.push(enter(&queue, "openai", ["a", "b", "c"][user]).unwrap()),
                1 if !waiting.is_empty() => {
                    let next = waiting.iter().position(|one| place(one) == Place::Next).unwrap();
                    running.push(waiting.remove(next).served());
                }
                2 if !waiting.is_empty() => drop(waiting.remove(index % waiting.len())),
                3 if !running.is_empty() => drop(running.remove(index % running.len())),
                _ => {}
            }
            let next = waiting.iter().filter(|one| place(one) == Place::Next).count();
            prop_assert_eq!(next, usize::from(!waiting.is_empty()));
        }
        drop((waiting, running));
        let inner = queue.lock();
        prop_assert!(inner.waiting.is_empty() && inner.users.is_empty());
    }
}
