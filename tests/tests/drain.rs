//! How workers end: drained, at once, or not by their own will. What they could not finish costs nobody anything.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    os::unix::process::ExitStatusExt,
    time::{Duration, Instant},
};

use chrono::{DateTime, Utc};
use e2e::{Fleet, LONG, SHORT, WorkerProcess, text, wait_until};
use nix::sys::signal::{Signal, kill};
use queue::JobId;

/// Longer than the harness's: a reaper that is away for half a lease waits for a whole one, and a busy machine may pause it
/// for two seconds.
const LEASE: Duration = Duration::from_secs(6);
const SLOTS: usize = 8;

/// A worker all of whose slots hold jobs that don't end by themselves, and all jobs.
async fn busy(fleet: &Fleet, jobs: usize, grace_ms: u32) -> (WorkerProcess, Vec<JobId>) {
    let worker = fleet
        .worker()
        .concurrency(SLOTS)
        .faults(format!("ingest.vectors.before=hang*{SLOTS}"))
        .env("FLOTILLA_DRAIN_GRACE_MS", grace_ms.to_string())
        .env("FLOTILLA_LEASE_MS", LEASE.as_millis().to_string())
        .start();
    worker.ready().await;
    let jobs = (0..jobs).map(|no| format!("doc-{no}"));
    let ids = fleet.accept(jobs.map(|name| fleet.ingest_job(&name, &text(&name, 1))).collect()).await;
    wait_until("all slots are taken", SHORT, async || {
        let fired = fleet.fired("ingest.vectors.before");
        if fired == SLOTS { Ok(()) } else { Err(format!("{fired} of {SLOTS}\n{}", worker.tail())) }
    })
    .await;
    (worker, ids)
}

/// Jobs that run; jobs that were charged; jobs whose lease was lost.
async fn running_charged_lost(fleet: &Fleet) -> (i64, i64, i64) {
    sqlx::query_as(
        "SELECT count(*) FILTER (WHERE state = 'running'), count(*) FILTER (WHERE attempts > 0),
                count(*) FILTER (WHERE lost_deliveries > 0) FROM jobs",
    )
    .fetch_one(fleet.postgres.pool())
    .await
    .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drained_worker_ends_well_and_gives_back_what_it_could_not_finish() {
    let fleet = Fleet::start().await;
    let (worker, jobs) = busy(&fleet, 2 * SLOTS, 1000).await;
    let asked = Instant::now();
    let status = worker.terminate().await;
    assert_eq!(status.code(), Some(0), "{status}\n{}", worker.tail());
    println!("drained in {:?}", asked.elapsed());
    assert!(asked.elapsed() > Duration::from_secs(1), "the running jobs had no grace");
    // Nobody waits for a lease to end: the jobs are back as soon as the worker is gone.
    assert_eq!(running_charged_lost(&fleet).await, (0, 0, 0), "running, charged, lost");
    let next = fleet.worker().start();
    fleet.assert_all_succeeded(&jobs).await;
    assert_eq!(running_charged_lost(&fleet).await, (0, 0, 0), "running, charged, lost");
    fleet.audit_clean().await;
    assert!(next.terminate().await.success(), "{}", next.tail());
    drop((worker, next));
    fleet.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drained_worker_finishes_what_it_can_within_the_grace_period() {
    let fleet = Fleet::start().await;
    let worker = fleet.worker().concurrency(SLOTS).patient().env("FLOTILLA_DRAIN_GRACE_MS", "25000").start();
    worker.ready().await;
    // So many that some are left, although this test may be late to ask for the end.
    let names = (0..600).map(|no| format!("doc-{no}"));
    let jobs = fleet.accept(names.map(|name| fleet.ingest_job(&name, &text(&name, 1))).collect()).await;
    wait_until("the worker is in the middle of it", SHORT, async || {
        let counts = fleet.postgres.job_counts(None).await.unwrap();
        if counts.succeeded >= 20 { Ok(()) } else { Err(format!("{counts:?}")) }
    })
    .await;
    let status = worker.terminate().await;
    assert_eq!(status.code(), Some(0), "{status}\n{}", worker.tail());
    let counts = fleet.postgres.job_counts(None).await.unwrap();
    println!("when the worker had drained: {counts:?}");
    assert_eq!(counts.running, 0, "{counts:?}");
    assert!(counts.waiting > 0, "nothing was left to do: the test shows nothing");
    let next = fleet.worker().concurrency(16).patient().start();
    fleet.assert_all_succeeded(&jobs).await;
    let again: i64 = sqlx::query_scalar("SELECT count(*) FROM jobs WHERE deliveries > 1")
        .fetch_one(fleet.postgres.pool())
        .await
        .unwrap();
    assert_eq!(again, 0, "jobs that ran here were not finished here");
    fleet.audit_clean().await;
    assert!(next.terminate().await.success(), "{}", next.tail());
    drop((worker, next));
    fleet.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_signal_ends_a_worker_at_once() {
    let fleet = Fleet::start().await;
    let (worker, jobs) = busy(&fleet, SLOTS, 60_000).await;
    kill(worker.pid, Signal::SIGTERM).unwrap();
    worker.logged("a second signal ends at once").await;
    assert!(worker.alive());
    let asked = Instant::now();
    let status = worker.terminate().await;
    println!("ended in {:?} after the second signal: {status}", asked.elapsed());
    assert_eq!(status.code(), Some(143), "{status}\n{}", worker.tail());
    assert!(asked.elapsed() < Duration::from_secs(5), "{:?}", asked.elapsed());
    // As after a crash: another worker gets the jobs when the leases are over.
    let next = fleet.worker().start();
    fleet.assert_all_succeeded(&jobs).await;
    fleet.audit_clean().await;
    assert!(next.terminate().await.success(), "{}", next.tail());
    drop((worker, next));
    fleet.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_jobs_of_a_killed_worker_are_delivered_again_within_the_lease_and_a_second() {
    let fleet = Fleet::start().await;
    let (worker, jobs) = busy(&fleet, SLOTS, 1000).await;
    let next = fleet.worker().concurrency(16).env("FLOTILLA_LEASE_MS", LEASE.as_millis().to_string()).start();
    next.ready().await;
    // By the ledger's clock, as the times of the takes are. The worker is lost at some time between the two.
    let clock = async || -> DateTime<Utc> {
        sqlx::query_scalar("SELECT clock_timestamp()").fetch_one(fleet.postgres.pool()).await.unwrap()
    };
    let before = clock().await;
    let status = worker.kill9().await;
    assert_eq!(status.signal(), Some(9));
    let after = clock().await;
    let all: Vec<_> = jobs.iter().map(|id| id.0).collect();
    let taken = wait_until("all jobs are delivered again", LONG, async || {
        let times: Vec<(DateTime<Utc>, i32)> = sqlx::query_as(
            "SELECT taken_at, lost_deliveries FROM jobs WHERE id = ANY($1) AND deliveries > 1",
        )
        .bind(&all)
        .fetch_all(fleet.postgres.pool())
        .await
        .unwrap();
        if times.len() == SLOTS {
            Ok(times)
        } else {
            Err(format!("{} of {SLOTS}\n{}", times.len(), next.tail()))
        }
    })
    .await;
    assert!(taken.iter().all(|(_, lost)| *lost == 1), "{taken:?}");
    let last = taken.iter().map(|(at, _)| *at - after).max().unwrap();
    let first = taken.iter().map(|(at, _)| *at - before).min().unwrap();
    println!("delivered again {} to {} ms after the kill", first.num_milliseconds(), last.num_milliseconds());
    // Two seconds more than promised, for a machine that is busy with other tests.
    let limit = LEASE + Duration::from_secs(3);
    assert!(last <= chrono::Duration::from_std(limit).unwrap(), "{last}");
    // A lease that was alive is never cut short: heartbeats come every 500 ms.
    let least = LEASE / 2;
    assert!(first >= chrono::Duration::from_std(least).unwrap(), "{first}");
    fleet.assert_all_succeeded(&jobs).await;
    assert_eq!(running_charged_lost(&fleet).await, (0, 0, SLOTS as i64), "running, charged, lost");
    fleet.audit_clean().await;
    assert!(next.terminate().await.success(), "{}", next.tail());
    drop((worker, next));
    fleet.end();
}
