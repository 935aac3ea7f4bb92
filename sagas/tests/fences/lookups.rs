//! What the statements of every run read stays the same however many jobs are under way.

use std::sync::Arc;

use chrono::Utc;
use queue::JobId;
use sagas::{
    coalescing::Batch,
    stores::postgres::{
        Fence, Postgres, PostgresConfig,
        accept::NewJob,
        ending::{CompleteBatch, Completion, Verdict},
        progress::Progress,
        take::StepRecord,
    },
};
use serde_json::{Value, json};
use uuid::Uuid;

use crate::ledger::{Ledger, failure, job, run_of, saga_of};

const ENDED: usize = 200;
const UNDER_WAY: usize = 500;
/// After so many runs a session keeps the plan of a statement.
const RUNS: usize = 8;

fn jobs(count: usize) -> Vec<NewJob> {
    (0..count).map(|_| job("embed", json!({ "all": true }))).collect()
}

async fn succeed(ledger: &Ledger, jobs: &[JobId]) {
    let success = |job_id: &JobId| Completion {
        job_id: *job_id,
        fence: Fence(1),
        saga: None,
        result: Value::Null,
        steps: vec![],
        revocable: false,
    };
    let all: Vec<_> = jobs.iter().map(|id| Arc::new(success(id))).collect();
    CompleteBatch(ledger.postgres.clone()).flush(&all).await.unwrap();
}

/// Entries that scans of an index have returned so far, those of dead rows too.
pub async fn entries_read(postgres: &Postgres, index: &str) -> i64 {
    sqlx::query("SELECT pg_stat_force_next_flush()").execute(postgres.pool()).await.unwrap();
    sqlx::query_scalar("SELECT idx_tup_read FROM pg_stat_user_indexes WHERE indexrelname = $1")
        .bind(index)
        .fetch_one(postgres.pool())
        .await
        .unwrap()
}

/// Runs each statement for a few jobs; returns how many entries each has read.
async fn entries_of_a_run(ledger: &Ledger) -> Vec<(&'static str, i64)> {
    let postgres = &ledger.postgres;
    let mut before = entries_read(postgres, "jobs_unfinished").await;
    let mut reads = vec![];
    let mut did = async |what: &'static str| {
        let now = entries_read(postgres, "jobs_unfinished").await;
        reads.push((what, now - before));
        before = now;
    };
    let ids = ledger.accept(&jobs(4)).await;
    did("accept").await;
    let mut taken = vec![];
    for id in &ids {
        taken.push(ledger.take("w", *id).await);
    }
    did("take").await;
    let said: Vec<_> = taken.iter().map(|job| Progress::new(job.id, job.fence, 50, "")).collect();
    assert_eq!(postgres.record_progress(&said).await.unwrap().len(), taken.len());
    did("progress").await;
    assert!(postgres.begin_saga(&saga_of(&taken[0], Uuid::now_v7())).await.unwrap());
    did("begin").await;
    let (run, verdict) = (run_of(&taken[1], None), Verdict::Dead { failure: failure() });
    postgres.begin_compensation(&run, &verdict, "a test's", None, 1, 1).await.unwrap();
    did("turn").await;
    assert!(postgres.finish(&run, &verdict, &[]).await.unwrap());
    did("finish").await;
    succeed(ledger, &[ids[0], ids[2], ids[3]]).await;
    did("complete").await;
    reads
}

fn undone() -> StepRecord {
    StepRecord {
        step: "undone".into(),
        compensation: true,
        attempts: 1,
        started_at: Utc::now(),
        ended_at: Utc::now(),
        error: None,
    }
}

/// A ledger with one session, which keeps its plans and tells of its own reads.
async fn one_session() -> Ledger {
    one_session_of(Ledger::start().await).await
}

pub async fn one_session_of(mut ledger: Ledger) -> Ledger {
    let config =
        PostgresConfig { max_connections: 1, ..PostgresConfig::new(ledger.services.postgres().url()) };
    ledger.postgres = Postgres::connect(&config).await.unwrap();
    ledger
}

#[tokio::test]
async fn jobs_are_looked_up_by_their_ids_whatever_else_is_under_way() {
    let ledger = one_session().await;
    let no_vacuum = "ALTER TABLE jobs SET (autovacuum_enabled = false)";
    sqlx::query(no_vacuum).execute(ledger.postgres.pool()).await.unwrap();
    // A ledger in its first seconds: hardly anything is unfinished, and reading all of that looks cheap.
    let ended = ledger.accept(&jobs(ENDED)).await;
    ledger.takes("w", &ended).await;
    succeed(&ledger, &ended).await;
    let mut first = entries_of_a_run(&ledger).await;
    sqlx::query("ANALYZE jobs").execute(ledger.postgres.pool()).await.unwrap();
    for _ in 0..RUNS {
        first = entries_of_a_run(&ledger).await;
    }
    for ids in ledger.accept(&jobs(UNDER_WAY)).await.chunks(50) {
        ledger.takes("w", ids).await;
    }
    let reads = entries_of_a_run(&ledger).await;
    let most = |(_, entries): &(_, i64)| *entries < UNDER_WAY as i64 / 10;
    assert!(reads.iter().all(most), "at first {first:?}, then {reads:?}");
}

/// Runs of one job each: one that succeeds, one that is undone, an ingest; more of each than a session plans anew.
async fn runs_of_one_job(ledger: &Ledger) {
    for n in 0..2 * RUNS {
        let [succeeds, fails] = [ledger.accept(&jobs(1)).await[0], ledger.accept(&jobs(1)).await[0]];
        ledger.take("w", succeeds).await;
        succeed(ledger, &[succeeds]).await;
        let job = ledger.take("w", fails).await;
        let saga = saga_of(&job, Uuid::now_v7());
        assert!(ledger.postgres.begin_saga(&saga).await.unwrap());
        let run = run_of(&job, Some(saga.id));
        let verdict = Verdict::Dead { failure: failure() };
        ledger.postgres.begin_compensation(&run, &verdict, "a test's", None, 1, 1).await.unwrap();
        assert!(ledger.postgres.finish(&run, &verdict, &[undone()]).await.unwrap());
        ledger.ingested(&format!("document {n}")).await;
    }
}

#[tokio::test]
async fn a_run_of_one_job_plans_none_of_its_statements_again() {
    let ledger = one_session().await;
    // In tables of more than a few pages ten look-ups cost ten times as much as one.
    sqlx::raw_sql(
        "INSERT INTO jobs (id, kind, queue, tenant, priority, payload, timeout_ms, state, finished_at)
         SELECT uuid7(), 'embed', 'embed', (SELECT id FROM tenants), 5, '{}', 1000, 'succeeded', now() FROM generate_series(1, 10000);
         INSERT INTO sagas (id, job_id, kind, definition_version, tenant, state, fence, finished_at)
         SELECT id, id, kind, 1, tenant, 'completed', 1, now() FROM jobs;
         INSERT INTO documents (id, tenant, key, last_order) SELECT id, tenant, id::text, 1 FROM jobs;
         INSERT INTO document_versions (id, document_id, tenant, doc_order, saga_id, state, content_hash, model, dimensions, collection,
                                        chunk_count, sweep_after)
         SELECT id, id, tenant, 1, id, 'retired', sha256(''), 'm', 1, 'c', 1, now() FROM jobs;",
    )
    .execute(ledger.postgres.pool())
    .await
    .unwrap();
    sqlx::query("ANALYZE").execute(ledger.postgres.pool()).await.unwrap();
    runs_of_one_job(&ledger).await;
    let planned: Vec<(String, i64)> = sqlx::query_as(
        "SELECT statement, custom_plans FROM pg_prepared_statements
         WHERE custom_plans > 5 ORDER BY custom_plans",
    )
    .fetch_all(ledger.postgres.pool())
    .await
    .unwrap();
    assert!(planned.is_empty(), "{} statements: {planned:#?}", planned.len());
}

#[tokio::test]
async fn a_fresh_ledger_is_never_read_from_end_to_end_whatever_the_servers_settings() {
    let first = Ledger::start().await;
    sqlx::query("ALTER DATABASE flotilla SET random_page_cost = 4")
        .execute(first.postgres.pool())
        .await
        .unwrap();
    let ledger = one_session_of(first).await;
    for table in ["jobs", "sagas", "documents", "document_versions"] {
        let no_vacuum = format!("ALTER TABLE {table} SET (autovacuum_enabled = false)");
        sqlx::raw_sql(sqlx::AssertSqlSafe(no_vacuum)).execute(ledger.postgres.pool()).await.unwrap();
    }
    runs_of_one_job(&ledger).await;
    sqlx::query("SELECT pg_stat_force_next_flush()").execute(ledger.postgres.pool()).await.unwrap();
    let read: Vec<(String, i64)> = sqlx::query_as(
        "SELECT relname::text, seq_tup_read FROM pg_stat_user_tables
         WHERE relname IN ('jobs', 'sagas', 'documents', 'document_versions') AND seq_tup_read > 0",
    )
    .fetch_all(ledger.postgres.pool())
    .await
    .unwrap();
    assert!(read.is_empty(), "rows read by scans: {read:?}");
}
