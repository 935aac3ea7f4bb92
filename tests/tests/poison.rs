//! One job that kills every process that runs it, among 500 innocents: it alone becomes a dead letter (PROTOCOL.md 13).
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::os::unix::process::ExitStatusExt;

use e2e::{Fleet, LONG, WorkerProcess, text, wait_until};
use sagas::stores::postgres::{dead_letters::DeadLetterFilter, inspect::JobView};

const INNOCENTS: usize = 500;
const WORKERS: usize = 3;

fn start(fleet: &Fleet) -> WorkerProcess {
    fleet
        .worker()
        .concurrency(32)
        .faults("ingest.vectors.before=kill*100")
        .env("FLOTILLA_FAULTS_DOCUMENT", "poison")
        // As in production: what is only slow on a busy machine is charged to nobody.
        .env("FLOTILLA_CALL_TIMEOUT_MS", "5000")
        .start()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn protocol_13_one_poison_among_500_innocents_is_the_only_dead_letter() {
    let fleet = Fleet::start().await;
    let mut workers: Vec<WorkerProcess> = (0..WORKERS).map(|_| start(&fleet)).collect();
    for worker in &workers {
        worker.ready().await;
    }
    let mut jobs: Vec<_> = (0..INNOCENTS)
        .map(|no| fleet.ingest_job(&format!("doc-{no:03}"), &text(&format!("doc-{no:03}"), 1)))
        .collect();
    // Among the others, so that it has company when it first runs.
    jobs.insert(INNOCENTS / 10, fleet.ingest_job("poison", "some text"));
    let ids = fleet.accept(jobs).await;
    let poison = ids[INNOCENTS / 10];

    let mut killed = 0;
    wait_until("all jobs have ended", LONG, async || {
        // First: a worker was lost before its job ends, and so is counted below.
        let counts = fleet.postgres.job_counts(None).await.unwrap();
        // As a supervisor does.
        for worker in &mut workers {
            if let Some(status) = worker.ended() {
                assert_eq!(status.signal(), Some(9), "{} ended otherwise: {status}", worker.name);
                killed += 1;
                *worker = start(&fleet);
            }
        }
        if counts.waiting + counts.running == 0 {
            Ok(())
        } else {
            Err(format!("{counts:?}, {killed} workers killed{}", fleet.describe(poison).await))
        }
    })
    .await;
    let counts = fleet.postgres.job_counts(None).await.unwrap();
    println!("{killed} workers killed; {counts:?}");
    let letters = fleet
        .postgres
        .dead_letters(&DeadLetterFilter { limit: 10, ..DeadLetterFilter::default() })
        .await
        .unwrap();
    let shown: Vec<_> = letters.iter().map(|letter| (letter.job_id, letter.class.as_str())).collect();
    assert_eq!(shown, [(poison.0, "poison")]);
    assert_eq!((counts.succeeded, counts.dead), (INNOCENTS as i64, 1), "{counts:?}");
    // Two losses in company, then three alone: no more processes die for it.
    let job: JobView = fleet.postgres.job(poison, None).await.unwrap().unwrap();
    assert_eq!((job.lost_deliveries, killed), (5, 5), "{}", fleet.describe(poison).await);
    let (charged, lost_alone): (i64, i64) = sqlx::query_as(
        "SELECT count(*) FILTER (WHERE attempts > 0), count(*) FILTER (WHERE lost_alone > 0) FROM jobs WHERE id <> $1",
    )
    .bind(poison.0)
    .fetch_one(fleet.postgres.pool())
    .await
    .unwrap();
    assert_eq!((charged, lost_alone), (0, 0), "innocents charged, innocents lost alone");
    fleet.audit_clean().await;
    for worker in &workers {
        worker.ready().await;
        assert!(worker.terminate().await.success(), "{}", worker.tail());
    }
    drop(workers);
    fleet.end();
}
