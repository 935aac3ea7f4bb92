//! Redis refused, hung, restarted: nobody gives up, nothing is lost, nothing runs twice.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use queue::{
    Acker, Claimer, ClaimerConfig, Done, Envelope, Gates, Heartbeat, HeartbeatConfig, JobId, Queue,
    QueueConfig, QueueError, Reaper, Scheduler,
};
use support::{DEADLINE, Stage, eventually, job, jobs, name, worker};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

/// Within one the worker's roles must be back after an outage, although one answer may come too late on a busy machine.
const LEASE: Duration = Duration::from_secs(4);
/// How long an answer may take, and a connection.
const ANSWER: Duration = Duration::from_millis(1200);

fn impatient(config: &mut QueueConfig) {
    config.lease = LEASE;
    config.response_timeout = ANSWER;
    config.connect_timeout = ANSWER;
    config.safety_poll = Duration::from_millis(250);
}

/// Pushes jobs, and waits for the answer as long as it takes: a push made again could bring back jobs that have run.
async fn push(stage: &Stage, jobs: &[Envelope]) {
    let config =
        QueueConfig { connect_timeout: DEADLINE, response_timeout: DEADLINE, ..stage.config.clone() };
    Queue::lazy(config).unwrap().push(jobs).await.unwrap();
}

#[tokio::test]
async fn rule_16_a_hung_redis_is_unavailable_within_the_timeout_and_serves_again_after() {
    let stage = Stage::with(impatient).await;
    push(&stage, &jobs(10)).await;
    stage.redis().pause().await.unwrap();
    for _ in 0..3 {
        let begun = Instant::now();
        let error = stage.queue.claim(&name(), &worker(), 1).await.unwrap_err();
        assert!(matches!(error, QueueError::Unavailable(_)), "{error}");
        // One answer or one connection, and not a second try of either.
        assert!(begun.elapsed() < ANSWER * 3, "{:?}", begun.elapsed());
        assert!(stage.queue.ping().await.is_err());
    }
    // A crowd of callers shares the bad news instead of queueing for one timeout each.
    let begun = Instant::now();
    let calls: Vec<_> = (0..50)
        .map(|_| {
            let queue = stage.queue.clone();
            tokio::spawn(async move { queue.stats(&name()).await.is_err() })
        })
        .collect();
    for call in calls {
        assert!(call.await.unwrap());
    }
    assert!(begun.elapsed() < ANSWER * 8, "{:?}", begun.elapsed());
    stage.redis().resume().await.unwrap();
    eventually(
        DEADLINE,
        async || stage.queue.stats(&name()).await.ok(),
        async || format!("{:?}", stage.queue.stats(&name()).await),
    )
    .await;
    answers(&stage.queue).await;
}

/// Waits until a ping gets through, which has half a second: less than a busy machine may need once.
async fn answers(queue: &Queue) {
    eventually(DEADLINE, async || queue.ping().await.ok(), async || format!("{:?}", queue.ping().await))
        .await;
}

#[tokio::test]
async fn rule_16_a_lease_is_not_lost_by_an_outage_but_waits_for_its_confirmation() {
    let stage = Stage::with(impatient).await;
    push(&stage, &jobs(1)).await;
    let claims = stage.claim(1).await;
    let interval = HeartbeatConfig { interval: Duration::from_millis(300) };
    let heartbeat = Heartbeat::spawn(stage.config.clone(), interval).unwrap();
    let lease = heartbeat.register(&claims[0]);
    stage.redis().kill9().await.unwrap();
    eventually(DEADLINE, async || lease.remaining().is_zero().then_some(()), async || format!("{lease:?}"))
        .await;
    assert!(!lease.is_lost());
    let waiting = lease.clone();
    let valid = tokio::spawn(async move {
        // Read at once: a little later it would tell of this machine's pauses.
        waiting.valid(Duration::from_millis(500)).await.map(|()| waiting.remaining())
    });
    assert!(timeout(LEASE, lease.lost().cancelled()).await.is_err(), "declared lost during an outage");
    assert!(!valid.is_finished(), "an external call may not start now");
    stage.redis().restart().await.unwrap();
    let remaining = timeout(DEADLINE, valid).await.expect("not confirmed in time").unwrap().unwrap();
    assert!(remaining > Duration::from_millis(400), "{remaining:?}");
}

/// A way to Redis whose open connections can fall silent without being closed, as behind a router that lost its state.
struct Proxy {
    port: u16,
    silence: tokio::sync::watch::Sender<u32>,
}

impl Proxy {
    async fn to(port: u16) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy =
            Self { port: listener.local_addr().unwrap().port(), silence: tokio::sync::watch::Sender::new(0) };
        let silence = proxy.silence.clone();
        tokio::spawn(async move {
            while let Ok((mut near, _)) = listener.accept().await {
                let mut silence = silence.subscribe();
                tokio::spawn(async move {
                    let mut far = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.unwrap();
                    tokio::select! {
                        end = tokio::io::copy_bidirectional(&mut near, &mut far) => drop(end),
                        // Both ends stay open, and nothing passes any more.
                        _ = silence.changed() => std::future::pending().await,
                    }
                });
            }
        });
        proxy
    }
}

#[tokio::test]
async fn rule_16_a_connection_that_fell_silent_is_replaced() {
    let stage = Stage::with(impatient).await;
    let proxy = Proxy::to(stage.redis().port()).await;
    // Only one call has to wait for it, and the next one may have to on a busy machine.
    let patient = Duration::from_secs(4);
    let config = QueueConfig {
        url: format!("redis://127.0.0.1:{}", proxy.port),
        connect_timeout: patient,
        response_timeout: patient,
        ..stage.config.clone()
    };
    let queue = Queue::connect(config).await.unwrap();
    queue.push(&jobs(1)).await.unwrap();
    answers(&queue).await;
    proxy.silence.send_modify(|times| *times += 1);
    let error = queue.stats(&name()).await.unwrap_err();
    assert!(error.is_unavailable(), "{error}");
    assert_eq!(queue.stats(&name()).await.unwrap().depth(), 1, "the next call uses a new connection");
    assert!(queue.ping().await.is_err());
    answers(&queue).await;
}

/// A worker process in small: all roles, and handlers of which some are short and some outlast the outage.
struct Worker {
    runs: Arc<Mutex<HashMap<JobId, u32>>>,
    lost: Arc<Mutex<u32>>,
    claimer: Claimer,
    shutdown: CancellationToken,
}

fn run_worker(stage: &Stage) -> Worker {
    let interval = HeartbeatConfig { interval: LEASE / 5 };
    let heartbeat = Heartbeat::spawn(stage.config.clone(), interval).unwrap();
    let acker = Acker::spawn(stage.queue.clone(), heartbeat.clone());
    let shutdown = CancellationToken::new();
    Reaper::spawn(stage.queue.clone(), vec![name()], shutdown.clone());
    Scheduler::spawn(stage.queue.clone(), vec![name()], shutdown.clone());
    let config = ClaimerConfig { queues: vec![name()], worker: worker(), batch: 8, slots: 32 };
    let (claimer, mut inbox) =
        Claimer::spawn(stage.queue.clone(), heartbeat, config, Gates::new(), shutdown.clone());
    let (runs, lost) = (Arc::new(Mutex::new(HashMap::new())), Arc::new(Mutex::new(0)));
    let (counts, losses) = (Arc::clone(&runs), Arc::clone(&lost));
    tokio::spawn(async move {
        while let Some(job) = inbox.recv().await {
            let (counts, losses, acker) = (Arc::clone(&counts), Arc::clone(&losses), acker.clone());
            tokio::spawn(async move {
                let long = job.envelope.kind == "long";
                *counts.lock().unwrap().entry(job.envelope.id).or_insert(0) += 1;
                tokio::select! {
                    () = sleep(if long { LEASE * 5 } else { Duration::from_millis(20) }) => {
                        acker.done(&job.lease, Done::Ack).await;
                    }
                    () = job.lease.lost().cancelled_owned() => *losses.lock().unwrap() += 1,
                }
            });
        }
    });
    Worker { runs, lost, claimer, shutdown }
}

/// Load, an outage of three leases in the middle of it, more load; then everything must have run exactly once.
async fn survive(stage: Stage, down: impl AsyncFnOnce(&Stage), up: impl AsyncFnOnce(&Stage)) {
    let worker = run_worker(&stage);
    let mut all: Vec<_> =
        (0..8).map(|_| queue::Envelope { kind: "long".to_owned(), ..job("acme", 9) }).collect();
    all.extend(jobs(1500));
    push(&stage, &all).await;
    eventually(
        DEADLINE,
        async || (worker.runs.lock().unwrap().len() > 200).then_some(()),
        async || format!("{} runs", worker.runs.lock().unwrap().len()),
    )
    .await;
    // Under load: the worker is in the middle of claims and acks.
    down(&stage).await;
    let at_down = worker.runs.lock().unwrap().len();
    assert!(at_down < all.len(), "everything ran before the outage began");
    sleep(LEASE * 3).await;
    up(&stage).await;
    let more = jobs(300);
    push(&stage, &more).await;
    all.extend(more);
    eventually(
        DEADLINE * 2,
        async || {
            let stats = stage.queue.stats(&name()).await.ok()?;
            let runs = worker.runs.lock().unwrap().len();
            (runs == all.len() && stats.depth() + stats.in_flight + stats.scheduled == 0).then_some(())
        },
        async || {
            let runs = worker.runs.lock().unwrap().len();
            format!("{runs} of {} ran; {:?}", all.len(), stage.queue.stats(&name()).await)
        },
    )
    .await;
    let twice: Vec<_> =
        worker.runs.lock().unwrap().iter().filter(|(_, runs)| **runs > 1).map(|(id, _)| *id).collect();
    assert!(twice.is_empty(), "ran more than once: {twice:?}");
    assert_eq!(*worker.lost.lock().unwrap(), 0, "leases were lost");
    worker.shutdown.cancel();
    timeout(DEADLINE, worker.claimer.join()).await.expect("the claimer didn't end");
}

#[tokio::test]
async fn rule_26_the_same_worker_goes_on_after_redis_hung_for_three_leases_under_load() {
    let stage = Stage::with(impatient).await;
    survive(
        stage,
        async |stage: &Stage| stage.redis().pause().await.unwrap(),
        async |stage: &Stage| stage.redis().resume().await.unwrap(),
    )
    .await;
}

#[tokio::test]
async fn rule_26_the_same_worker_goes_on_after_redis_was_killed_for_three_leases_under_load() {
    let stage = Stage::with(impatient).await;
    // With `everysec` a killed server loses what waited for an fsync under way, and with it that jobs have run.
    let () = redis::cmd("CONFIG")
        .arg(&["SET", "appendfsync", "no"])
        .query_async(&mut stage.raw().await)
        .await
        .unwrap();
    survive(
        stage,
        async |stage: &Stage| stage.redis().kill9().await.unwrap(),
        async |stage: &Stage| stage.redis().restart().await.unwrap(),
    )
    .await;
}

#[tokio::test]
async fn rule_16_the_reaper_leaves_a_lease_time_to_be_renewed_after_an_outage() {
    let stage = Stage::with(impatient).await;
    push(&stage, &jobs(1)).await;
    let claims = stage.claim(1).await;
    let shutdown = CancellationToken::new();
    Reaper::spawn(stage.queue.clone(), vec![name()], shutdown.clone());
    // A worker that is cut off from Redis longer than the outage lasts.
    stage.redis().pause().await.unwrap();
    sleep(LEASE * 2).await;
    // Before and not after: the time that Redis counts from begins in between.
    let back = Instant::now();
    stage.redis().resume().await.unwrap();
    eventually(
        DEADLINE,
        async || (stage.queue.stats(&name()).await.ok()?.depth() == 1).then_some(()),
        async || format!("{:?}", stage.queue.stats(&name()).await),
    )
    .await;
    assert!(back.elapsed() + Duration::from_millis(50) > LEASE, "reaped after {:?}", back.elapsed());
    assert_eq!(stage.queue.ack(&[claims[0].lease_ref()]).await.unwrap(), [false]);
    shutdown.cancel();
}
