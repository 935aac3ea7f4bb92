//! Rule 3: multi-row statements lock rows in id order. Each test lays the rows in the table the other way round, holds the
//! first in id order, and looks whether the statement has already locked the second.

use std::{future::Future, pin::Pin, sync::Arc, time::Duration};

use sagas::{
    coalescing::Batch,
    stores::postgres::{
        Postgres, PostgresConfig,
        forward::{Advance, KeepBatch, PivotBatch},
        stage::{AbandonBatch, Abandoned, StageBatch},
        take::TakenJob,
    },
};
use serde_json::json;
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use tokio::time::Instant;
use uuid::Uuid;

use crate::ledger::{HOUR, Ledger, ingest, publish_of, run_of, stage_of};

/// Drives `work` until a backend waits for a row that somebody holds. Fails if it ends before.
pub async fn until_someone_waits<T>(ledger: &Ledger, work: &mut Pin<&mut impl Future<Output = T>>) {
    let waiting = async {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let waiting = ledger
                .count("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND application_name = 'flotilla'")
                .await;
            if waiting > 0 {
                return;
            }
            assert!(Instant::now() < deadline, "nobody waits for a lock");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::select! {
        _ = work => panic!("it did not wait for the row that is held"),
        () = waiting => {}
    }
}

/// Runs `work`, which locks both rows of `table`, while another transaction holds the lower id's row; the higher one's must be
/// free until then.
async fn check(ledger: &Ledger, table: &str, mut ids: [Uuid; 2], work: impl Future) {
    ids.sort();
    let pool = ledger.postgres.pool();
    // A new row version goes behind the others: the table now holds the rows in the order high, low.
    let lay = match table {
        "jobs" => "UPDATE jobs SET priority = priority WHERE id = $1",
        "documents" => "UPDATE documents SET key = key WHERE id = $1",
        _ => "UPDATE document_versions SET title = title WHERE id = $1",
    };
    sqlx::query(lay).bind(ids[0]).execute(pool).await.unwrap();
    let sql = format!("SELECT id FROM {table} WHERE id = ANY($1) ORDER BY ctid");
    let laid: Vec<Uuid> = sqlx::query_scalar(AssertSqlSafe(sql)).bind(ids).fetch_all(pool).await.unwrap();
    assert_eq!(laid, [ids[1], ids[0]], "the rows don't lie the wrong way round");

    let mut holder = PgConnection::connect_with(&pool.connect_options()).await.unwrap();
    let mut held = holder.begin().await.unwrap();
    let lock = format!("SELECT FROM {table} WHERE id = $1 FOR UPDATE NOWAIT");
    sqlx::query(AssertSqlSafe(lock.clone())).bind(ids[0]).execute(&mut *held).await.unwrap();
    let mut work = std::pin::pin!(work);
    until_someone_waits(ledger, &mut work).await;
    let free = sqlx::query(AssertSqlSafe(lock)).bind(ids[1]).execute(pool).await;
    assert!(free.is_ok(), "the higher id of {table} was locked before the lower: {free:?}");
    held.rollback().await.unwrap();
    work.await;
}

/// A ledger whose statements read tables from end to end, as they may whenever the planner likes it better: through an index
/// rows would come in id order by chance.
async fn scanning() -> Ledger {
    let ledger = Ledger::start().await;
    for path in ["indexscan", "indexonlyscan", "bitmapscan"] {
        let sql = format!("ALTER ROLE CURRENT_USER SET enable_{path} = off");
        sqlx::query(AssertSqlSafe(sql)).execute(ledger.postgres.pool()).await.unwrap();
    }
    // It counts for new connections.
    let config = PostgresConfig::new(ledger.services.postgres().url());
    Ledger { postgres: Postgres::connect(&config).await.unwrap(), ..ledger }
}

async fn two_taken(ledger: &Ledger) -> [TakenJob; 2] {
    [ledger.take("w", ledger.ingest("a").await).await, ledger.take("w", ledger.ingest("b").await).await]
}

#[tokio::test]
async fn protocol_03_the_take_locks_jobs_in_id_order() {
    let ledger = scanning().await;
    let ids = ledger.accept(&[ingest("a"), ingest("b")]).await;
    check(&ledger, "jobs", [ids[0].0, ids[1].0], ledger.takes("w", &[ids[1], ids[0]])).await;
}

#[tokio::test]
async fn protocol_03_the_fence_locks_jobs_in_id_order() {
    let ledger = scanning().await;
    let [a, b] = two_taken(&ledger).await;
    let batch = StageBatch(ledger.postgres.clone());
    let items = [Arc::new(stage_of(&b)), Arc::new(stage_of(&a))];
    check(&ledger, "jobs", [a.id.0, b.id.0], async { batch.flush(&items).await.unwrap() }).await;
}

#[tokio::test]
async fn protocol_03_acceptance_locks_known_documents_in_id_order() {
    let ledger = scanning().await;
    // By their keys they would be locked the other way round.
    let [b, a] = [ledger.ingest("b").await, ledger.ingest("a").await];
    let [b, a] = [ledger.take("w", b).await, ledger.take("w", a).await];
    let ids = [b.document_id.unwrap(), a.document_id.unwrap()];
    assert!(ids[0] < ids[1]);
    check(&ledger, "documents", ids, ledger.accept(&[ingest("a"), ingest("b")])).await;
}

#[tokio::test]
async fn protocol_03_publish_locks_documents_and_versions_in_id_order() {
    for table in ["documents", "document_versions"] {
        let ledger = scanning().await;
        let [a, b] = two_taken(&ledger).await;
        let (stage_a, stage_b) = (ledger.staged(&a).await, ledger.staged(&b).await);
        let ids = match table {
            "documents" => [a.document_id.unwrap(), b.document_id.unwrap()],
            _ => [stage_a.version.id, stage_b.version.id],
        };
        let items = [publish_of(&b, &stage_b), publish_of(&a, &stage_a)];
        check(&ledger, table, ids, ledger.publish(&items)).await;
    }
}

#[tokio::test]
async fn protocol_03_what_runs_keep_and_where_their_pivots_begin_locks_jobs_in_id_order() {
    for pivot in [false, true] {
        let ledger = scanning().await;
        let [a, b] = two_taken(&ledger).await;
        let (stage_a, stage_b) = (ledger.staged(&a).await, ledger.staged(&b).await);
        let items = [(&b, stage_b), (&a, stage_a)].map(|(job, stage)| {
            Arc::new(Advance { run: run_of(job, Some(stage.saga.id)), next_step: 2, data: json!({}) })
        });
        let (keep, begin) = (KeepBatch(ledger.postgres.clone()), PivotBatch(ledger.postgres.clone()));
        check(&ledger, "jobs", [a.id.0, b.id.0], async {
            if pivot {
                assert_eq!(begin.flush(&items).await.unwrap(), [Some(true); 2]);
            } else {
                assert_eq!(keep.flush(&items).await.unwrap(), [true; 2]);
            }
        })
        .await;
    }
}

#[tokio::test]
async fn protocol_03_withdrawals_lock_versions_and_jobs_in_id_order() {
    for table in ["document_versions", "jobs"] {
        let ledger = scanning().await;
        let [a, b] = two_taken(&ledger).await;
        let (stage_a, stage_b) = (ledger.staged(&a).await, ledger.staged(&b).await);
        let ids = match table {
            "jobs" => [a.id.0, b.id.0],
            _ => [stage_a.version.id, stage_b.version.id],
        };
        let items = [(&b, &stage_b), (&a, &stage_a)].map(|(job, stage)| Abandoned {
            job: job.id,
            fence: job.fence,
            version: stage.version.id,
            sweep_after: HOUR,
        });
        let batch = AbandonBatch(ledger.postgres.clone());
        check(&ledger, table, ids, async {
            assert_eq!(batch.flush(&items).await.unwrap(), [true; 2]);
        })
        .await;
    }
}
