use super::*;
use polydev_proto::node::Spent;
use proptest::prelude::*;
use tonic::transport::Endpoint;

fn slot(id: &str, state: State, generation: u64) -> Slot {
    Slot {
        slot_id: id.into(),
        provider: "openai".into(),
        state: state.into(),
        generation,
        ..Default::default()
    }
}

fn tell(view: &View, snapshot: bool, slots: Vec<Slot>, removed: &[&str]) {
    tell_of("node", view, snapshot, slots, removed);
}

fn tell_of(node: &str, view: &View, snapshot: bool, slots: Vec<Slot>, removed: &[&str]) {
    let channel = Endpoint::from_static("unix:///nowhere").connect_lazy();
    let removed = removed.iter().map(|id| (*id).to_owned()).collect();
    let told = WatchSlotsResponse {
        snapshot,
        slots,
        removed,
        start_id: "s".into(),
        ..WatchSlotsResponse::default()
    };
    view.apply(node, &channel, told);
}

#[tokio::test]
async fn what_a_user_has_used_is_the_sum_of_the_nodes_of_today() {
    let view = View::new();
    let today = polydev_proto::budget::today();
    let tell = |node: &str, snapshot, day, requests| {
        let channel = Endpoint::from_static("unix:///nowhere").connect_lazy();
        let spent = Spent {
            user_id: "alice".into(),
            day,
            requests,
            tokens: 10 * requests,
        };
        let told = WatchSlotsResponse {
            snapshot,
            spent: vec![spent],
            ..WatchSlotsResponse::default()
        };
        view.apply(node, &channel, told);
    };
    let requests = || view.used(&"alice".into()).requests;
    tell("a", true, today, 1);
    tell("b", true, today, 2);
    tell("b", false, today, 5);
    assert_eq!(requests(), 6);
    assert_eq!(view.used(&"alice".into()).tokens, 60);
    assert_eq!(view.used(&"bob".into()).requests, 0);
    view.disconnect("b");
    assert_eq!(
        requests(),
        6,
        "what a node has reported counts while it is away"
    );
    tell("a", true, today - 1, 9);
    assert_eq!(requests(), 5);
}

#[tokio::test]
async fn a_node_without_room_is_left_for_one_that_may_have_some() {
    let view = View::new();
    let many = (0..50).map(|id| slot(&format!("a{id}"), State::Idle, 1));
    tell_of("full", &view, true, many.collect(), &[]);
    let full = BTreeSet::from(["full".to_owned()]);
    assert!(view.idle_beyond("openai", &full).is_none());
    tell_of("other", &view, true, vec![slot("b", State::Idle, 1)], &[]);
    let other = view.idle_beyond("openai", &full).unwrap();
    assert_eq!(other.node_id, "other");
    assert!(view.idle_beyond("openai", &full).is_none(), "it is tried");
    drop(other);
    assert!(view.idle_beyond("openai", &full).is_some());
}

#[tokio::test]
async fn what_a_lost_node_tells_counts_until_its_connection_breaks() {
    let view = View::new();
    view.expect("node");
    tell(&view, true, vec![slot("a", State::Idle, 1)], &[]);
    view.leave("node");
    assert_eq!(view.nodes(), (1, 0));
    assert_eq!(view.counts()["openai"].idle, 1);
    let slots = |state| vec![slot("a", state, 1)];
    let taken = || view.take(|ready| ready.of_pool("openai"));
    assert!(taken().is_none(), "it gets no new runs");
    tell(&view, false, slots(State::Claimed), &[]);
    tell(&view, false, slots(State::Idle), &[]);
    assert!(taken().is_none());
    view.expect("node");
    assert!(taken().is_some());
    view.leave("node");
    view.disconnect("node");
    assert_eq!(view.nodes(), (0, 0), "it is not one of the cluster's");
    let unreachable = view.channels().1;
    assert_eq!(unreachable, ["node"], "its runs may be asked for");
    let now = SystemTime::now();
    let earlier = now - Duration::from_secs(60);
    assert_eq!(view.channels_since(Some(earlier)).1, ["node"]);
    assert!(view.channels_since(Some(now)).1.is_empty());
    view.expect("node");
    assert_eq!(view.nodes(), (0, 1));
}

#[tokio::test]
async fn two_runs_of_one_shim_never_try_the_same_container() {
    let view = View::new();
    tell(
        &view,
        true,
        vec![slot("a", State::Idle, 1), slot("b", State::Idle, 1)],
        &[],
    );
    let (first, second) = (
        view.idle_slot("openai").await,
        view.idle_slot("openai").await,
    );
    assert_ne!(first.slot_id, second.slot_id);
    assert!(view.take(|ready| ready.of_pool("openai")).is_none());

    let freed = first.slot_id.clone();
    drop(first);
    let again = view.take(|ready| ready.of_pool("openai"));
    assert_eq!(again.unwrap().slot_id, freed);
}

#[derive(Debug, Clone)]
enum Step {
    Tell(bool, Vec<(u8, State, u64)>, Vec<u8>),
    Take,
    Drop(usize, bool),
    Disconnect,
}

fn step() -> impl Strategy<Value = Step> {
    let state = prop::sample::select(vec![
        State::Idle,
        State::Idle,
        State::Claimed,
        State::Recycling,
        State::Leased,
    ]);
    let slots = prop::collection::vec((0u8..5, state, 1u64..4), 0..5);
    prop_oneof![
        6 => (prop::bool::weighted(0.2), slots, prop::collection::vec(0u8..5, 0..2))
            .prop_map(|(snapshot, slots, removed)| Step::Tell(snapshot, slots, removed)),
        4 => Just(Step::Take),
        3 => (0usize..4, any::<bool>()).prop_map(|(which, granted)| Step::Drop(which, granted)),
        1 => Just(Step::Disconnect),
    ]
}

proptest! {
    /// The slots that can be taken are those that a search of all slots finds.
    #[test]
    fn the_index_of_ready_slots_says_what_the_slots_say(
        steps in prop::collection::vec(step(), 0..60),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let _in_it = runtime.enter();
        let view = View::new();
        let mut taken = Vec::new();
        for step in steps {
            match step {
                Step::Tell(snapshot, slots, removed) => {
                    let slots = slots.into_iter().map(|(id, state, generation)| {
                        slot(&id.to_string(), state, generation)
                    });
                    let removed: Vec<_> = removed.iter().map(u8::to_string).collect();
                    let removed: Vec<_> = removed.iter().map(String::as_str).collect();
                    tell(&view, snapshot, slots.collect(), &removed);
                }
                Step::Take => taken.extend(view.take(|ready| ready.of_pool("openai"))),
                Step::Drop(which, granted) if which < taken.len() => {
                    let candidate = taken.swap_remove(which);
                    if granted {
                        candidate.granted(&"alice".into(), RunId::now());
                    }
                }
                Step::Drop(..) => {}
                Step::Disconnect => view.disconnect("node"),
            }
            let inner = view.lock();
            let connected = inner.nodes.values().flat_map(|node| &node.connected);
            let idle = connected.flat_map(|node| {
                let slots = node.slots.values();
                slots.filter(|slot| slot.state() == State::Idle && !node.is_claiming(slot))
            });
            let mut idle: Vec<String> = idle.map(|slot| slot.slot_id.as_str().into()).collect();
            idle.sort();
            prop_assert_eq!(inner.ready.pool("openai"), idle);
        }
    }
}

#[tokio::test]
async fn a_slot_on_demand_is_for_its_run_alone() {
    let view = View::new();
    let run_id = RunId::now();
    let made = Slot {
        for_run_id: run_id.into(),
        ..slot("a", State::Idle, 1)
    };
    tell(&view, true, vec![made], &[]);
    tokio::select! {
        biased;
        _ = view.idle_slot("openai") => panic!("it is no slot of the pool"),
        _ = view.slot_for(RunId::now()) => panic!("it is another run's"),
        slot = view.slot_for(run_id) => assert_eq!(slot.slot_id.as_str(), "a"),
    }
    let counts = view.counts()["openai"];
    assert_eq!((counts.idle, counts.on_demand), (0, 1));
}

#[tokio::test]
async fn a_run_waits_until_a_slot_is_idle() {
    let view = View::new();
    tell(&view, true, vec![slot("a", State::Warming, 1)], &[]);
    let waiting = view.idle_slot("openai");
    tokio::pin!(waiting);
    tokio::select! {
        biased;
        _ = &mut waiting => panic!("nothing is idle"),
        () = tokio::task::yield_now() => {}
    }
    tell(&view, false, vec![slot("a", State::Idle, 1)], &[]);
    assert_eq!(waiting.await.slot_id.as_str(), "a");
}

#[tokio::test]
async fn slots_that_are_gone_or_out_of_reach_are_not_counted() {
    let view = View::new();
    view.expect("node");
    assert_eq!(view.nodes(), (0, 1));
    tell(
        &view,
        true,
        vec![slot("a", State::Idle, 1), slot("b", State::Claimed, 3)],
        &[],
    );
    assert_eq!(view.nodes(), (1, 0));
    assert_eq!(
        view.counts()["openai"],
        Counts {
            idle: 1,
            claimed: 1,
            ..Counts::default()
        }
    );
    tell(&view, false, vec![], &["a"]);
    assert_eq!(
        view.counts()["openai"],
        Counts {
            claimed: 1,
            ..Counts::default()
        }
    );
    view.disconnect("node");
    assert!(view.counts().is_empty());
}
