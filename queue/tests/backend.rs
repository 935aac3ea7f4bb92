//! The queue under apalis: layers, concurrency, retries, graceful stop.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use apalis::layers::WorkerBuilderExt;
use apalis::prelude::{BoxDynError, Data, EventListenerExt, RetryAfterError, WorkerBuilder, WorkerContext};
use queue::{
    AckLayer, Acker, Claimer, ClaimerConfig, Envelope, Gates, Heartbeat, HeartbeatConfig, Job, JobId,
    QueueBackend, QueueConfig, Scheduler,
};
use support::{DEADLINE, Stage, eventually, job, jobs, name, worker};
use tokio::{
    sync::Semaphore,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

#[derive(Clone, Default)]
struct Log {
    runs: Arc<Mutex<HashMap<JobId, u32>>>,
    now: Arc<Mutex<(u32, u32)>>,
}

impl Log {
    fn begin(&self, id: JobId) -> u32 {
        let mut now = self.now.lock().unwrap();
        now.0 += 1;
        now.1 = now.1.max(now.0);
        let mut runs = self.runs.lock().unwrap();
        let count = runs.entry(id).or_insert(0);
        *count += 1;
        *count
    }

    fn end(&self) {
        self.now.lock().unwrap().0 -= 1;
    }
}

async fn handle(job: Job, log: Data<Log>) -> Result<(), BoxDynError> {
    let run = log.begin(job.envelope.id);
    sleep(Duration::from_millis(if job.envelope.kind == "long" { 600 } else { 5 })).await;
    log.end();
    match job.envelope.kind.as_str() {
        "flaky" if run < 3 => Err("not yet".into()),
        "later" if run < 2 => Err(RetryAfterError::new("come back", Duration::from_millis(300)).into()),
        "panic" if run < 2 => panic!("a handler's bug"),
        _ => Ok(()),
    }
}

fn backend(stage: &Stage, slots: usize, shutdown: &CancellationToken) -> (QueueBackend, Acker) {
    let interval = HeartbeatConfig { interval: stage.config.lease / 4 };
    let heartbeat = Heartbeat::spawn(stage.config.clone(), interval).unwrap();
    let acker = Acker::spawn(stage.queue.clone(), heartbeat.clone());
    Scheduler::spawn(stage.queue.clone(), vec![name()], shutdown.clone());
    queue::Reaper::spawn(stage.queue.clone(), vec![name()], shutdown.clone());
    let config = ClaimerConfig { queues: vec![name()], worker: worker(), batch: 16, slots };
    let (claimer, inbox) =
        Claimer::spawn(stage.queue.clone(), heartbeat, config, Gates::new(), shutdown.clone());
    (QueueBackend::new(claimer, inbox, acker.clone()), acker)
}

fn quick(config: &mut QueueConfig) {
    config.lease = Duration::from_secs(2);
    config.safety_poll = Duration::from_millis(200);
}

fn kind(kind: &str) -> Envelope {
    Envelope { kind: kind.to_owned(), ..job("acme", 9) }
}

#[tokio::test]
async fn rule_26_an_apalis_worker_runs_retries_and_stops_gracefully_over_this_backend() {
    let stage = Stage::with(quick).await;
    let mut all = jobs(60);
    all.extend([kind("flaky"), kind("later"), kind("panic")]);
    stage.queue.push(&all).await.unwrap();
    let (log, shutdown) = (Log::default(), CancellationToken::new());
    let (backend, acker) = backend(&stage, 16, &shutdown);
    let (context, contexts) = tokio::sync::oneshot::channel::<WorkerContext>();
    let context = Mutex::new(Some(context));
    let apalis = WorkerBuilder::new("test")
        .backend(backend)
        .catch_panic()
        .layer(AckLayer::new(acker, Duration::from_millis(50)))
        .concurrency(4)
        .data(log.clone())
        .on_event(move |worker, _| {
            if let Some(context) = context.lock().unwrap().take() {
                context.send(worker.clone()).ok();
            }
        })
        .build(handle);
    let running = tokio::spawn(apalis.run());
    let drained = async || {
        let stats = stage.queue.stats(&name()).await.unwrap();
        (stats.depth() + stats.scheduled + stats.in_flight == 0).then_some(())
    };
    let state = async || {
        let runs = log.runs.lock().unwrap().len();
        format!("{runs} ran; {:?}", stage.queue.stats(&name()).await)
    };
    eventually(DEADLINE, drained, state).await;
    let runs = log.runs.lock().unwrap().clone();
    assert_eq!(runs.len(), all.len());
    for envelope in &all {
        let expected = match envelope.kind.as_str() {
            "flaky" => 3,
            "later" | "panic" => 2,
            _ => 1,
        };
        assert_eq!(runs[&envelope.id], expected, "{} ran {} times", envelope.kind, runs[&envelope.id]);
    }
    assert_eq!(log.now.lock().unwrap().1, 4, "the concurrency layer holds");

    // A stop in the middle: what runs is finished and acked, what waits goes back.
    let long: Vec<Envelope> = (0..10).map(|_| kind("long")).collect();
    stage.queue.push(&long).await.unwrap();
    eventually(
        DEADLINE,
        async || (log.now.lock().unwrap().0 == 4).then_some(()),
        async || format!("{:?} run", log.now.lock().unwrap()),
    )
    .await;
    contexts.await.unwrap().stop().unwrap();
    timeout(DEADLINE, running).await.expect("the worker doesn't stop").unwrap().unwrap();
    let ran = long.iter().filter(|envelope| log.runs.lock().unwrap().contains_key(&envelope.id)).count();
    let stats = stage.queue.stats(&name()).await.unwrap();
    assert_eq!((stats.depth(), stats.in_flight), (10 - ran as u64, 0), "{ran} of 10 ran");
    assert!((4..10).contains(&ran), "{ran} of 10 ran");
}

/// Waits until it may end.
async fn hold(_: Job, go: Data<Arc<Semaphore>>) -> Result<(), BoxDynError> {
    go.acquire().await?.forget();
    Ok(())
}

#[tokio::test]
async fn rule_26_a_worker_that_pauses_or_stops_claims_nothing_and_gives_back_what_it_has_not_begun() {
    let stage = Stage::with(quick).await;
    stage.queue.push(&jobs(10)).await.unwrap();
    let (go, shutdown) = (Arc::new(Semaphore::new(0)), CancellationToken::new());
    let (backend, acker) = backend(&stage, 16, &shutdown);
    let (context, contexts) = tokio::sync::oneshot::channel::<WorkerContext>();
    let context = Mutex::new(Some(context));
    let apalis = WorkerBuilder::new("test")
        .backend(backend)
        .layer(AckLayer::new(acker, Duration::from_millis(50)))
        .concurrency(4)
        .data(go.clone())
        .on_event(move |worker, _| {
            if let Some(context) = context.lock().unwrap().take() {
                context.send(worker.clone()).ok();
            }
        })
        .build(hold);
    let running = tokio::spawn(apalis.run());
    let worker = contexts.await.unwrap();
    // How many wait in Redis, and how many are leased.
    let comes_to = async |expected: (u64, u64)| {
        let seen = async || {
            let stats = stage.queue.stats(&name()).await.unwrap();
            (stats.depth(), stats.in_flight)
        };
        let check = async || (seen().await == expected).then_some(());
        eventually(DEADLINE, check, async || format!("{:?} and not {expected:?}", seen().await)).await;
    };
    comes_to((0, 10)).await;
    let begun = async || (worker.task_count() == 4).then_some(());
    eventually(DEADLINE, begun, async || format!("{} run", worker.task_count())).await;
    worker.pause().unwrap();
    comes_to((6, 4)).await;
    // What ends makes room, and what comes wakes it: neither is a reason to claim.
    go.add_permits(2);
    comes_to((6, 2)).await;
    stage.queue.push(&jobs(5)).await.unwrap();
    let others = stage.claim(20).await;
    assert_eq!(others.len(), 11);
    let back: Vec<_> = others.iter().map(|claim| (claim.lease_ref(), Duration::ZERO)).collect();
    stage.queue.release(&back).await.unwrap();
    worker.resume().unwrap();
    comes_to((0, 13)).await;
    go.add_permits(3);
    comes_to((0, 10)).await;
    let begun = async || (worker.task_count() == 4).then_some(());
    eventually(DEADLINE, begun, async || format!("{} run", worker.task_count())).await;
    worker.stop().unwrap();
    comes_to((6, 4)).await;
    go.add_permits(4);
    timeout(DEADLINE, running).await.expect("the worker doesn't stop").unwrap().unwrap();
    comes_to((6, 0)).await;
}

#[tokio::test]
async fn a_shutdown_of_the_claimer_ends_the_apalis_worker() {
    let stage = Stage::with(quick).await;
    stage.queue.push(&jobs(5)).await.unwrap();
    let (log, shutdown) = (Log::default(), CancellationToken::new());
    let (backend, acker) = backend(&stage, 4, &shutdown);
    let apalis = WorkerBuilder::new("test")
        .backend(backend)
        .layer(AckLayer::new(acker, Duration::from_millis(50)))
        .data(log.clone())
        .build(handle);
    let running = tokio::spawn(apalis.run());
    eventually(
        DEADLINE,
        async || (log.runs.lock().unwrap().len() == 5).then_some(()),
        async || format!("{} ran", log.runs.lock().unwrap().len()),
    )
    .await;
    shutdown.cancel();
    timeout(DEADLINE, running).await.expect("the worker doesn't end").unwrap().unwrap();
    let stats = stage.queue.stats(&name()).await.unwrap();
    assert_eq!((stats.depth(), stats.in_flight), (0, 0));
}
