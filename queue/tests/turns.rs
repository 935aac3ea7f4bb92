//! Properties of the order over random loads: tenants take turns, ageing has a bound, and dead workers lose nothing.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::Duration,
};

use proptest::prelude::*;
use queue::{Claim, JobId, Queue, QueueConfig};
use support::{job, name, worker};

const NOW: i64 = 1_800_000_000_000;
const LEASE_MS: i64 = 1000;
const AGING_MS: i64 = 60_000;

/// Runs a property over a private Redis; each case has a prefix of its own.
fn check<S: Strategy>(cases: u32, input: S, property: impl AsyncFn(Queue, S::Value)) {
    let settings = |config: &mut QueueConfig| {
        config.lease = Duration::from_millis(LEASE_MS as u64);
        config.aging = Duration::from_millis(AGING_MS as u64);
    };
    support::property(cases, settings, input, async |config, value| {
        property(Queue::connect(config).await.unwrap(), value).await;
    });
}

async fn one(queue: &Queue) -> Option<Claim> {
    queue.claim(&name(), &worker(), 1).await.unwrap().pop()
}

/// Which jobs wait, by priority and tenant, and who has waited for a turn since which claim.
#[derive(Default)]
struct Turns {
    waiting: BTreeMap<(u8, String), usize>,
    /// Per priority: for each tenant, who was served since it was served last, or since it came.
    since: HashMap<(u8, String), HashSet<String>>,
}

impl Turns {
    fn push(&mut self, priority: u8, tenant: &str) {
        let key = (priority, tenant.to_owned());
        let count = self.waiting.entry(key.clone()).or_default();
        if *count == 0 {
            self.since.insert(key, HashSet::new());
        }
        *count += 1;
    }

    /// Between two services of one tenant, each other that waited all the time was served.
    fn serve(&mut self, priority: u8, tenant: &str) {
        let best = self.waiting.iter().filter(|(_, count)| **count > 0).map(|((p, _), _)| *p).max();
        assert_eq!(Some(priority), best, "a higher priority waits");
        for ((level, other), count) in &self.waiting {
            if *level == priority && *count > 0 && other != tenant {
                let served = self.since.get_mut(&(*level, other.clone())).unwrap();
                assert!(served.insert(tenant.to_owned()), "{tenant} was served twice while {other} waited");
            }
        }
        let key = (priority, tenant.to_owned());
        self.since.insert(key.clone(), HashSet::new());
        *self.waiting.get_mut(&key).unwrap() -= 1;
    }
}

#[test]
fn between_two_jobs_of_a_tenant_every_other_tenant_of_its_priority_has_its_turn() {
    // (tenant, priority, how many), and how many claims follow.
    let bursts = proptest::collection::vec(((0..6_u8, 0..3_u8, 1..12_usize), 0..10_usize), 1..25);
    check(32, bursts, async |queue, bursts| {
        let queue = queue.at(NOW);
        let mut turns = Turns::default();
        let serve = async |turns: &mut Turns| match one(&queue).await {
            Some(claim) => {
                turns.serve(claim.envelope.priority.get(), claim.envelope.tenant.as_str());
                queue.ack(&[claim.lease_ref()]).await.unwrap();
                true
            }
            None => false,
        };
        for ((tenant, priority, count), claims) in bursts {
            let tenant = format!("t{tenant}");
            queue.push(&(0..count).map(|_| job(&tenant, priority)).collect::<Vec<_>>()).await.unwrap();
            for _ in 0..count {
                turns.push(priority, &tenant);
            }
            for _ in 0..claims {
                serve(&mut turns).await;
            }
        }
        while serve(&mut turns).await {}
        assert_eq!(turns.waiting.values().sum::<usize>(), 0, "jobs are left");
    });
}

/// The places of a priority in the order of age.
fn ages_of(old: &[u8], priority: u8) -> impl Iterator<Item = usize> {
    old.iter().enumerate().filter(move |(_, one)| **one == priority).map(|(age, _)| age)
}

#[test]
fn an_old_job_of_low_priority_is_reached_in_so_many_claims_for_each_that_is_older() {
    // Priorities of old jobs in the order of their age, and how many jobs one claim takes.
    let old = (proptest::collection::vec(0..9_u8, 1..8), 1..9_usize);
    check(24, old, async |queue, (old, batch)| {
        let mut ages = HashMap::new();
        // In eight claims the one that is oldest of all, and in 72 the oldest of each priority.
        let bound = |age: usize| {
            let same = ages_of(&old, old[age]).take_while(|older| *older < age).count();
            (8 * (age + 1)).min(72 * (same + 1))
        };
        for (age, priority) in old.iter().enumerate() {
            // Tenants of their own: within a tenant's list the first goes first.
            let envelope = job(&format!("old{age}"), *priority);
            ages.insert(envelope.id, age);
            queue.at(NOW + age as i64).push(&[envelope]).await.unwrap();
        }
        let now = queue.at(NOW + AGING_MS + 1000);
        let mut served = 0;
        while !ages.is_empty() {
            // The highest priority never runs dry.
            now.push(&(0..batch).map(|_| job("busy", 9)).collect::<Vec<_>>()).await.unwrap();
            let claims = now.claim(&name(), &worker(), batch).await.unwrap();
            assert_eq!(claims.len(), batch);
            for claim in claims {
                served += 1;
                if let Some(age) = ages.remove(&claim.envelope.id) {
                    assert!(
                        served <= bound(age),
                        "the job that {age} are older than came as number {served}"
                    );
                }
            }
            // One in four is old, while there are any.
            assert!(served <= 4 * old.len() + batch, "{} old jobs were never reached", ages.len());
        }
    });
}

#[derive(Debug, Clone)]
enum Event {
    Push(u8),
    Claim(u8),
    Ack(u8),
    Nack(u8, bool),
    Cancel(u8),
    /// A worker dies with all that it holds.
    Crash(u8),
    /// Leases run out, due times come, and the roles do their rounds.
    Pass,
}

#[test]
fn whatever_dies_no_job_is_lost_and_none_is_leased_twice() {
    const WORKERS: u8 = 3;
    let event = prop_oneof![
        3 => (1..6_u8).prop_map(Event::Push),
        5 => (0..WORKERS).prop_map(Event::Claim),
        4 => (0..WORKERS).prop_map(Event::Ack),
        2 => (0..WORKERS, any::<bool>()).prop_map(|(worker, later)| Event::Nack(worker, later)),
        1 => any::<u8>().prop_map(Event::Cancel),
        1 => (0..WORKERS).prop_map(Event::Crash),
        2 => Just(Event::Pass),
    ];
    check(32, proptest::collection::vec(event, 1..120), async |base, events| {
        let mut now = NOW;
        // Neither finished nor cancelled.
        let mut open: HashSet<JobId> = HashSet::new();
        let mut held: Vec<Vec<Claim>> = (0..WORKERS).map(|_| Vec::new()).collect();
        let pass = async |now: &mut i64, held: &mut Vec<Vec<Claim>>| {
            *now += LEASE_MS * 3 / 4;
            // The living send heartbeats; the dead hold nothing any more.
            for claims in held.iter() {
                let refs: Vec<_> = claims.iter().map(Claim::lease_ref).collect();
                let beats = base.at(*now).heartbeat(&refs).await.unwrap();
                assert!(beats.iter().all(|beat| *beat == queue::Beat::Extended), "{beats:?}");
            }
            *now += LEASE_MS * 3 / 4;
            base.at(*now).reap(&name()).await.unwrap();
            base.at(*now).promote(&name()).await.unwrap();
        };
        for event in events {
            let queue = base.at(now);
            match event {
                Event::Push(count) => {
                    let all: Vec<_> = (0..count).map(|number| job("acme", number)).collect();
                    queue.push(&all).await.unwrap();
                    open.extend(all.iter().map(|job| job.id));
                }
                Event::Claim(who) => {
                    let claims = queue.claim(&name(), &worker(), 3).await.unwrap();
                    for claim in &claims {
                        let id = claim.envelope.id;
                        assert!(open.contains(&id), "{id} was finished or cancelled");
                        let twice = held.iter().flatten().any(|other| other.envelope.id == id);
                        assert!(!twice, "{id} is leased to a living worker");
                    }
                    held[usize::from(who)].extend(claims);
                }
                Event::Ack(who) => {
                    if let Some(claim) = held[usize::from(who)].pop() {
                        assert_eq!(queue.ack(&[claim.lease_ref()]).await.unwrap(), [true]);
                        open.remove(&claim.envelope.id);
                    }
                }
                Event::Nack(who, later) => {
                    if let Some(claim) = held[usize::from(who)].pop() {
                        let delay = Duration::from_millis(if later { 500 } else { 0 });
                        assert_eq!(queue.release(&[(claim.lease_ref(), delay)]).await.unwrap(), [true]);
                    }
                }
                Event::Cancel(pick) => {
                    let mut all: Vec<JobId> = open.iter().copied().collect();
                    all.sort();
                    let Some(id) = all.get(usize::from(pick) % all.len().max(1)).copied() else { continue };
                    let before = queue.places(&[(name(), id)]).await.unwrap()[0];
                    queue.forget(&[(name(), id)]).await.unwrap();
                    if !matches!(before, Some(queue::Place::Leased { .. })) {
                        open.remove(&id);
                    }
                }
                Event::Crash(who) => held[usize::from(who)].clear(),
                Event::Pass => pass(&mut now, &mut held).await,
            }
            let known = base.missing(&open.iter().map(|id| (name(), *id)).collect::<Vec<_>>()).await.unwrap();
            assert!(known.is_empty(), "lost: {known:?}");
        }
        // Everybody dies; everything that is open comes out once.
        held.iter_mut().for_each(Vec::clear);
        pass(&mut now, &mut held).await;
        pass(&mut now, &mut held).await;
        let queue = base.at(now);
        let mut out = HashSet::new();
        loop {
            let claims = queue.claim(&name(), &worker(), 50).await.unwrap();
            if claims.is_empty() {
                break;
            }
            for claim in claims {
                assert!(out.insert(claim.envelope.id), "leased twice");
            }
        }
        assert_eq!(out, open);
    });
}
