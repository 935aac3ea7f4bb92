//! Random interleavings of everything against a simple model: no job is lost, none is leased twice, the order holds.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    time::Duration,
};

use proptest::prelude::*;
use queue::{Beat, Claim, Envelope, JobId, Priority, Pushed, Queue, QueueConfig};
use support::{job, name, property, worker};

const LEASE_MS: i64 = 1000;

#[derive(Debug, Clone)]
enum Step {
    Push { tenant: u8, priority: u8, delay: Option<u16>, count: u8 },
    PushAgain(u8),
    Claim(u8),
    Ack(u8),
    Release(u8, u16),
    Retry(u8, u16),
    Beat(u8),
    StaleBeat(u8),
    Pass(u16),
    Reap,
    Promote,
    Forget(u8),
    Reprioritise(u8, u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..4_u8, 0..10_u8, proptest::option::weighted(0.2, 1..3000_u16), 1..6_u8)
            .prop_map(|(tenant, priority, delay, count)| Step::Push { tenant, priority, delay, count }),
        1 => any::<u8>().prop_map(Step::PushAgain),
        4 => (1..8_u8).prop_map(Step::Claim),
        3 => any::<u8>().prop_map(Step::Ack),
        2 => (any::<u8>(), prop_oneof![Just(0), 1..2000_u16]).prop_map(|(pick, delay)| Step::Release(pick, delay)),
        1 => (any::<u8>(), prop_oneof![Just(0), 1..2000_u16]).prop_map(|(pick, delay)| Step::Retry(pick, delay)),
        1 => any::<u8>().prop_map(Step::Beat),
        1 => any::<u8>().prop_map(Step::StaleBeat),
        2 => (1..1500_u16).prop_map(Step::Pass),
        2 => Just(Step::Reap),
        2 => Just(Step::Promote),
        1 => any::<u8>().prop_map(Step::Forget),
        1 => (any::<u8>(), 0..10_u8).prop_map(|(pick, priority)| Step::Reprioritise(pick, priority)),
    ]
}

#[derive(Debug, Clone)]
enum Place {
    Waiting,
    Scheduled(i64),
    Leased(Claim, i64),
}

/// What the queue should hold.
#[derive(Default)]
struct Model {
    now: i64,
    jobs: BTreeMap<JobId, (Envelope, Place)>,
    /// Waiting jobs by priority and tenant, first to be served in front.
    lists: HashMap<(u8, String), VecDeque<JobId>>,
    /// Claims whose lease has ended in one way or another.
    ended: Vec<Claim>,
}

impl Model {
    fn list(&mut self, id: JobId) -> &mut VecDeque<JobId> {
        let envelope = &self.jobs[&id].0;
        self.lists.entry((envelope.priority.get(), envelope.tenant.to_string())).or_default()
    }

    fn wait(&mut self, id: JobId, front: bool) {
        self.jobs.get_mut(&id).unwrap().1 = Place::Waiting;
        if front { self.list(id).push_front(id) } else { self.list(id).push_back(id) }
    }

    fn given_back(&mut self, id: JobId, claim: Claim, delay: u16) {
        self.ended.push(claim);
        if delay == 0 {
            self.wait(id, true);
        } else {
            self.jobs.get_mut(&id).unwrap().1 = Place::Scheduled(self.now + i64::from(delay));
        }
    }

    fn waiting(&self) -> usize {
        self.lists.values().map(VecDeque::len).sum()
    }

    fn pick(&self, pick: u8, wanted: impl Fn(&Place) -> bool) -> Option<JobId> {
        let found: Vec<JobId> =
            self.jobs.iter().filter(|(_, (_, place))| wanted(place)).map(|(id, _)| *id).collect();
        (!found.is_empty()).then(|| found[usize::from(pick) % found.len()])
    }

    fn leased(&self, pick: u8) -> Option<(JobId, Claim)> {
        let id = self.pick(pick, |place| matches!(place, Place::Leased(..)))?;
        match &self.jobs[&id].1 {
            Place::Leased(claim, _) => Some((id, claim.clone())),
            _ => None,
        }
    }
}

async fn check_claims(queue: &Queue, model: &mut Model, max: usize) {
    let want = max.min(model.waiting());
    let mut claims = Vec::new();
    // Stale entries may make one claim return less than there is.
    for _ in 0..4 {
        if claims.len() < want {
            claims.extend(queue.claim(&name(), &worker(), max - claims.len()).await.unwrap());
        }
    }
    assert_eq!(claims.len(), want, "of {} waiting jobs", model.waiting());
    for claim in claims {
        let id = claim.envelope.id;
        let (envelope, place) = model.jobs.get(&id).expect("claimed a job that was finished or cancelled");
        assert!(matches!(place, Place::Waiting), "claimed {id}, which is {place:?}");
        assert_eq!(*claim.envelope, *envelope);
        let best =
            model.lists.iter().filter(|(_, list)| !list.is_empty()).map(|((priority, _), _)| *priority).max();
        assert_eq!(Some(envelope.priority.get()), best, "a higher priority waits");
        assert_eq!(model.list(id).pop_front(), Some(id), "another job of this tenant was before it");
        model.jobs.get_mut(&id).unwrap().1 = Place::Leased(claim, model.now + LEASE_MS);
    }
}

async fn apply(base: &Queue, model: &mut Model, step: Step) {
    let queue = base.at(model.now);
    match step {
        Step::Push { tenant, priority, delay, count } => {
            let run_at_ms = delay.map(|delay| model.now + i64::from(delay));
            let all: Vec<Envelope> =
                (0..count).map(|_| Envelope { run_at_ms, ..job(&format!("t{tenant}"), priority) }).collect();
            assert!(queue.push(&all).await.unwrap().iter().all(|pushed| *pushed == Pushed::Queued));
            for envelope in all {
                let id = envelope.id;
                model.jobs.insert(id, (envelope, run_at_ms.map_or(Place::Waiting, Place::Scheduled)));
                if run_at_ms.is_none() {
                    model.wait(id, false);
                }
            }
        }
        Step::PushAgain(pick) => {
            if let Some(id) = model.pick(pick, |_| true) {
                let envelope = model.jobs[&id].0.clone();
                assert_eq!(queue.push(&[envelope]).await.unwrap(), [Pushed::Present]);
            }
        }
        Step::Claim(max) => check_claims(&queue, model, usize::from(max)).await,
        Step::Ack(pick) => {
            if let Some((id, claim)) = model.leased(pick) {
                assert_eq!(queue.ack(&[claim.lease_ref()]).await.unwrap(), [true]);
                model.jobs.remove(&id);
                model.ended.push(claim);
            }
        }
        Step::Release(pick, delay) => {
            if let Some((id, claim)) = model.leased(pick) {
                let given = [(claim.lease_ref(), Duration::from_millis(u64::from(delay)))];
                assert_eq!(queue.release(&given).await.unwrap(), [true]);
                model.given_back(id, claim, delay);
            }
        }
        Step::Retry(pick, delay) => {
            if let Some((id, claim)) = model.leased(pick) {
                let given = [(claim.lease_ref(), Duration::from_millis(u64::from(delay)))];
                assert_eq!(queue.retry(&given).await.unwrap(), [true]);
                model.jobs.get_mut(&id).unwrap().0.attempts += 1;
                model.given_back(id, claim, delay);
            }
        }
        Step::Beat(pick) => {
            if let Some((id, claim)) = model.leased(pick) {
                assert_eq!(queue.heartbeat(&[claim.lease_ref()]).await.unwrap(), [Beat::Extended]);
                model.jobs.get_mut(&id).unwrap().1 = Place::Leased(claim, model.now + LEASE_MS);
            }
        }
        Step::StaleBeat(pick) => {
            if !model.ended.is_empty() {
                let lease = model.ended[usize::from(pick) % model.ended.len()].lease_ref();
                assert_eq!(queue.heartbeat(std::slice::from_ref(&lease)).await.unwrap(), [Beat::Lost]);
                assert_eq!(queue.ack(std::slice::from_ref(&lease)).await.unwrap(), [false]);
                assert_eq!(queue.release(&[(lease, Duration::ZERO)]).await.unwrap(), [false]);
            }
        }
        Step::Pass(ms) => model.now += i64::from(ms),
        Step::Reap => {
            let mut expired: Vec<(i64, JobId, Claim)> = model
                .jobs
                .iter()
                .filter_map(|(id, (_, place))| match place {
                    Place::Leased(claim, expiry) if *expiry <= model.now => {
                        Some((*expiry, *id, claim.clone()))
                    }
                    _ => None,
                })
                .collect();
            // As a sorted set orders them; the first to expire ends up in front.
            expired.sort_by_key(|(expiry, id, _)| (*expiry, id.to_string()));
            let mut reaped = queue.reap(&name()).await.unwrap();
            reaped.reverse();
            assert_eq!(reaped, expired.iter().map(|(_, id, _)| *id).collect::<Vec<_>>());
            for (_, id, claim) in expired.into_iter().rev() {
                model.jobs.get_mut(&id).unwrap().0.lost += 1;
                model.ended.push(claim);
                model.wait(id, true);
            }
        }
        Step::Promote => {
            let mut due: Vec<(i64, JobId)> = model
                .jobs
                .iter()
                .filter_map(|(id, (_, place))| match place {
                    Place::Scheduled(at) if *at <= model.now => Some((*at, *id)),
                    _ => None,
                })
                .collect();
            due.sort_by_key(|(at, id)| (*at, id.to_string()));
            assert_eq!(queue.promote(&name()).await.unwrap(), due.len() as u64);
            for (_, id) in due {
                model.wait(id, false);
            }
        }
        Step::Forget(pick) => {
            if let Some(id) = model.pick(pick, |_| true) {
                queue.forget(&[(name(), id)]).await.unwrap();
                if !matches!(model.jobs[&id].1, Place::Leased(..)) {
                    model.list(id).retain(|other| *other != id);
                    model.jobs.remove(&id);
                }
            }
        }
        Step::Reprioritise(pick, priority) => {
            if let Some(id) = model.pick(pick, |_| true) {
                let priority = Priority::try_from(priority).unwrap();
                queue.reprioritise(&[(name(), id, priority)]).await.unwrap();
                if model.jobs[&id].0.priority != priority {
                    let waits = matches!(model.jobs[&id].1, Place::Waiting);
                    model.list(id).retain(|other| *other != id);
                    model.jobs.get_mut(&id).unwrap().0.priority = priority;
                    if waits {
                        model.wait(id, false);
                    }
                }
            }
        }
    }
}

async fn check_stats(base: &Queue, model: &Model) {
    let stats = base.at(model.now).stats(&name()).await.unwrap();
    let mut depths = [0; Priority::LEVELS];
    for ((priority, _), list) in &model.lists {
        depths[usize::from(*priority)] += list.len() as u64;
    }
    assert_eq!(stats.by_priority.map(|level| level.depth), depths);
    let count =
        |wanted: fn(&Place) -> bool| model.jobs.values().filter(|(_, place)| wanted(place)).count() as u64;
    assert_eq!(stats.scheduled, count(|place| matches!(place, Place::Scheduled(_))));
    assert_eq!(stats.in_flight, count(|place| matches!(place, Place::Leased(..))));
    let tenant = queue::TenantId::new("t0").unwrap();
    let of_tenant = model
        .jobs
        .values()
        .filter(|(envelope, place)| envelope.tenant == tenant && !matches!(place, Place::Leased(..)))
        .count();
    assert_eq!(base.tenant_depth(&name(), &tenant).await.unwrap(), of_tenant as u64);
}

async fn run(config: QueueConfig, steps: Vec<Step>) {
    let queue = Queue::connect(config).await.unwrap();
    let mut model = Model { now: 1_800_000_000_000, ..Model::default() };
    for step in steps {
        apply(&queue, &mut model, step).await;
        check_stats(&queue, &model).await;
    }
    // In the end everything that was neither finished nor cancelled comes out once.
    model.now += 10_000;
    apply(&queue, &mut model, Step::Reap).await;
    apply(&queue, &mut model, Step::Promote).await;
    check_claims(&queue, &mut model, 100_000).await;
    assert_eq!(model.waiting(), 0);
    assert!(model.jobs.values().all(|(_, place)| matches!(place, Place::Leased(..))));
}

#[test]
fn no_interleaving_loses_a_job_leases_it_twice_or_breaks_the_order() {
    let settings = |config: &mut QueueConfig| {
        config.lease = Duration::from_millis(LEASE_MS as u64);
        // Ageing has its own test; here the order is strict.
        config.aging = Duration::from_hours(24);
    };
    property(48, settings, proptest::collection::vec(step(), 1..120), run);
}
