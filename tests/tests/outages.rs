//! Each store killed for 10 s, and then hung for 10 s, under load: no job is charged, lost or dead, and the same worker
//! processes go on (PROTOCOL.md 16, 17, 26).
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::time::Duration;

use e2e::{Fleet, LONG, WorkerProcess, text, wait_until};
use queue::JobId;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// How long a store is away each time: five leases.
const OUTAGE: Duration = Duration::from_secs(10);
/// Enqueued right before an outage, so that it meets jobs that wait and jobs that run.
const BURST: usize = 150;
/// What the load enqueues at once, and how often.
const BATCH: usize = 3;
const EVERY: Duration = Duration::from_millis(150);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Store {
    Postgres,
    QueueRedis,
    CacheRedis,
    Vectors,
}

/// Does the same to whichever server it is.
macro_rules! on_server {
    ($fleet:expr, $store:expr, $action:ident) => {
        match $store {
            Store::Postgres => $fleet.services.postgres().$action().await,
            Store::QueueRedis => $fleet.services.redis_queue().$action().await,
            Store::CacheRedis => $fleet.services.redis_cache().$action().await,
            Store::Vectors => $fleet.services.vectors().$action().await,
        }
        .expect(concat!(stringify!($action), " a server"))
    };
}

/// Enqueues until stopped; what the ledger can't accept now is offered again, under the same ids.
struct Load {
    stop: CancellationToken,
    task: JoinHandle<Vec<JobId>>,
}

impl Load {
    fn start(fleet: &Fleet) -> Self {
        let stop = CancellationToken::new();
        let (postgres, ends) = (fleet.postgres.clone(), stop.clone());
        let mut batches = (0..).map({
            let prototype = fleet.ingest_job("", "x");
            move |no| {
                (0..BATCH)
                    .map(|i| {
                        let document = format!("doc-{:05}", no * BATCH + i);
                        let payload = serde_json::json!({ "document": document, "text": text(&document, 1) });
                        let id = JobId::new();
                        sagas::stores::postgres::accept::NewJob {
                            id,
                            payload,
                            document: Some(document),
                            ..prototype.clone()
                        }
                    })
                    .collect::<Vec<_>>()
            }
        });
        let task = tokio::spawn(async move {
            let mut accepted = vec![];
            while !ends.is_cancelled() {
                let batch = batches.next().unwrap();
                while postgres.accept(&batch, false).await.is_err() {
                    tokio::time::sleep(EVERY).await;
                }
                accepted.extend(batch.iter().map(|job| job.id));
                tokio::time::sleep(EVERY).await;
            }
            accepted
        });
        Self { stop, task }
    }

    async fn finish(self) -> Vec<JobId> {
        self.stop.cancel();
        self.task.await.expect("the load")
    }
}

async fn succeeded(fleet: &Fleet) -> i64 {
    fleet.postgres.job_counts(None).await.expect("counts").succeeded
}

/// Waits until `more` further jobs have succeeded.
async fn progress(fleet: &Fleet, workers: &[WorkerProcess], what: &str, more: i64) {
    let before = succeeded(fleet).await;
    wait_until(what, LONG, async || {
        let counts = fleet.postgres.job_counts(None).await.map_err(|e| e.to_string())?;
        if counts.succeeded >= before + more {
            return Ok(());
        }
        let tails: Vec<String> = workers.iter().map(WorkerProcess::tail).collect();
        Err(format!("{counts:?}\n{}", tails.join("\n")))
    })
    .await;
}

/// Enqueues a burst and waits until the workers are in the middle of it.
async fn burst(fleet: &Fleet, workers: &[WorkerProcess], name: &str) -> Vec<JobId> {
    let names = (0..BURST).map(|no| format!("{name}-{no:03}"));
    let jobs = fleet.accept(names.map(|name| fleet.ingest_job(&name, &text(&name, 1))).collect()).await;
    progress(fleet, workers, "the workers are in the middle of a burst", 10).await;
    jobs
}

/// Waits out an outage, and shows that there was one: no job has ended for its last few seconds.
async fn sit_out(fleet: &Fleet, store: Store) {
    if store == Store::Postgres {
        tokio::time::sleep(OUTAGE).await;
        return;
    }
    // What was claimed before a queue's outage is brought to its end.
    tokio::time::sleep(OUTAGE * 7 / 10).await;
    let halted = succeeded(fleet).await;
    tokio::time::sleep(OUTAGE * 3 / 10).await;
    assert_eq!(succeeded(fleet).await, halted, "jobs ended without {store:?}");
}

async fn outages_of(store: Store) {
    let fleet = Fleet::start().await;
    let workers: Vec<_> = (0..2).map(|_| fleet.worker().concurrency(16).start()).collect();
    for worker in &workers {
        worker.ready().await;
    }
    let load = Load::start(&fleet);
    progress(&fleet, &workers, "the load is under way", 20).await;

    let mut jobs = burst(&fleet, &workers, "killed").await;
    on_server!(fleet, store, kill9);
    sit_out(&fleet, store).await;
    on_server!(fleet, store, restart);
    progress(&fleet, &workers, "work goes on after the store was killed", 30).await;

    jobs.extend(burst(&fleet, &workers, "hung").await);
    on_server!(fleet, store, pause);
    sit_out(&fleet, store).await;
    on_server!(fleet, store, resume);
    progress(&fleet, &workers, "work goes on after the store hung", 30).await;

    jobs.extend(load.finish().await);
    fleet.assert_all_succeeded(&jobs).await;
    let (charged, attempts, letters, lost): (i64, i64, i64, i64) = sqlx::query_as(
        "SELECT (SELECT count(*) FROM jobs WHERE attempts > 0), (SELECT count(*) FROM job_attempts),
                (SELECT count(*) FROM dead_letters), (SELECT count(*) FROM jobs WHERE lost_deliveries > 0)",
    )
    .fetch_one(fleet.postgres.pool())
    .await
    .unwrap();
    println!(
        "{store:?} killed and hung under load: {} jobs succeeded, {lost} after a lost lease",
        jobs.len()
    );
    assert!(jobs.len() > 2 * BURST, "that was no load: {} jobs", jobs.len());
    assert_eq!((charged, attempts, letters), (0, 0, 0), "jobs charged, attempts, dead letters");
    for worker in &workers {
        assert!(worker.alive(), "{} did not survive\n{}", worker.name, worker.tail());
        if store != Store::QueueRedis {
            let log = worker.log();
            assert!(log.contains("circuit breaker opens"), "{} noticed nothing", worker.name);
        }
    }
    let report = fleet.audit_clean().await;
    assert_eq!(report.counts.documents, jobs.len() as u64);
    for worker in &workers {
        assert!(worker.terminate().await.success(), "{}", worker.tail());
    }
    drop(workers);
    fleet.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn protocol_16_postgres_killed_and_hung_for_10_s_under_load_costs_nothing() {
    outages_of(Store::Postgres).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn protocol_16_26_the_queue_redis_killed_and_hung_for_10_s_under_load_costs_nothing() {
    outages_of(Store::QueueRedis).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn protocol_16_the_cache_redis_killed_and_hung_for_10_s_under_load_costs_nothing() {
    outages_of(Store::CacheRedis).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn protocol_16_the_vector_server_killed_and_hung_for_10_s_under_load_costs_nothing() {
    outages_of(Store::Vectors).await;
}
