//! Redis refused, hung, restarted: nobody gives up, nothing is lost, nothing runs twice.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use queue::{
    Acker, Claimer, ClaimerConfig, Done, Gates, Heartbeat, HeartbeatConfig, JobId, QueueConfig, QueueError,
    Reaper, Scheduler,
};
use support::{Stage, eventually, job, jobs, name, worker};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

const LEASE: Duration = Duration::from_secs(2);

fn impatient(config: &mut QueueConfig) {
    config.lease = LEASE;
    config.response_timeout = Duration::from_millis(400);
    config.connect_timeout = Duration::from_millis(400);
    config.safety_poll = Duration::from_millis(250);
}

#[tokio::test]
async fn rule_16_a_hung_redis_is_unavailable_within_the_timeout_and_serves_again_after() {
    let stage = Stage::with(impatient).await;
    stage.queue.push(&jobs(10)).await.unwrap();
    stage.redis().pause().await.unwrap();
    for _ in 0..3 {
        let begun = Instant::now();
        let error = stage.queue.claim(&name(), &worker(), 1).await.unwrap_err();
        assert!(matches!(error, QueueError::Unavailable(_)), "{error}");
        assert!(begun.elapsed() < Duration::from_millis(1200), "{:?}", begun.elapsed());
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
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    stage.redis().resume().await.unwrap();
    eventually(
        Duration::from_secs(5),
        async || stage.queue.stats(&name()).await.ok(),
        async || format!("{:?}", stage.queue.stats(&name()).await),
    )
    .await;
    stage.queue.ping().await.unwrap();
}

#[tokio::test]
async fn rule_16_a_lease_is_not_lost_by_an_outage_but_waits_for_its_confirmation() {
    let stage = Stage::with(impatient).await;
    stage.queue.push(&jobs(1)).await.unwrap();
    let claims = stage.claim(1).await;
    let interval = HeartbeatConfig { interval: Duration::from_millis(300) };
    let heartbeat = Heartbeat::spawn(stage.config.clone(), interval).unwrap();
    let lease = heartbeat.register(&claims[0]);
    stage.redis().kill9().await.unwrap();
    eventually(LEASE * 2, async || lease.remaining().is_zero().then_some(()), async || format!("{lease:?}"))
        .await;
    assert!(!lease.is_lost());
    let waiting = lease.clone();
    let valid = tokio::spawn(async move { waiting.valid(Duration::from_millis(500)).await });
    assert!(timeout(LEASE, lease.lost().cancelled()).await.is_err(), "declared lost during an outage");
    assert!(!valid.is_finished(), "an external call may not start now");
    stage.redis().restart().await.unwrap();
    timeout(Duration::from_secs(5), valid).await.expect("not confirmed within 5 s").unwrap().unwrap();
    assert!(lease.remaining() > Duration::from_millis(400), "{lease:?}");
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
    let config = QueueConfig { url: format!("redis://127.0.0.1:{}", proxy.port), ..stage.config.clone() };
    let queue = queue::Queue::connect(config).await.unwrap();
    queue.push(&jobs(1)).await.unwrap();
    queue.ping().await.unwrap();
    proxy.silence.send_modify(|times| *times += 1);
    let error = queue.stats(&name()).await.unwrap_err();
    assert!(error.is_unavailable(), "{error}");
    assert_eq!(queue.stats(&name()).await.unwrap().depth(), 1, "the next call uses a new connection");
    assert!(queue.ping().await.is_err());
    queue.ping().await.unwrap();
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
                    () = sleep(if long { LEASE * 6 } else { Duration::from_millis(20) }) => {
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
    stage.queue.push(&all).await.unwrap();
    eventually(
        Duration::from_secs(10),
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
    eventually(
        Duration::from_secs(10),
        async || stage.queue.push(&more).await.ok(),
        async || "no push after the outage".to_owned(),
    )
    .await;
    all.extend(more);
    eventually(
        Duration::from_secs(40),
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
    timeout(Duration::from_secs(5), worker.claimer.join()).await.expect("the claimer didn't end");
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
    stage.queue.push(&jobs(1)).await.unwrap();
    let claims = stage.claim(1).await;
    let shutdown = CancellationToken::new();
    Reaper::spawn(stage.queue.clone(), vec![name()], shutdown.clone());
    // A worker that is cut off from Redis longer than the outage lasts.
    stage.redis().pause().await.unwrap();
    sleep(LEASE * 2).await;
    stage.redis().resume().await.unwrap();
    let back = Instant::now();
    eventually(
        Duration::from_secs(10),
        async || (stage.queue.stats(&name()).await.ok()?.depth() == 1).then_some(()),
        async || format!("{:?}", stage.queue.stats(&name()).await),
    )
    .await;
    assert!(back.elapsed() + Duration::from_millis(50) > LEASE, "reaped after {:?}", back.elapsed());
    assert_eq!(stage.queue.ack(&[claims[0].lease_ref()]).await.unwrap(), [false]);
    shutdown.cancel();
}
