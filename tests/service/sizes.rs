//! Sizes of pools: which sizes the shim accepts, and how it handles Nomad's answers.

use std::{sync::Mutex, thread};

use polydev_proto::runtime::{
    DrainPoolRequest, Drained, Draining, ResumePoolRequest, ScalePoolRequest, Scaled,
    drain_pool_response as draining, resume_pool_response as resume, scale_pool_response as scale,
};
use polydev_tests::{client::Client, fake_nomad::Mood, wait_until};
use tonic::{Code, Response, Status};

use crate::site::{LIMIT, Site, field, reason};

/// The events so far of a call to drain a pool.
type Told = Mutex<Vec<draining::Event>>;

fn scaled(client: &Client, provider: &str, size: u32) -> Result<Vec<scale::Event>, Status> {
    let provider = provider.to_owned();
    client.call(async |mut shim| {
        let request = ScalePoolRequest { provider, size };
        let mut told = shim.scale_pool(request).await?.into_inner();
        let mut events = Vec::new();
        while let Some(response) = told.message().await? {
            events.extend(response.event);
        }
        Ok(Response::new(events))
    })
}

fn drained(client: &Client, provider: &str) -> Result<Vec<draining::Event>, Status> {
    let events = Mutex::default();
    drain(client, provider, &events)?;
    Ok(events.into_inner().expect("nobody panicked"))
}

/// Drains a pool, and adds each event to `events` as it arrives.
fn drain(client: &Client, provider: &str, events: &Told) -> Result<(), Status> {
    let provider = provider.to_owned();
    client.call(async |mut shim| {
        let request = DrainPoolRequest { provider };
        let mut told = shim.drain_pool(request).await?.into_inner();
        while let Some(response) = told.message().await? {
            let mut events = events.lock().expect("nobody panicked");
            events.extend(response.event);
        }
        Ok(Response::new(()))
    })
}

fn resumed(client: &Client, provider: &str) -> Result<Vec<resume::Event>, Status> {
    let provider = provider.to_owned();
    client.call(async |mut shim| {
        let request = ResumePoolRequest { provider };
        let mut told = shim.resume_pool(request).await?.into_inner();
        let mut events = Vec::new();
        while let Some(response) = told.message().await? {
            events.extend(response.event);
        }
        Ok(Response::new(events))
    })
}

#[track_caller]
fn is_refused<T>(answer: Result<T, Status>, code: Code, expected: &str) {
    let status = answer.err().expect("a refusal");
    assert_eq!(status.code(), code, "{status}");
    assert_eq!(reason(&status), expected, "{status}");
}

#[test]
fn a_size_is_nomads_to_keep() {
    let site = Site::start(&[]);
    let client = site.shim.client();
    site.nomad().add_pool("anthropic", 1);
    for (from, to) in [(1, 100), (100, 0), (0, 1)] {
        let events = scaled(&client, "claude_code", to).unwrap();
        assert_eq!(events, [scale::Event::Scaled(Scaled { from, to })]);
        assert_eq!(site.nomad().pool("anthropic").0, to);
    }
}

#[test]
fn a_size_that_cannot_be_is_refused() {
    let site = Site::start(&[]);
    let client = site.shim.client();
    site.nomad().add_pool("anthropic", 1);
    let large = scaled(&client, "anthropic", 101).unwrap_err();
    assert_eq!(field(&large), "size");
    is_refused::<()>(Err(large), Code::InvalidArgument, "INVALID");
    is_refused(scaled(&client, "google", 1), Code::NotFound, "NO_JOB");
    is_refused(drained(&client, "google"), Code::NotFound, "NO_JOB");
    is_refused(resumed(&client, "google"), Code::NotFound, "NO_JOB");
    let going = resumed(&client, "anthropic");
    is_refused(going, Code::FailedPrecondition, "NOT_DRAINED");
    assert_eq!(site.nomad().pool("anthropic").0, 1);
    site.nomad().set_mood(Mood::Failing);
    is_refused(scaled(&client, "anthropic", 2), Code::Unavailable, "NOMAD");
}

/// While Nomad deploys the previous size, it refuses another one. The shim waits for that, and
/// reports it once.
#[test]
fn a_deployment_is_waited_for() {
    let site = Site::start(&[]);
    site.nomad().add_pool("anthropic", 1);
    site.nomad().set_deploying("anthropic", true);
    thread::scope(|scope| {
        let scaling = scope.spawn(|| scaled(&site.shim.client(), "anthropic", 3));
        wait_until("two refusals", LIMIT, || {
            let (_, refused) = site.nomad().pool("anthropic");
            (refused >= 2).then_some(()).ok_or(refused.to_string())
        });
        site.nomad().set_deploying("anthropic", false);
        let events = scaling.join().unwrap().unwrap();
        let [scale::Event::Waiting(_), scale::Event::Scaled(scaled)] = &events[..] else {
            panic!("{events:?}");
        };
        assert_eq!(*scaled, Scaled { from: 1, to: 3 });
    });
}

/// Nomad keeps the pool's previous size, for any shim.
#[test]
fn a_drained_pool_is_empty_and_gets_back_the_size_that_it_had() {
    let site = Site::start(&[("anthropic", 2)]);
    let client = site.shim.client();
    site.nomad().add_pool("anthropic", 2);
    thread::scope(|scope| {
        let call = scope.spawn(|| drained(&site.shim.client(), "anthropic"));
        wait_until("size 0", LIMIT, || {
            let (size, _) = site.nomad().pool("anthropic");
            (size == 0).then_some(()).ok_or(size.to_string())
        });
        // Nomad removes the slots then.
        site.node().remove_slots("anthropic");
        let events = call.join().unwrap().unwrap();
        let (first, last) = (events.first(), events.last());
        let scaled = draining::Event::Scaled(Scaled { from: 2, to: 0 });
        assert_eq!(first, Some(&scaled), "{events:?}");
        assert_eq!(
            last,
            Some(&draining::Event::Drained(Drained {})),
            "{events:?}"
        );
    });
    let again = drained(&client, "anthropic").unwrap();
    assert_eq!(again, [draining::Event::Drained(Drained {})]);
    let events = resumed(&client, "anthropic").unwrap();
    let scaled = Scaled { from: 0, to: 2 };
    assert_eq!(events, [resume::Event::Scaled(scaled)]);
    assert_eq!(site.nomad().pool("anthropic").0, 2);
}

/// A node that is out of reach may have slots of the pool.
#[test]
fn a_pool_is_not_called_drained_while_a_node_is_away() {
    let mut site = Site::start(&[("anthropic", 1)]);
    site.add_node(Default::default(), &[]);
    site.nomad().add_pool("anthropic", 1);
    site.nodes[1].leave();
    site.wait_nodes(1, 1);
    let told = Told::default();
    thread::scope(|scope| {
        let call = scope.spawn(|| drain(&site.shim.client(), "anthropic", &told));
        let (slots, runs) = (1, 0);
        wait_told(&told, &draining::Event::Draining(Draining { slots, runs }));
        site.node().remove_slots("anthropic");
        let slots = 0;
        wait_told(&told, &draining::Event::Draining(Draining { slots, runs }));
        site.nodes[1].obey();
        call.join().unwrap().unwrap();
    });
    let events = told.into_inner().unwrap();
    assert_eq!(events.last(), Some(&draining::Event::Drained(Drained {})));
}

#[track_caller]
fn wait_told(told: &Told, event: &draining::Event) {
    wait_until("what is left", LIMIT, || {
        let events = told.lock().expect("nobody panicked");
        let words = || format!("{events:?}");
        events.contains(event).then_some(()).ok_or_else(words)
    });
}
