//! The queue's Redis loses all its data again and again, under load, with delayed, cancelled and retrying jobs present: the
//! ledger knows everything, and every accepted job still ends right (PROTOCOL.md 17, 18).
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::time::Duration;

use chrono::{DateTime, Utc};
use e2e::{Fleet, LONG, TENANT, text, wait_until};
use queue::{JobId, Place, QueueName};
use rand::{Rng, SeedableRng, rngs::StdRng};
use sagas::stores::postgres::{accept::NewJob, ledger::Cancel};

const FLUSHES: usize = 24;
/// Between two of them, in ms.
const APART: std::ops::Range<u64> = 100..900;
const JOBS_EACH: usize = 20;

/// What must become of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Succeeds,
    /// Not before this time, in ms of the epoch.
    SucceedsLater(i64),
    Cancelled,
}

struct Load<'a> {
    fleet: &'a Fleet,
    random: StdRng,
    jobs: Vec<(NewJob, Fate)>,
}

impl Load<'_> {
    /// Accepts some more jobs: one in four is due within some seconds, one in eight is cancelled before it is due.
    async fn more(&mut self) {
        let first = self.jobs.len();
        let mut to_cancel = vec![];
        for no in first..first + JOBS_EACH {
            let document = format!("doc-{no:04}");
            let mut job = self.fleet.ingest_job(&document, &text(&document, 1));
            job.max_attempts = 50;
            let fate = match self.random.random_range(0..8) {
                0 | 1 => {
                    let due = Utc::now() + Duration::from_millis(self.random.random_range(500..6000));
                    job.run_at = Some(due);
                    Fate::SucceedsLater(due.timestamp_millis())
                }
                2 => {
                    job.run_at = Some(Utc::now() + Duration::from_secs(60));
                    to_cancel.push(job.id);
                    Fate::Cancelled
                }
                _ => Fate::Succeeds,
            };
            self.jobs.push((job, fate));
        }
        self.fleet.accept(self.jobs[first..].iter().map(|(job, _)| job.clone()).collect()).await;
        for id in to_cancel {
            assert_eq!(self.fleet.postgres.cancel(id, Some(TENANT)).await.unwrap(), Cancel::Cancelled);
        }
    }
}

async fn place(fleet: &Fleet, job: JobId) -> Option<Place> {
    fleet.queue.places(&[(QueueName::new("ingest").unwrap(), job)]).await.unwrap()[0]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn protocol_17_18_redis_may_lose_everything_at_any_moment() {
    let seed = std::env::var("FLOTILLA_TEST_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(rand::random);
    println!("FLOTILLA_TEST_SEED={seed}");
    let mut random: StdRng = SeedableRng::seed_from_u64(seed);
    let fleet = Fleet::start().await;
    // Steps are tried 3 times within a delivery: up to 100 deliveries fail, and their jobs wait for another attempt.
    let workers: Vec<_> = (0..2)
        .map(|_| {
            fleet
                .worker()
                .concurrency(16)
                .faults("ingest.cache.before=error*300")
                .env("FLOTILLA_RETRY_BASE_MS", "2500")
                .start()
        })
        .collect();
    for worker in &workers {
        worker.ready().await;
    }
    let mut later = fleet.ingest_job("in-an-hour", "some text");
    let due: DateTime<Utc> = Utc::now() + Duration::from_secs(3600);
    later.run_at = Some(due);
    fleet.accept(vec![later.clone()]).await;

    let redis = redis::Client::open(fleet.services.redis_queue().url()).unwrap();
    let mut redis = redis.get_multiplexed_async_connection().await.unwrap();
    let mut load = Load { fleet: &fleet, random: StdRng::seed_from_u64(seed ^ 1), jobs: vec![] };
    for flush in 0..FLUSHES {
        load.more().await;
        tokio::time::sleep(Duration::from_millis(random.random_range(APART))).await;
        let keys: i64 = redis::cmd("DBSIZE").query_async(&mut redis).await.unwrap();
        redis::cmd("FLUSHALL").exec_async(&mut redis).await.unwrap();
        let counts = fleet.postgres.job_counts(None).await.unwrap();
        println!("flush {flush}: {keys} keys lost; {counts:?}");
    }
    let jobs = load.jobs;
    let ids: Vec<JobId> = jobs.iter().map(|(job, _)| job.id).collect();
    let states = fleet.all_ended(&ids, LONG).await;
    let mut retried = 0;
    for (job, fate) in &jobs {
        let state = states[&job.id].as_str();
        let expected = if *fate == Fate::Cancelled { "cancelled" } else { "succeeded" };
        assert_eq!(state, expected, "{fate:?}: {}", fleet.describe(job.id).await);
        let runs = fleet.postgres.sagas_of(job.id).await.unwrap();
        let attempts = fleet.postgres.attempts(job.id).await.unwrap().len();
        match fate {
            Fate::Cancelled => {
                assert!(runs.is_empty(), "a cancelled job ran: {}", fleet.describe(job.id).await);
            }
            Fate::SucceedsLater(due) => {
                let began = runs[0].created_at.timestamp_millis();
                assert!(began >= *due, "ran {} ms early: {}", due - began, fleet.describe(job.id).await);
            }
            Fate::Succeeds => {}
        }
        if *fate != Fate::Cancelled {
            assert_eq!(runs.len(), attempts + 1, "{}", fleet.describe(job.id).await);
        }
        retried += attempts;
    }
    println!("{} jobs ended right after {FLUSHES} flushes; {retried} attempts were charged", jobs.len());
    assert!(retried > 0, "no job was retried: the test lacks that case");

    // What is due in an hour is due in an hour, in the ledger and in Redis.
    wait_until("the job due in an hour is scheduled in Redis again", LONG, async || {
        let place = place(&fleet, later.id).await;
        if place == Some(Place::Scheduled) { Ok(()) } else { Err(format!("{place:?}")) }
    })
    .await;
    let job = fleet.postgres.job(later.id, None).await.unwrap().unwrap();
    assert_eq!((job.state.as_str(), job.deliveries), ("waiting", 0));
    assert_eq!(job.run_at.timestamp_millis(), due.timestamp_millis());
    assert_eq!(fleet.postgres.cancel(later.id, Some(TENANT)).await.unwrap(), Cancel::Cancelled);
    fleet.audit_clean().await;
    for worker in &workers {
        assert!(worker.terminate().await.success(), "{}", worker.tail());
    }
    drop(workers);
    fleet.end();
}
