//! A fleet at work: every document becomes exactly one version, also when a worker is killed in the middle.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeSet;

use e2e::{Fleet, LONG, TENANT, text, wait_until};

const DOCUMENTS: usize = 500;

fn name(no: usize) -> String {
    format!("doc-{no:03}")
}

/// Each document has its own text, in one version that was published once; the stores hold nothing else.
async fn assert_one_version_each(fleet: &Fleet, jobs: &[queue::JobId]) {
    let (versions, documents): (i64, i64) = sqlx::query_as(
        "SELECT count(*), count(DISTINCT document_id) FROM document_versions WHERE state = 'published'",
    )
    .fetch_one(fleet.postgres.pool())
    .await
    .unwrap();
    assert_eq!((versions, documents), (DOCUMENTS as i64, DOCUMENTS as i64));
    for no in 0..DOCUMENTS {
        let shown = fleet.stores.document(TENANT, &name(no)).await.unwrap().unwrap();
        assert_eq!(shown.text, text(&name(no), 1));
    }
    let runs: i64 = sqlx::query_scalar("SELECT count(*) FROM sagas WHERE state = 'completed'")
        .fetch_one(fleet.postgres.pool())
        .await
        .unwrap();
    assert_eq!(runs, jobs.len() as i64, "completed runs");
    let report = fleet.audit_clean().await;
    let counts = report.counts;
    assert_eq!((counts.documents, counts.versions, counts.cache_entries), (500, 500, 500), "{counts:?}");
    assert_eq!(counts.points, counts.chunks, "{counts:?}");
    println!("audited: {counts:?} in {} ms", report.took_ms);
}

async fn workers_of(fleet: &Fleet) -> BTreeSet<String> {
    let workers: Vec<String> =
        sqlx::query_scalar("SELECT DISTINCT worker FROM jobs WHERE worker IS NOT NULL")
            .fetch_all(fleet.postgres.pool())
            .await
            .unwrap();
    workers.into_iter().collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_workers_publish_each_of_500_documents_exactly_once() {
    let fleet = Fleet::start().await;
    let workers: Vec<_> = (0..3).map(|_| fleet.worker().concurrency(16).patient().start()).collect();
    for worker in &workers {
        worker.ready().await;
    }
    let jobs = fleet
        .accept((0..DOCUMENTS).map(|no| fleet.ingest_job(&name(no), &text(&name(no), 1))).collect())
        .await;
    fleet.assert_all_succeeded(&jobs).await;
    assert_one_version_each(&fleet, &jobs).await;
    assert_eq!(workers_of(&fleet).await.len(), 3, "each worker had jobs");
    let again: i64 = sqlx::query_scalar("SELECT count(*) FROM jobs WHERE deliveries <> 1 OR attempts <> 0")
        .fetch_one(fleet.postgres.pool())
        .await
        .unwrap();
    assert_eq!(again, 0, "no job was delivered twice");
    for worker in workers {
        assert!(worker.terminate().await.success(), "{}", worker.tail());
    }
    fleet.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_of_four_workers_killed_under_load_lose_and_double_nothing() {
    let fleet = Fleet::start().await;
    let workers: Vec<_> = (0..4).map(|_| fleet.worker().concurrency(16).start()).collect();
    for worker in &workers {
        worker.ready().await;
    }
    let jobs = fleet
        .accept((0..DOCUMENTS).map(|no| fleet.ingest_job(&name(no), &text(&name(no), 1))).collect())
        .await;
    for (victim, done) in [(0, 100), (1, 250)] {
        wait_until(&format!("{done} documents are published"), LONG, async || {
            let counts = fleet.postgres.job_counts(None).await.unwrap();
            if counts.succeeded >= done { Ok(()) } else { Err(format!("{counts:?}")) }
        })
        .await;
        workers[victim].kill9().await;
    }
    fleet.assert_all_succeeded(&jobs).await;
    let counts = fleet.postgres.job_counts(None).await.unwrap();
    println!("after two kills: {counts:?}");
    assert!(counts.redelivered > 0, "the victims held jobs: {counts:?}");
    assert_one_version_each(&fleet, &jobs).await;
    for worker in &workers[2..] {
        assert!(worker.terminate().await.success(), "{}", worker.tail());
    }
    drop(workers);
    fleet.end();
}
