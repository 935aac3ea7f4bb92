//! The background roles: claimer, heartbeat, acker, reaper, scheduler.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, Instant},
};

use queue::{
    Acker, Claimer, ClaimerConfig, Done, Envelope, Gates, Heartbeat, HeartbeatConfig, Job, QueueConfig,
    QueueError, QueueName, Reaper, Scheduler,
};
use support::{DEADLINE, Stage, eventually, job, jobs, name, worker};
use tokio::{sync::Barrier, task::JoinSet, time::timeout};
use tokio_util::sync::CancellationToken;

/// One worker's roles over a stage's queue.
struct Roles {
    heartbeat: Heartbeat,
    acker: Acker,
    claimer: Claimer,
    jobs: queue::Jobs,
    gates: Gates,
    shutdown: CancellationToken,
}

fn beat_every(ms: u64) -> HeartbeatConfig {
    HeartbeatConfig { interval: Duration::from_millis(ms) }
}

fn roles(stage: &Stage, slots: usize) -> Roles {
    roles_for(stage, slots, vec![name()])
}

fn roles_for(stage: &Stage, slots: usize, queues: Vec<QueueName>) -> Roles {
    let interval = stage.config.lease / 4;
    let heartbeat = Heartbeat::spawn(stage.config.clone(), HeartbeatConfig { interval }).unwrap();
    let acker = Acker::spawn(stage.queue.clone(), heartbeat.clone());
    let (gates, shutdown) = (Gates::new(), CancellationToken::new());
    let config = ClaimerConfig { queues, worker: worker(), batch: 16, slots };
    let (claimer, jobs) =
        Claimer::spawn(stage.queue.clone(), heartbeat.clone(), config, gates.clone(), shutdown.clone());
    Roles { heartbeat, acker, claimer, jobs, gates, shutdown }
}

impl Roles {
    async fn next(&mut self) -> Job {
        timeout(DEADLINE, self.jobs.recv()).await.expect("no job in time").unwrap()
    }

    async fn none_within(&mut self, ms: u64) -> bool {
        timeout(Duration::from_millis(ms), self.jobs.recv()).await.is_err()
    }
}

/// Waits until a worker hears of wake-ups, on one channel for each partition.
async fn subscribed(stage: &Stage, partitions: u16) {
    let raw = stage.raw().await;
    let heard = async || {
        let channels: Vec<String> =
            redis::cmd("PUBSUB").arg("CHANNELS").query_async(&mut raw.clone()).await.unwrap();
        (channels.len() == usize::from(partitions)).then_some(())
    };
    eventually(DEADLINE, heard, async || "no subscription".to_owned()).await;
}

/// The middle one: this machine may pause us, but not most of the time.
fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

async fn state(stage: &Stage) -> String {
    format!("{:?}", stage.queue.stats(&name()).await)
}

#[tokio::test]
async fn rule_24_a_worker_claims_no_more_than_its_free_slots() {
    let stage = Stage::new().await;
    stage.queue.push(&jobs(20)).await.unwrap();
    let mut roles = roles(&stage, 3);
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(roles.next().await);
    }
    assert!(roles.none_within(300).await, "a fourth job came although three slots are taken");
    assert_eq!(stage.queue.stats(&name()).await.unwrap().in_flight, 3);
    assert_eq!(roles.claimer.in_use(), 3);
    let done = held.pop().unwrap();
    roles.acker.done(&done.lease, Done::Ack).await;
    assert!(roles.none_within(200).await, "the slot belongs to the job until it is dropped");
    drop(done);
    held.push(roles.next().await);
    assert!(roles.none_within(200).await);
}

#[tokio::test]
async fn a_push_wakes_an_idle_worker_long_before_its_safety_poll() {
    let stage = Stage::with(|config| config.safety_poll = Duration::from_mins(10)).await;
    let mut roles = roles(&stage, 4);
    let scheduler = Scheduler::spawn(stage.queue.clone(), vec![name()], roles.shutdown.clone());
    assert!(roles.none_within(300).await);
    let mut waits = Vec::new();
    for _ in 0..20 {
        let pushed = Instant::now();
        stage.queue.push(&jobs(1)).await.unwrap();
        let job = roles.next().await;
        waits.push(pushed.elapsed());
        roles.acker.done(&job.lease, Done::Ack).await;
        roles.acker.flush().await;
    }
    assert!(median(waits.clone()) < Duration::from_millis(500), "{waits:?}");
    // A job that comes back wakes as well.
    stage.queue.push(&jobs(1)).await.unwrap();
    let job = roles.next().await;
    roles.acker.done(&job.lease, Done::Release(Duration::ZERO)).await;
    drop(job);
    roles.next().await;
    scheduler.abort();
}

#[tokio::test]
async fn a_wake_up_that_was_lost_is_made_up_for_by_the_safety_poll() {
    let stage = Stage::with(|config| config.safety_poll = Duration::from_millis(200)).await;
    let mut roles = roles(&stage, 4);
    subscribed(&stage, 1).await;
    // The subscription breaks and can't be renewed, so that no wake-up comes.
    let mut raw = stage.raw().await;
    let () =
        redis::cmd("ACL").arg(&["SETUSER", "default", "-subscribe"]).query_async(&mut raw).await.unwrap();
    let killed: u32 =
        redis::cmd("CLIENT").arg(&["KILL", "TYPE", "PUBSUB"]).query_async(&mut raw).await.unwrap();
    assert_eq!(killed, 1, "one subscription for each worker");
    for _ in 0..3 {
        stage.queue.push(&jobs(1)).await.unwrap();
        let job = roles.next().await;
        roles.acker.done(job.lease, Done::Ack).await;
    }
    let () =
        redis::cmd("ACL").arg(&["SETUSER", "default", "+subscribe"]).query_async(&mut raw).await.unwrap();
    // And the subscription comes back.
    subscribed(&stage, 1).await;
}

#[tokio::test]
async fn rule_24_an_idle_worker_costs_at_most_three_commands_a_second() {
    for partitions in [1, 4] {
        let stage = Stage::with(|config| config.partitions = partitions).await;
        let mut roles = roles(&stage, 4);
        let queues = vec![name()];
        let _reaper = Reaper::spawn(stage.queue.clone(), queues.clone(), roles.shutdown.clone());
        let _scheduler = Scheduler::spawn(stage.queue.clone(), queues, roles.shutdown.clone());
        // A new subscription makes the worker look everywhere once.
        subscribed(&stage, partitions).await;
        assert!(roles.none_within(1500).await);
        // What a worker sends, by the names of its commands.
        let sent = || stage.calls(|name| ["evalsha", "eval", "exists", "ping", "get", "set"].contains(&name));
        let (begun, before) = (Instant::now(), sent().await);
        assert!(roles.none_within(10_000).await);
        let count = sent().await - before;
        let seconds = begun.elapsed().as_secs_f64();
        println!("{partitions} partitions: {count} commands in {seconds:.2} s");
        // What comes every second comes once more in a time that begins right before it.
        let most = 3 * (seconds as u64 + 1);
        assert!(count <= most, "{partitions} partitions: {count} commands in {seconds:.2} s");
    }
}

/// One thread, on which the acker would go first among all that the last job to end has woken.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn jobs_that_end_at_once_are_acked_by_one_call() {
    const JOBS: usize = 12;
    let stage = Stage::new().await;
    stage.queue.push(&jobs(1 + JOBS)).await.unwrap();
    let mut roles = roles(&stage, 1 + JOBS);
    // From now on Redis knows the script. The slots stay taken, so that nothing is claimed.
    let first = roles.next().await;
    roles.acker.done(&first.lease, Done::Ack).await;
    roles.acker.flush().await;
    let calls = || stage.calls(|name| name == "evalsha");
    let (together, mut ends) = (Arc::new(Barrier::new(JOBS)), JoinSet::new());
    let mut claimed = Vec::new();
    for _ in 0..JOBS {
        claimed.push(roles.next().await);
    }
    let before = calls().await;
    for job in claimed {
        let (together, acker) = (Arc::clone(&together), roles.acker.clone());
        ends.spawn(async move {
            together.wait().await;
            acker.done(&job.lease, Done::Ack).await;
            job
        });
    }
    let ended = ends.join_all().await;
    roles.acker.flush().await;
    assert_eq!(ended.len(), JOBS);
    assert_eq!(calls().await - before, 1);
}

#[tokio::test]
async fn queues_of_one_worker_are_served_in_turn() {
    let stage = Stage::new().await;
    let other = QueueName::new("embed").unwrap();
    let mut all = jobs(40);
    all.extend((0..40).map(|_| Envelope { queue: other.clone(), ..job("acme", 9) }));
    stage.queue.push(&all).await.unwrap();
    let mut roles = roles_for(&stage, 4, vec![name(), other.clone()]);
    let mut order = Vec::new();
    for _ in 0..40 {
        let job = roles.next().await;
        order.push(job.envelope.queue.clone());
        roles.acker.done(&job.lease, Done::Ack).await;
    }
    let first = order.iter().filter(|queue| **queue == name()).count();
    assert!((10..=30).contains(&first), "{first} of 40 jobs came from the first queue");
}

#[tokio::test]
async fn a_closed_gate_pauses_its_queue_only_and_opens_at_once() {
    let stage = Stage::new().await;
    let other = QueueName::new("embed").unwrap();
    let mut roles = roles_for(&stage, 8, vec![name(), other.clone()]);
    roles.gates.close(&name(), "postgres is down");
    stage.queue.push(&jobs(1)).await.unwrap();
    stage.queue.push(&[Envelope { queue: other.clone(), ..job("acme", 5) }]).await.unwrap();
    let running = roles.next().await;
    assert_eq!(running.envelope.queue, other);
    assert!(roles.none_within(1500).await, "a paused queue was claimed from");
    roles.gates.open(&name());
    assert_eq!(roles.next().await.envelope.queue, name());
}

#[tokio::test]
async fn an_opened_gate_is_noticed_long_before_the_safety_poll() {
    let stage = Stage::with(|config| config.safety_poll = Duration::from_mins(10)).await;
    let mut roles = roles(&stage, 4);
    subscribed(&stage, 1).await;
    let mut waits = Vec::new();
    for _ in 0..5 {
        roles.gates.close(&name(), "postgres is down");
        stage.queue.push(&jobs(1)).await.unwrap();
        // Long enough for the push to be heard of, and to be no reason to look any more.
        assert!(roles.none_within(200).await, "a paused queue was claimed from");
        let opened = Instant::now();
        roles.gates.open(&name());
        let job = roles.next().await;
        waits.push(opened.elapsed());
        roles.acker.done(&job.lease, Done::Ack).await;
        roles.acker.flush().await;
    }
    assert!(median(waits.clone()) < Duration::from_millis(500), "{waits:?}");
}

#[tokio::test]
async fn shutdown_gives_back_what_was_claimed_and_not_handed_over() {
    let stage = Stage::new().await;
    let all = jobs(10);
    stage.queue.push(&all).await.unwrap();
    let mut roles = roles(&stage, 8);
    let first = roles.next().await;
    eventually(
        DEADLINE,
        async || (stage.queue.stats(&name()).await.unwrap().in_flight == 8).then_some(()),
        async || state(&stage).await,
    )
    .await;
    roles.shutdown.cancel();
    roles.claimer.join().await;
    // What was taken before the end is the caller's.
    let mut mine = HashSet::from([first.envelope.id]);
    while let Some(job) = roles.jobs.recv().await {
        mine.insert(job.envelope.id);
    }
    assert!(mine.len() <= 2, "{mine:?}");
    let stats = stage.queue.stats(&name()).await.unwrap();
    assert_eq!((stats.depth(), stats.in_flight), (10 - mine.len() as u64, mine.len() as u64));
    let rest: Vec<_> = stage.claim(9).await.iter().map(|claim| claim.envelope.id).collect();
    let expected: Vec<_> = all.iter().map(|job| job.id).filter(|id| !mine.contains(id)).take(9).collect();
    assert_eq!(rest, expected, "they went back to their places in front");
}

#[tokio::test]
async fn a_dropped_receiver_ends_the_claimer_and_loses_nothing() {
    let stage = Stage::new().await;
    stage.queue.push(&jobs(10)).await.unwrap();
    let roles = roles(&stage, 4);
    drop(roles.jobs);
    timeout(DEADLINE, roles.claimer.join()).await.expect("the claimer goes on without a receiver");
    let stats = stage.queue.stats(&name()).await.unwrap();
    assert_eq!((stats.in_flight, stats.depth()), (0, 10));
}

// One runtime thread: what blocks it blocks everything but the heartbeat.
#[tokio::test(flavor = "current_thread")]
async fn rule_5_a_busy_runtime_does_not_starve_the_heartbeat() {
    let stage = Stage::with(|config| config.lease = Duration::from_secs(5)).await;
    stage.queue.push(&jobs(3)).await.unwrap();
    let claims = stage.claim(3).await;
    let heartbeat = Heartbeat::spawn(stage.config.clone(), beat_every(400)).unwrap();
    let leases: Vec<_> = claims.iter().map(|claim| heartbeat.register(claim)).collect();
    let busy_until = Instant::now() + Duration::from_secs(8);
    while Instant::now() < busy_until {
        std::hint::spin_loop();
    }
    assert!(
        stage.queue.reap(&name()).await.unwrap().is_empty(),
        "a lease ran out while the runtime was busy"
    );
    for lease in &leases {
        assert!(!lease.remaining().is_zero(), "{lease:?}");
        assert!(!lease.is_lost());
    }
}

#[tokio::test]
async fn rule_5_a_lost_lease_is_told_at_once() {
    let stage = Stage::with(|config| config.lease = Duration::from_secs(30)).await;
    stage.queue.push(&jobs(1)).await.unwrap();
    let claims = stage.claim(1).await;
    let heartbeat = Heartbeat::spawn(stage.config.clone(), beat_every(100)).unwrap();
    let lease = heartbeat.register(&claims[0]);
    lease.valid(Duration::from_millis(500)).await.unwrap();
    stage.queue.at(i64::MAX / 4096).reap(&name()).await.unwrap();
    // By the next heartbeat, not by the lease's end.
    timeout(Duration::from_secs(10), lease.lost().cancelled()).await.expect("not told within 10 s");
    assert!(lease.valid(Duration::ZERO).await.is_err());
    assert!(heartbeat.is_empty());
}

#[tokio::test]
async fn rule_4_the_local_lease_ends_before_the_one_in_redis() {
    let stage = Stage::with(|config| config.lease = Duration::from_secs(5)).await;
    stage.queue.push(&jobs(1)).await.unwrap();
    let claims = stage.claim(1).await;
    let heartbeat = Heartbeat::spawn(stage.config.clone(), beat_every(100)).unwrap();
    let lease = heartbeat.register(&claims[0]);
    let mut raw = stage.raw().await;
    for _ in 0..20 {
        tokio::time::sleep(Duration::from_millis(20)).await;
        // In this order, so that time that passes in between can only make the local end look earlier.
        let (seconds, micros): (i64, i64) = redis::cmd("TIME").query_async(&mut raw).await.unwrap();
        let local = lease.remaining();
        let expiry = stage.queue.leases(&name()).await.unwrap()[0].1;
        let in_redis = expiry - (seconds * 1000 + micros / 1000);
        assert!(local.as_millis() as i64 <= in_redis + 1, "local {local:?}, in Redis {in_redis} ms");
    }
}

#[tokio::test]
async fn a_job_that_is_dropped_without_an_answer_comes_back() {
    let stage = Stage::with(|config| config.lease = Duration::from_secs(1)).await;
    stage.queue.push(&jobs(1)).await.unwrap();
    let mut roles = roles(&stage, 2);
    let _reaper = Reaper::spawn(stage.queue.clone(), vec![name()], roles.shutdown.clone());
    let first = roles.next().await;
    let (id, token) = (first.envelope.id, first.lease.lease_ref().token);
    drop(first);
    let again = roles.next().await;
    assert_eq!(again.envelope.id, id);
    assert_ne!(again.lease.lease_ref().token, token);
}

#[tokio::test]
async fn a_due_job_runs_on_time() {
    // The scheduler looks once, which is before the jobs are due, and then wakes for each of them: its poll is far away.
    let stage = Stage::with(|config| config.safety_poll = Duration::from_mins(10)).await;
    let mut roles = roles(&stage, 4);
    subscribed(&stage, 1).await;
    let raw = stage.raw().await;
    let now = async || {
        let (seconds, micros): (i64, i64) = redis::cmd("TIME").query_async(&mut raw.clone()).await.unwrap();
        seconds * 1000 + micros / 1000
    };
    let first = now().await + 2500;
    let all: Vec<Envelope> =
        (0..5).map(|n| Envelope { run_at_ms: Some(first + n * 300), ..job("acme", 5) }).collect();
    stage.queue.push(&all).await.unwrap();
    let _scheduler = Scheduler::spawn(stage.queue.clone(), vec![name()], roles.shutdown.clone());
    let mut late = Vec::new();
    for _ in &all {
        let job = roles.next().await;
        late.push(now().await - job.envelope.run_at_ms.unwrap());
        roles.acker.done(&job.lease, Done::Ack).await;
    }
    assert!(late.iter().all(|late| *late >= 0), "it ran before its time: {late:?} ms after it");
    let late: Vec<Duration> = late.into_iter().map(|late| Duration::from_millis(late as u64)).collect();
    assert!(median(late.clone()) < Duration::from_millis(500), "it ran {late:?} after its time");
}

#[tokio::test]
async fn due_jobs_are_promoted_although_another_place_fails() {
    let stage = Stage::with(|config| config.safety_poll = Duration::from_mins(10)).await;
    let (mut raw, shutdown) = (stage.raw().await, CancellationToken::new());
    // Every look at this queue is an error, as if its node were away.
    let (broken, schedule) = (QueueName::new("embed").unwrap(), "{flotilla:embed:0}:s");
    let () = redis::cmd("SET").arg(schedule).arg("x").query_async(&mut raw).await.unwrap();
    let (seconds, micros): (i64, i64) = redis::cmd("TIME").query_async(&mut raw).await.unwrap();
    let soon = Some(seconds * 1000 + micros / 1000 + 1500);
    stage.queue.push(&[Envelope { run_at_ms: soon, ..job("acme", 5) }]).await.unwrap();
    let queues = vec![broken.clone(), name()];
    let _scheduler = Scheduler::spawn(stage.queue.clone(), queues, shutdown.clone());
    let waiting = async |queue: &QueueName| {
        let stats = stage.queue.stats(queue).await.ok()?;
        (stats.depth() == 1).then_some(())
    };
    eventually(DEADLINE, async || waiting(&name()).await, async || state(&stage).await).await;
    // And the other place is looked at until it is well again.
    let () = redis::cmd("DEL").arg(schedule).query_async(&mut raw).await.unwrap();
    let job = Envelope { queue: broken.clone(), run_at_ms: soon.map(|at| at + 2500), ..job("acme", 5) };
    stage.queue.push(&[job]).await.unwrap();
    eventually(DEADLINE, async || waiting(&broken).await, async || state(&stage).await).await;
    shutdown.cancel();
}

#[tokio::test]
async fn rule_13_a_dead_workers_jobs_go_to_another() {
    let stage = Stage::with(|config| config.lease = Duration::from_secs(2)).await;
    stage.queue.push(&jobs(3)).await.unwrap();
    // This worker claims and dies: nobody renews its leases.
    let dead = stage.claim(3).await;
    let mut roles = roles(&stage, 8);
    let _reaper = Reaper::spawn(stage.queue.clone(), vec![name()], roles.shutdown.clone());
    let mut seen = HashSet::new();
    for _ in 0..3 {
        let job = roles.next().await;
        seen.insert(job.envelope.id);
        roles.acker.done(&job.lease, Done::Ack).await;
    }
    assert_eq!(seen, dead.iter().map(|claim| claim.envelope.id).collect());
    roles.acker.flush().await;
    assert_eq!(stage.queue.stats(&name()).await.unwrap().in_flight, 0);
    assert!(roles.heartbeat.is_empty());
}

#[tokio::test]
async fn a_dead_workers_job_comes_back_within_a_second_of_its_leases_end_in_any_partition() {
    // A turn through all partitions takes as long as a lease.
    let lease = Duration::from_secs(10);
    let stage = Stage::with(|config| (config.lease, config.partitions) = (lease, 10)).await;
    let shutdown = CancellationToken::new();
    stage.queue.push(&jobs(100)).await.unwrap();
    let _reaper = Reaper::spawn(stage.queue.clone(), vec![name()], shutdown.clone());
    let begun = Instant::now();
    assert_eq!(stage.claim(100).await.len(), 100);
    let stats = async || stage.queue.stats(&name()).await.unwrap();
    let back = async || (stats().await.in_flight == 0).then_some(());
    eventually(DEADLINE, back, async || format!("{:?}", stats().await)).await;
    // A busy machine may need some more; by turns alone the last would need ten.
    assert!(begun.elapsed() < lease + Duration::from_secs(4), "after {:?}", begun.elapsed());
    shutdown.cancel();
}

#[tokio::test]
async fn a_heartbeat_slower_than_the_lease_is_refused() {
    let config = QueueConfig { lease: Duration::from_secs(10), ..QueueConfig::default() };
    let error = Heartbeat::spawn(config, beat_every(6000)).unwrap_err();
    assert!(matches!(error, QueueError::Config { setting: "FLOTILLA_HEARTBEAT_MS", .. }), "{error}");
}
