//! Random interleavings of jobs and policies against a simple model: nothing is lost or leased twice, no limit is exceeded,
//! the order holds among those who may go on, and whoever sleeps is woken when there is something to claim.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    time::Duration,
};

use futures::{FutureExt, StreamExt};
use proptest::prelude::*;
use queue::{
    Claim, Envelope, JobId, Mode, Priority, Pushed, Queue, QueueConfig, QueuePolicy, TenantId, TenantPolicy,
};
use redis::aio::{PubSubSink, PubSubStream};
use support::{job, name, property, worker};

const LEASE_MS: i64 = 1000;
const TENANTS: u8 = 4;

#[derive(Debug, Clone)]
enum Step {
    Push { tenant: u8, priority: u8, count: u8 },
    Claim(u8),
    Ack(u8),
    Release(u8, u16),
    Pass(u16),
    Reap,
    Promote,
    Forget(u8),
    Reprioritise(u8, u8),
    PauseQueue(bool),
    LimitQueue(Option<u8>),
    Weighted(bool),
    PauseTenant(u8, bool),
    LimitTenant(u8, Option<u8>),
    WeighTenant(u8, u8),
}

fn step() -> impl Strategy<Value = Step> {
    let limit = || proptest::option::weighted(0.7, 1..4_u8);
    prop_oneof![
        5 => (0..TENANTS, 0..10_u8, 1..6_u8)
            .prop_map(|(tenant, priority, count)| Step::Push { tenant, priority, count }),
        5 => (1..8_u8).prop_map(Step::Claim),
        4 => any::<u8>().prop_map(Step::Ack),
        2 => (any::<u8>(), prop_oneof![Just(0), 1..2000_u16]).prop_map(|(pick, delay)| Step::Release(pick, delay)),
        1 => (1..1500_u16).prop_map(Step::Pass),
        1 => Just(Step::Reap),
        1 => Just(Step::Promote),
        1 => any::<u8>().prop_map(Step::Forget),
        1 => (any::<u8>(), 0..10_u8).prop_map(|(pick, priority)| Step::Reprioritise(pick, priority)),
        1 => any::<bool>().prop_map(Step::PauseQueue),
        1 => limit().prop_map(Step::LimitQueue),
        1 => any::<bool>().prop_map(Step::Weighted),
        1 => (0..TENANTS, any::<bool>()).prop_map(|(tenant, paused)| Step::PauseTenant(tenant, paused)),
        2 => (0..TENANTS, limit()).prop_map(|(tenant, limit)| Step::LimitTenant(tenant, limit)),
        1 => (0..TENANTS, 1..4_u8).prop_map(|(tenant, weight)| Step::WeighTenant(tenant, weight)),
    ]
}

#[derive(Debug, Clone)]
enum Place {
    Waiting,
    Scheduled(i64),
    /// The claim, when the lease ends, and whether it counts towards its tenant's limit.
    Leased(Claim, i64, bool),
}

/// What the queue should hold, and a worker that sleeps until it is woken.
struct Model {
    now: i64,
    jobs: BTreeMap<JobId, (Envelope, Place)>,
    lists: HashMap<(TenantId, u8), VecDeque<JobId>>,
    queue: QueuePolicy,
    tenants: HashMap<TenantId, TenantPolicy>,
    revision: i64,
    asleep: bool,
    sink: PubSubSink,
    heard: PubSubStream,
}

fn tenant(number: u8) -> TenantId {
    TenantId::new(format!("t{number}")).unwrap()
}

impl Model {
    fn list(&mut self, id: JobId) -> &mut VecDeque<JobId> {
        let envelope = &self.jobs[&id].0;
        self.lists.entry((envelope.tenant.clone(), envelope.priority.get())).or_default()
    }

    fn wait(&mut self, id: JobId, front: bool) {
        self.jobs.get_mut(&id).unwrap().1 = Place::Waiting;
        if front { self.list(id).push_front(id) } else { self.list(id).push_back(id) }
    }

    fn leased(&self) -> usize {
        self.jobs.values().filter(|(_, place)| matches!(place, Place::Leased(..))).count()
    }

    /// How many more jobs of a tenant may be leased now.
    fn allowance(&self, tenant: &TenantId) -> usize {
        let policy = self.tenants.get(tenant).copied().unwrap_or_default();
        let counted = self
            .jobs
            .values()
            .filter(|(job, place)| job.tenant == *tenant && matches!(place, Place::Leased(_, _, true)))
            .count();
        match policy.max_concurrency {
            _ if policy.paused => 0,
            Some(limit) => (limit as usize).saturating_sub(counted),
            None => usize::MAX,
        }
    }

    fn room(&self) -> usize {
        match self.queue.max_concurrency {
            _ if self.queue.paused => 0,
            Some(limit) => (limit as usize).saturating_sub(self.leased()),
            None => usize::MAX,
        }
    }

    fn claimable(&self) -> usize {
        let sum = (0..TENANTS)
            .map(|number| {
                let tenant = tenant(number);
                let waits: usize = (0..10)
                    .filter_map(|level| self.lists.get(&(tenant.clone(), level)))
                    .map(VecDeque::len)
                    .sum();
                waits.min(self.allowance(&tenant))
            })
            .sum::<usize>();
        sum.min(self.room())
    }

    fn pick(&self, pick: u8, wanted: impl Fn(&Place) -> bool) -> Option<JobId> {
        let found: Vec<JobId> =
            self.jobs.iter().filter(|(_, (_, place))| wanted(place)).map(|(id, _)| *id).collect();
        (!found.is_empty()).then(|| found[usize::from(pick) % found.len()])
    }

    fn pick_leased(&self, pick: u8) -> Option<(JobId, Claim)> {
        let id = self.pick(pick, |place| matches!(place, Place::Leased(..)))?;
        match &self.jobs[&id].1 {
            Place::Leased(claim, ..) => Some((id, claim.clone())),
            _ => None,
        }
    }

    /// Whether a wake-up came since the last look.
    async fn woken(&mut self) -> bool {
        // The answer comes after all messages of before.
        self.sink.ping::<redis::Value>().await.unwrap();
        let mut heard = false;
        while let Some(Some(_)) = self.heard.next().now_or_never() {
            heard = true;
        }
        heard
    }
}

async fn check_claims(queue: &Queue, model: &mut Model, max: usize) {
    let want = max.min(model.claimable());
    let mut got = 0;
    // Stale entries may make one claim return less than there is.
    for _ in 0..4 {
        for claim in queue.claim(&name(), &worker(), max - got).await.unwrap() {
            got += 1;
            take(model, claim);
        }
        if got == max {
            break;
        }
    }
    assert_eq!(got, want, "claimed another number than could be claimed of {max}");
    model.asleep = got < max;
}

/// Checks one claimed job against what was allowed just then.
fn take(model: &mut Model, claim: Claim) {
    let id = claim.envelope.id;
    let (envelope, place) =
        model.jobs.get(&id).expect("claimed a job that was finished or cancelled").clone();
    assert!(matches!(place, Place::Waiting), "claimed {id}, which is {place:?}");
    assert!(model.room() > 0, "the queue is paused or its concurrency was exceeded");
    assert!(model.allowance(&envelope.tenant) > 0, "{} is paused or over its concurrency", envelope.tenant);
    if model.queue.mode == Mode::Strict {
        let best = model
            .lists
            .iter()
            .filter(|((tenant, _), list)| !list.is_empty() && model.allowance(tenant) > 0)
            .map(|((_, level), _)| *level)
            .max();
        assert_eq!(Some(envelope.priority.get()), best, "a higher priority could have been claimed");
    }
    assert_eq!(model.list(id).pop_front(), Some(id), "another job of this tenant was before it");
    let counts = model.tenants.get(&envelope.tenant).is_some_and(|policy| policy.max_concurrency.is_some());
    model.jobs.get_mut(&id).unwrap().1 = Place::Leased(claim, model.now + LEASE_MS, counts);
}

async fn set_queue(queue: &Queue, model: &mut Model, edit: impl FnOnce(&mut QueuePolicy)) {
    edit(&mut model.queue);
    model.revision += 1;
    queue.set_policy(&name(), &model.queue, model.revision).await.unwrap();
    // One that comes late.
    let stale = QueuePolicy { paused: !model.queue.paused, ..model.queue };
    queue.set_policy(&name(), &stale, model.revision - 1).await.unwrap();
}

async fn set_tenant(queue: &Queue, model: &mut Model, number: u8, edit: impl FnOnce(&mut TenantPolicy)) {
    let whose = tenant(number);
    let policy = model.tenants.entry(whose.clone()).or_default();
    edit(policy);
    model.revision += 1;
    let (policy, stale) = (*policy, TenantPolicy { paused: !policy.paused, ..*policy });
    queue.set_tenant_policy(&name(), &whose, &policy, model.revision).await.unwrap();
    queue.set_tenant_policy(&name(), &whose, &stale, model.revision - 1).await.unwrap();
}

async fn apply(base: &Queue, model: &mut Model, step: Step) {
    let queue = base.at(model.now);
    match step {
        Step::Push { tenant, priority, count } => {
            let all: Vec<Envelope> = (0..count).map(|_| job(&format!("t{tenant}"), priority)).collect();
            assert!(queue.push(&all).await.unwrap().iter().all(|pushed| *pushed == Pushed::Queued));
            for envelope in all {
                let id = envelope.id;
                model.jobs.insert(id, (envelope, Place::Waiting));
                model.wait(id, false);
            }
        }
        Step::Claim(max) => check_claims(&queue, model, usize::from(max)).await,
        Step::Ack(pick) => {
            if let Some((id, claim)) = model.pick_leased(pick) {
                assert_eq!(queue.ack(&[claim.lease_ref()]).await.unwrap(), [true]);
                model.jobs.remove(&id);
            }
        }
        Step::Release(pick, delay) => {
            if let Some((id, claim)) = model.pick_leased(pick) {
                let given = [(claim.lease_ref(), Duration::from_millis(u64::from(delay)))];
                assert_eq!(queue.release(&given).await.unwrap(), [true]);
                if delay == 0 {
                    model.wait(id, true);
                } else {
                    model.jobs.get_mut(&id).unwrap().1 = Place::Scheduled(model.now + i64::from(delay));
                }
            }
        }
        Step::Pass(ms) => model.now += i64::from(ms),
        Step::Reap => {
            let mut reaped = queue.reap(&name()).await.unwrap();
            let now = model.now;
            let expired = |place: &Place| matches!(place, Place::Leased(_, end, _) if *end <= now);
            assert_eq!(reaped.len(), model.jobs.values().filter(|(_, place)| expired(place)).count());
            for id in reaped.drain(..) {
                assert!(expired(&model.jobs[&id].1), "reaped {id}, which has not expired");
                model.wait(id, true);
            }
        }
        Step::Promote => {
            let mut due: Vec<(i64, String, JobId)> = Vec::new();
            for (id, (_, place)) in &model.jobs {
                if let Place::Scheduled(at) = place
                    && *at <= model.now
                {
                    due.push((*at, id.to_string(), *id));
                }
            }
            due.sort();
            assert_eq!(queue.promote(&name()).await.unwrap(), due.len() as u64);
            for (_, _, id) in due {
                model.wait(id, false);
            }
        }
        Step::Forget(pick) => {
            if let Some(id) = model.pick(pick, |place| !matches!(place, Place::Leased(..))) {
                queue.forget(&[(name(), id)]).await.unwrap();
                model.list(id).retain(|other| *other != id);
                model.jobs.remove(&id);
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
        Step::PauseQueue(paused) => set_queue(&queue, model, |policy| policy.paused = paused).await,
        Step::LimitQueue(limit) => {
            set_queue(&queue, model, |policy| policy.max_concurrency = limit.map(u32::from)).await;
        }
        Step::Weighted(weighted) => {
            let mode = if weighted { Mode::Weighted([1, 2, 3, 4, 5, 6, 7, 8, 9, 10]) } else { Mode::Strict };
            set_queue(&queue, model, |policy| policy.mode = mode).await;
        }
        Step::PauseTenant(whose, paused) => {
            set_tenant(&queue, model, whose, |policy| policy.paused = paused).await;
        }
        Step::LimitTenant(whose, limit) => {
            let limit = limit.map(u32::from);
            set_tenant(&queue, model, whose, |policy| policy.max_concurrency = limit).await;
        }
        Step::WeighTenant(whose, weight) => {
            set_tenant(&queue, model, whose, |policy| policy.weight = weight).await;
        }
    }
}

/// A worker that found nothing claims again when it is woken; if it isn't, there must be nothing to claim.
async fn check_sleeper(base: &Queue, model: &mut Model) {
    if !model.asleep {
        model.woken().await;
        return;
    }
    if model.woken().await {
        let queue = base.at(model.now);
        check_claims(&queue, model, 3).await;
    } else {
        assert_eq!(model.claimable(), 0, "a worker sleeps although it could claim: the wake-up was lost");
    }
}

async fn run(config: QueueConfig, steps: Vec<Step>) {
    let client = redis::Client::open(config.url.as_str()).unwrap();
    let queue = Queue::connect(config).await.unwrap();
    let (mut sink, heard) = client.get_async_pubsub().await.unwrap().split();
    sink.subscribe(format!("{{{}:ingest:0}}:wake", queue.config().prefix)).await.unwrap();
    let mut model = Model {
        now: 1_800_000_000_000,
        jobs: BTreeMap::new(),
        lists: HashMap::new(),
        queue: QueuePolicy::default(),
        tenants: HashMap::new(),
        revision: 0,
        asleep: false,
        sink,
        heard,
    };
    for step in steps {
        apply(&queue, &mut model, step).await;
        check_sleeper(&queue, &mut model).await;
        let stats = queue.at(model.now).stats(&name()).await.unwrap();
        assert_eq!(stats.in_flight, model.leased() as u64);
    }
    // When nothing is held back any more, everything that was neither finished nor cancelled comes out once.
    let base = queue.at(model.now);
    set_queue(&base, &mut model, |policy| *policy = QueuePolicy::default()).await;
    for number in 0..TENANTS {
        set_tenant(&base, &mut model, number, |policy| *policy = TenantPolicy::default()).await;
    }
    model.now += 10_000;
    apply(&queue, &mut model, Step::Reap).await;
    apply(&queue, &mut model, Step::Promote).await;
    check_claims(&queue.at(model.now), &mut model, 10_000).await;
    assert_eq!(model.leased(), model.jobs.len(), "jobs are left behind");
    assert_eq!(queue.stats(&name()).await.unwrap().blocked_tenants, 0);
}

#[test]
fn no_interleaving_of_policies_loses_a_job_a_limit_or_a_wake_up() {
    let settings = |config: &mut QueueConfig| {
        config.lease = Duration::from_millis(LEASE_MS as u64);
        // Ageing has its own test; here the order is strict.
        config.aging = Duration::from_hours(24);
    };
    property(48, settings, proptest::collection::vec(step(), 1..120), run);
}
