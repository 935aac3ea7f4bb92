//! Pause, drain, weights and limits: each holds, and what it held back comes out when it ends.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use queue::{
    Claim, Claimer, ClaimerConfig, Envelope, Gates, Heartbeat, HeartbeatConfig, ListedState, Mode, PolicySet,
    Priority, Pushed, Queue, QueuePolicy, Rate, TenantId, TenantPolicy,
};
use support::{Stage, eventually, ids, job, jobs, name, worker};
use tokio_util::sync::CancellationToken;

/// A round time for tests that set the clock.
const NOW: i64 = 1_800_000_000_000;

fn tenant(name: &str) -> TenantId {
    TenantId::new(name).unwrap()
}

async fn set(stage: &Stage, policy: QueuePolicy, revision: i64) {
    stage.queue.set_policy(&name(), &policy, revision).await.unwrap();
}

async fn set_tenant(stage: &Stage, whose: &str, policy: TenantPolicy, revision: i64) {
    stage.queue.set_tenant_policy(&name(), &tenant(whose), &policy, revision).await.unwrap();
}

async fn claim(queue: &Queue, max: usize) -> Vec<Claim> {
    queue.claim(&name(), &worker(), max).await.unwrap()
}

fn count_by_tenant(claims: &[Claim]) -> HashMap<String, usize> {
    let mut counts = HashMap::new();
    for claim in claims {
        *counts.entry(claim.envelope.tenant.to_string()).or_insert(0) += 1;
    }
    counts
}

fn order(claims: &[Claim]) -> String {
    claims.iter().map(|claim| claim.envelope.tenant.as_str().chars().next().unwrap()).collect()
}

/// A whole claiming worker, which only wake-ups bring to claim: its safety poll is far away.
struct Fleet {
    jobs: queue::Jobs,
    stop: CancellationToken,
    heartbeat: Heartbeat,
    _claimer: Claimer,
}

impl Fleet {
    async fn start(stage: &Stage) -> Self {
        let heartbeat = Heartbeat::spawn(stage.config.clone(), HeartbeatConfig::default()).unwrap();
        let stop = CancellationToken::new();
        let config = ClaimerConfig { queues: vec![name()], worker: worker(), batch: 10, slots: 10 };
        let (claimer, jobs) =
            Claimer::spawn(stage.queue.clone(), heartbeat.clone(), config, Gates::new(), stop.clone());
        // The listener's own first look is over once it is subscribed.
        let mut raw = stage.raw().await;
        eventually(
            Duration::from_secs(5),
            async || {
                let names: Vec<String> =
                    redis::cmd("PUBSUB").arg("CHANNELS").query_async(&mut raw).await.unwrap();
                (!names.is_empty()).then_some(())
            },
            async || "nobody listens".to_owned(),
        )
        .await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        Self { jobs, stop, heartbeat, _claimer: claimer }
    }

    async fn next(&mut self) -> queue::Job {
        tokio::time::timeout(Duration::from_secs(5), self.jobs.recv())
            .await
            .expect("a wake-up was lost: nothing came within 5 s")
            .unwrap()
    }

    async fn nothing_for(&mut self, time: Duration) {
        let got = tokio::time::timeout(time, self.jobs.recv()).await;
        assert!(got.is_err(), "got {got:?}");
    }

    async fn end(self, stage: &Stage, job: queue::Job) {
        self.heartbeat.end(&job.lease);
        assert_eq!(stage.queue.ack(&[job.lease.lease_ref()]).await.unwrap(), [true]);
        self.stop.cancel();
    }
}

async fn quiet_stage() -> Stage {
    Stage::with(|config| config.safety_poll = Duration::from_secs(3600)).await
}

#[tokio::test]
async fn rule_17_a_paused_queue_gives_nothing_until_it_is_resumed() {
    let stage = Stage::new().await;
    stage.queue.push(&jobs(3)).await.unwrap();
    set(&stage, QueuePolicy { paused: true, ..QueuePolicy::default() }, 1).await;
    assert!(stage.claim(10).await.is_empty());
    assert_eq!(stage.queue.push(&jobs(1)).await.unwrap(), [Pushed::Queued], "a pause accepts jobs");
    assert!(stage.queue.stats(&name()).await.unwrap().paused);
    set(&stage, QueuePolicy::default(), 2).await;
    assert_eq!(stage.claim(10).await.len(), 4);
}

#[tokio::test]
async fn rule_17_a_resumed_queue_wakes_its_workers() {
    let stage = quiet_stage().await;
    set(&stage, QueuePolicy { paused: true, ..QueuePolicy::default() }, 1).await;
    let mut fleet = Fleet::start(&stage).await;
    stage.queue.push(&jobs(1)).await.unwrap();
    fleet.nothing_for(Duration::from_millis(200)).await;
    set(&stage, QueuePolicy::default(), 2).await;
    fleet.next().await;
}

#[tokio::test]
async fn rule_17_an_older_revision_never_overwrites_a_newer_one() {
    let stage = Stage::new().await;
    stage.queue.push(&jobs(3)).await.unwrap();
    let paused = QueuePolicy { paused: true, ..QueuePolicy::default() };
    set(&stage, paused, 7).await;
    set(&stage, QueuePolicy::default(), 6).await;
    set(&stage, QueuePolicy::default(), 7).await;
    assert!(stage.claim(10).await.is_empty(), "revision 7 paused the queue");
    set(&stage, QueuePolicy::default(), 8).await;
    set(&stage, paused, 7).await;
    set_tenant(&stage, "acme", TenantPolicy { paused: true, ..TenantPolicy::default() }, 7).await;
    set_tenant(&stage, "acme", TenantPolicy::default(), 3).await;
    assert!(stage.claim(10).await.is_empty(), "revision 7 paused the tenant");
    set_tenant(&stage, "acme", TenantPolicy::default(), 8).await;
    assert_eq!(stage.claim(10).await.len(), 3);
}

#[tokio::test]
async fn rule_17_nothing_is_claimed_after_flushall_before_the_policies_are_back() {
    let stage = Stage::new().await;
    stage.queue.require_policies();
    let set = PolicySet {
        queue: name(),
        policy: (QueuePolicy { paused: true, ..QueuePolicy::default() }, 5),
        tenants: vec![],
    };
    assert!(stage.claim(10).await.is_empty());
    assert_eq!(stage.queue.policies_wanted().await, [name()]);
    stage.queue.sync_policies(&set).await.unwrap();
    stage.queue.push(&jobs(3)).await.unwrap();
    assert!(stage.claim(10).await.is_empty(), "it is paused");
    let () = redis::cmd("FLUSHALL").query_async(&mut stage.raw().await).await.unwrap();
    // The reconciler is faster than the sync of policies.
    stage.queue.push_accepted(&jobs(3)).await.unwrap();
    assert!(stage.claim(10).await.is_empty(), "nobody knows yet whether it is paused");
    assert_eq!(stage.queue.policies_wanted().await, [name()]);
    stage.queue.sync_policies(&set).await.unwrap();
    assert!(stage.claim(10).await.is_empty(), "it is paused again");
    let resumed = PolicySet { policy: (QueuePolicy::default(), 6), ..set };
    stage.queue.sync_policies(&resumed).await.unwrap();
    assert_eq!(stage.claim(10).await.len(), 3);
}

#[tokio::test]
async fn rule_17_nothing_is_claimed_from_a_restarted_server_before_the_policies_are_stored_again() {
    let stage = Stage::new().await;
    stage.queue.require_policies();
    let open = PolicySet { queue: name(), policy: (QueuePolicy::default(), 5), tenants: vec![] };
    stage.queue.sync_policies(&open).await.unwrap();
    stage.queue.push(&jobs(3)).await.unwrap();
    // The append-only file is written every second.
    let mut raw = stage.raw().await;
    let () = redis::cmd("CONFIG").arg(&["SET", "appendfsync", "always"]).query_async(&mut raw).await.unwrap();
    stage.redis().kill9().await.unwrap();
    stage.redis().restart().await.unwrap();
    eventually(
        Duration::from_secs(10),
        async || stage.queue.ping().await.ok(),
        async || "Redis is not back".to_owned(),
    )
    .await;
    // What it holds may be older than the last pause.
    assert!(stage.queue.claim(&name(), &worker(), 10).await.unwrap_or_default().is_empty());
    let claims = eventually(
        Duration::from_secs(5),
        async || stage.queue.claim(&name(), &worker(), 10).await.ok(),
        async || "no connection".to_owned(),
    )
    .await;
    assert!(claims.is_empty(), "the copy is another server's");
    stage.queue.sync_policies(&open).await.unwrap();
    assert_eq!(stage.claim(10).await.len(), 3);
}

#[tokio::test]
async fn a_draining_queue_refuses_new_jobs_and_runs_what_it_has() {
    let stage = Stage::new().await;
    stage.queue.push(&jobs(2)).await.unwrap();
    set(&stage, QueuePolicy { draining: true, ..QueuePolicy::default() }, 1).await;
    assert_eq!(stage.queue.push(&jobs(1)).await.unwrap(), [Pushed::Draining]);
    assert_eq!(stage.queue.push_accepted(&jobs(1)).await.unwrap(), [Pushed::Queued]);
    assert_eq!(stage.claim(10).await.len(), 3);
}

#[tokio::test]
async fn weighted_priorities_get_their_shares() {
    let stage = Stage::new().await;
    let mut weights = [1; 10];
    (weights[9], weights[5], weights[0]) = (6, 3, 1);
    set(&stage, QueuePolicy { mode: Mode::Weighted(weights), ..QueuePolicy::default() }, 1).await;
    for level in [9, 5, 0] {
        stage.queue.push(&(0..300).map(|_| job("acme", level)).collect::<Vec<_>>()).await.unwrap();
    }
    let mut counts = [0; 10];
    for size in [7, 1, 30, 62, 50] {
        for claim in stage.claim(size).await {
            counts[usize::from(claim.envelope.priority.get())] += 1;
        }
    }
    // 150 jobs by 6:3:1, give or take one for where a round was cut.
    let close = |got: i32, want: i32| (got - want).abs() <= 1;
    assert!(close(counts[9], 90) && close(counts[5], 45) && close(counts[0], 15), "{counts:?}");
    // A priority that had nothing so far has no claim on the past.
    stage.queue.push(&(0..100).map(|_| job("acme", 3)).collect::<Vec<_>>()).await.unwrap();
    let late = stage.claim(22).await;
    let of_three = late.iter().filter(|claim| claim.envelope.priority.get() == 3).count();
    assert!((1..=3).contains(&of_three), "{of_three} of 22 by weight 1 of 11");
}

#[tokio::test]
async fn a_tenant_gets_as_many_jobs_in_its_turn_as_it_weighs() {
    let stage = Stage::new().await;
    set_tenant(&stage, "heavy", TenantPolicy { weight: 3, ..TenantPolicy::default() }, 1).await;
    let mut all: Vec<Envelope> = (0..20).map(|_| job("heavy", 5)).collect();
    all.extend((0..20).map(|_| job("light", 5)));
    stage.queue.push(&all).await.unwrap();
    let mut seen = String::new();
    // A turn goes on over claims.
    for size in [1, 1, 4, 2, 8] {
        seen += &order(&stage.claim(size).await);
    }
    assert_eq!(seen, "hhhlhhhlhhhlhhhl");
}

#[tokio::test]
async fn a_tenants_concurrency_is_never_exceeded_and_others_go_on() {
    let stage = Stage::new().await;
    set_tenant(&stage, "few", TenantPolicy { max_concurrency: Some(2), ..TenantPolicy::default() }, 1).await;
    let mut all: Vec<Envelope> = (0..6).map(|_| job("few", 9)).collect();
    all.extend((0..3).map(|_| job("few", 4)));
    all.extend((0..5).map(|_| job("other", 5)));
    stage.queue.push(&all).await.unwrap();
    let first = stage.claim(20).await;
    assert_eq!(count_by_tenant(&first), HashMap::from([("few".to_owned(), 2), ("other".to_owned(), 5)]));
    // Those that a limit holds back are listed, and have an age, as others.
    let stats =
        stage.queue.at(chrono::Utc::now().timestamp_millis() + 3_600_000).stats(&name()).await.unwrap();
    assert_eq!(stats.blocked_tenants, 1);
    for priority in [9, 4] {
        let level = &stats.by_priority[priority];
        assert!(level.oldest_ms.is_some_and(|age| age >= 3_600_000), "{priority}: {level:?}");
    }
    let mut listed = HashSet::new();
    for skip in (0..8).step_by(2) {
        let page = stage.queue.list(&name(), ListedState::Waiting, skip, 2).await.unwrap();
        assert!(page.len() == 2 || skip == 6, "after {skip}: {}", page.len());
        listed.extend(page.iter().map(|job| job.envelope.id));
    }
    let claimed = ids(&first);
    assert_eq!(listed, all.iter().map(|job| job.id).filter(|id| !claimed.contains(id)).collect());
    assert!(stage.claim(20).await.is_empty());
    let mine: Vec<_> = first.iter().filter(|claim| claim.envelope.tenant.as_str() == "few").collect();
    // By ack, release and reap.
    assert_eq!(stage.queue.ack(&[mine[0].lease_ref()]).await.unwrap(), [true]);
    assert_eq!(stage.claim(20).await.len(), 1);
    assert_eq!(stage.queue.release(&[(mine[1].lease_ref(), Duration::ZERO)]).await.unwrap(), [true]);
    let again = stage.claim(20).await;
    assert_eq!(ids(&again), [mine[1].envelope.id]);
    let far = stage.queue.at(i64::MAX / 4096);
    assert_eq!(far.reap(&name()).await.unwrap().len(), 7);
    let mut total = 0;
    loop {
        let claims = claim(&far, 20).await;
        if claims.is_empty() {
            break;
        }
        assert!(count_by_tenant(&claims).get("few").copied().unwrap_or(0) <= 2);
        total += claims.len();
        let refs: Vec<_> = claims.iter().map(Claim::lease_ref).collect();
        far.ack(&refs).await.unwrap();
    }
    assert_eq!(total, 13, "9 + 5 jobs, of which one was acked");
}

#[tokio::test]
async fn an_acked_job_wakes_the_workers_for_its_tenant() {
    let stage = quiet_stage().await;
    set_tenant(&stage, "one", TenantPolicy { max_concurrency: Some(1), ..TenantPolicy::default() }, 1).await;
    let mut fleet = Fleet::start(&stage).await;
    stage.queue.push(&(0..2).map(|_| job("one", 5)).collect::<Vec<_>>()).await.unwrap();
    let first = fleet.next().await;
    fleet.nothing_for(Duration::from_millis(100)).await;
    // Another tenant's job must not wait for the blocked one, although the queue was not empty.
    stage.queue.push(&[job("other", 5)]).await.unwrap();
    assert_eq!(fleet.next().await.envelope.tenant.as_str(), "other");
    fleet.heartbeat.end(&first.lease);
    stage.queue.ack(&[first.lease.lease_ref()]).await.unwrap();
    let second = fleet.next().await;
    assert_eq!(second.envelope.tenant.as_str(), "one");
    fleet.end(&stage, second).await;
}

#[tokio::test]
async fn a_queues_concurrency_is_never_exceeded_and_an_ended_job_wakes_the_workers() {
    let stage = quiet_stage().await;
    set(&stage, QueuePolicy { max_concurrency: Some(2), ..QueuePolicy::default() }, 1).await;
    let mut fleet = Fleet::start(&stage).await;
    stage.queue.push(&jobs(4)).await.unwrap();
    let (first, second) = (fleet.next().await, fleet.next().await);
    fleet.nothing_for(Duration::from_millis(100)).await;
    assert_eq!(stage.queue.leases(&name()).await.unwrap().len(), 2);
    fleet.heartbeat.end(&first.lease);
    stage.queue.ack(&[first.lease.lease_ref()]).await.unwrap();
    fleet.next().await;
    fleet.heartbeat.end(&second.lease);
    stage.queue.release(&[(second.lease.lease_ref(), Duration::ZERO)]).await.unwrap();
    let last = fleet.next().await;
    assert_eq!(last.envelope.id, second.envelope.id, "it was given back to the front");
    fleet.end(&stage, last).await;
}

#[tokio::test]
async fn restored_leases_count_towards_the_tenants_concurrency() {
    let stage = Stage::new().await;
    let limit = TenantPolicy { max_concurrency: Some(1), ..TenantPolicy::default() };
    set_tenant(&stage, "one", limit, 1).await;
    stage.queue.push(&[job("one", 5)]).await.unwrap();
    let held = stage.claim(1).await;
    let () = redis::cmd("FLUSHALL").query_async(&mut stage.raw().await).await.unwrap();
    set_tenant(&stage, "one", limit, 1).await;
    stage.queue.heartbeat(&[held[0].lease_ref()]).await.unwrap();
    stage.queue.push(&[job("one", 5)]).await.unwrap();
    assert!(stage.claim(1).await.is_empty(), "its one job runs");
    stage.queue.ack(&[held[0].lease_ref()]).await.unwrap();
    assert_eq!(stage.claim(1).await.len(), 1);
}

#[tokio::test]
async fn a_queues_rate_bounds_its_claims() {
    let stage = Stage::new().await;
    let rate = Some(Rate { per_second: 10.0, burst: 5 });
    set(&stage, QueuePolicy { rate, ..QueuePolicy::default() }, 1).await;
    stage.queue.push(&jobs(100)).await.unwrap();
    assert_eq!(claim(&stage.queue.at(NOW), 50).await.len(), 5, "the burst");
    assert!(claim(&stage.queue.at(NOW + 99), 50).await.is_empty());
    assert_eq!(claim(&stage.queue.at(NOW + 100), 50).await.len(), 1);
    assert_eq!(claim(&stage.queue.at(NOW + 400), 50).await.len(), 3);
    assert_eq!(claim(&stage.queue.at(NOW + 60_000), 50).await.len(), 5, "no more than a burst is saved up");
}

#[tokio::test]
async fn a_tenants_rate_bounds_its_claims_and_time_brings_it_back() {
    let stage = Stage::new().await;
    let rate = Some(Rate { per_second: 10.0, burst: 2 });
    set_tenant(&stage, "slow", TenantPolicy { rate, ..TenantPolicy::default() }, 1).await;
    let mut all: Vec<Envelope> = (0..10).map(|_| job("slow", 9)).collect();
    all.extend((0..10).map(|_| job("other", 1)));
    stage.queue.push(&all).await.unwrap();
    let claims = claim(&stage.queue.at(NOW), 8).await;
    assert_eq!(count_by_tenant(&claims), HashMap::from([("slow".to_owned(), 2), ("other".to_owned(), 6)]));
    let claims = claim(&stage.queue.at(NOW + 99), 8).await;
    assert_eq!(count_by_tenant(&claims), HashMap::from([("other".to_owned(), 4)]));
    assert_eq!(claim(&stage.queue.at(NOW + 100), 8).await.len(), 1);
    assert_eq!(claim(&stage.queue.at(NOW + 10_000), 8).await.len(), 2);
}

#[tokio::test]
async fn a_rate_goes_on_at_once_when_the_clock_went_back() {
    let stage = Stage::new().await;
    let rate = Some(Rate { per_second: 10.0, burst: 5 });
    set(&stage, QueuePolicy { rate, ..QueuePolicy::default() }, 1).await;
    stage.queue.push(&jobs(100)).await.unwrap();
    assert_eq!(claim(&stage.queue.at(NOW + 3_600_000), 50).await.len(), 5, "the burst");
    assert!(claim(&stage.queue.at(NOW), 50).await.is_empty(), "a step of the clock makes no tokens");
    assert_eq!(claim(&stage.queue.at(NOW + 100), 50).await.len(), 1);
    assert_eq!(claim(&stage.queue.at(NOW + 400), 50).await.len(), 3);
}

#[tokio::test]
async fn a_worker_comes_back_when_a_rate_has_tokens_and_does_not_poll_meanwhile() {
    let stage = quiet_stage().await;
    let rate = Some(Rate { per_second: 4.0, burst: 1 });
    set_tenant(&stage, "slow", TenantPolicy { rate, ..TenantPolicy::default() }, 1).await;
    let mut fleet = Fleet::start(&stage).await;
    stage.queue.push(&(0..4).map(|_| job("slow", 5)).collect::<Vec<_>>()).await.unwrap();
    let begun = std::time::Instant::now();
    for _ in 0..3 {
        fleet.next().await;
    }
    set(&stage, QueuePolicy { rate, ..QueuePolicy::default() }, 1).await;
    fleet.next().await;
    let took = begun.elapsed();
    assert!(took >= Duration::from_millis(700), "four jobs at 4/s took only {took:?}");
    let calls = stage.calls(|name| name.starts_with("eval")).await;
    assert!(calls < 40, "{calls} script calls for 4 jobs");
}

#[tokio::test]
async fn a_paused_tenant_gives_nothing_and_comes_back_whole() {
    let stage = Stage::new().await;
    set_tenant(&stage, "off", TenantPolicy { paused: true, ..TenantPolicy::default() }, 1).await;
    let mut all: Vec<Envelope> = [9, 5, 5, 0].map(|level| job("off", level)).to_vec();
    all.push(job("on", 3));
    stage.queue.push(&all).await.unwrap();
    assert_eq!(count_by_tenant(&stage.claim(10).await), HashMap::from([("on".to_owned(), 1)]));
    assert!(stage.claim(10).await.is_empty());
    stage.queue.push(&[job("off", 7)]).await.unwrap();
    assert!(stage.claim(10).await.is_empty());
    set_tenant(&stage, "off", TenantPolicy::default(), 2).await;
    let levels: Vec<u8> = stage.claim(10).await.iter().map(|claim| claim.envelope.priority.get()).collect();
    assert_eq!(levels, [9, 7, 5, 5, 0]);
}

#[tokio::test]
async fn maximum_depths_refuse_new_jobs_but_not_accepted_ones() {
    let stage = Stage::new().await;
    set(&stage, QueuePolicy { max_depth: Some(4), ..QueuePolicy::default() }, 1).await;
    set_tenant(&stage, "small", TenantPolicy { max_depth: Some(2), ..TenantPolicy::default() }, 1).await;
    let small: Vec<Envelope> = (0..3).map(|_| job("small", 5)).collect();
    let later = Envelope { run_at_ms: Some(i64::MAX / 4096), ..job("big", 5) };
    assert_eq!(stage.queue.push(&small).await.unwrap(), [Pushed::Queued, Pushed::Queued, Pushed::TenantFull]);
    assert_eq!(stage.queue.push(&[later, job("big", 5)]).await.unwrap(), [Pushed::Queued; 2]);
    assert_eq!(stage.queue.push(&[job("big", 5)]).await.unwrap(), [Pushed::QueueFull]);
    assert_eq!(stage.queue.depth(&name()).await.unwrap(), 4);
    assert_eq!(stage.queue.push_accepted(&[small[2].clone()]).await.unwrap(), [Pushed::Queued]);
    assert_eq!(stage.queue.push(&small).await.unwrap(), [Pushed::Present; 3]);
}

#[tokio::test]
async fn a_tenants_depth_counts_its_jobs_and_not_what_they_leave_behind() {
    let stage = Stage::new().await;
    set_tenant(&stage, "acme", TenantPolicy { max_depth: Some(3), ..TenantPolicy::default() }, 1).await;
    let (queue, tenant) = (&stage.queue, TenantId::new("acme").unwrap());
    let is_full = async |depth: u64| {
        assert_eq!(queue.tenant_depth(&name(), &tenant).await.unwrap(), depth);
        depth == 3 && queue.push(&[job("acme", 5)]).await.unwrap() == [Pushed::TenantFull]
    };
    let later = Envelope { run_at_ms: Some(i64::MAX / 4096), ..job("acme", 5) };
    let (first, second) = (job("acme", 5), job("acme", 5));
    assert_eq!(
        queue.push(&[first.clone(), second.clone(), later.clone()]).await.unwrap(),
        [Pushed::Queued; 3]
    );
    assert!(is_full(3).await);
    // Both leave an entry behind in a list.
    queue.forget(&[(name(), first.id)]).await.unwrap();
    queue.reprioritise(&[(name(), second.id, Priority::HIGHEST)]).await.unwrap();
    assert!(!is_full(2).await);
    assert_eq!(queue.push(&[job("acme", 1)]).await.unwrap(), [Pushed::Queued]);
    assert!(is_full(3).await);
    queue.forget(&[(name(), later.id)]).await.unwrap();
    let claims = stage.claim(10).await;
    assert_eq!(claims.len(), 2);
    assert!(!is_full(0).await);
    // Given back: to its list, and to the schedule.
    let back = [(claims[0].lease_ref(), Duration::ZERO), (claims[1].lease_ref(), Duration::from_secs(60))];
    assert_eq!(queue.release(&back).await.unwrap(), [true, true]);
    assert!(!is_full(2).await);
    assert_eq!(queue.push(&[job("acme", 5)]).await.unwrap(), [Pushed::Queued]);
    assert!(is_full(3).await);
}
