//! Retention: records that have outlived their time go, in bounded batches. Several janitors share the work: rows are
//! locked, and locked rows skipped.

use std::time::Duration;

use chrono::{DateTime, Utc};
use sqlx::Row;
use uuid::Uuid;

use super::Postgres;
use crate::error::StoreError;

/// Records that one look goes through for each that it may remove.
const LOOKED_PER_REMOVED: i64 = 5;

/// Whether no unfinished or parked parent may still look at job `j`, its own parent or that of its batch. Scalar sub-selects are
/// never merged into a join: each is one look at a primary key.
const NO_PARENT_LOOKS: &str =
    "(SELECT p.finished_at IS NULL OR p.state = 'parked' FROM jobs p WHERE p.id = j.parent) IS NOT TRUE
     AND (SELECT p.finished_at IS NULL OR p.state = 'parked' FROM batches b JOIN jobs p ON p.id = b.parent
          WHERE b.id = j.batch_id) IS NOT TRUE";

/// How far looks through ended records have come, from the oldest on: what must be kept, however much it is, is passed, and no look
/// goes through more than five times what it may remove.
#[derive(Debug, Clone, Copy, Default)]
pub struct Place(Option<(DateTime<Utc>, Uuid)>);

impl Place {
    /// Whether there are records behind this place; the next look begins with the oldest otherwise.
    pub fn is_under_way(&self) -> bool {
        self.0.is_some()
    }
}

/// What goes with age: rows of `table` for which `which` holds, and for `j`, its row once it is locked, `may_go`; and what becomes of
/// those whose ids are in `fit`.
struct Aged<'a> {
    table: &'a str,
    which: &'a str,
    may_go: &'a str,
    lock: &'a str,
    then: &'a str,
}

impl Postgres {
    /// One look at records that ended longer than `keep` ago; returns to how many it did what there is to do, at most `limit`.
    async fn look(
        &self,
        aged: &Aged<'_>,
        keep: Duration,
        limit: i64,
        place: &mut Place,
    ) -> Result<u64, StoreError> {
        let Aged { table, which, may_go, lock, then } = aged;
        let most = limit * LOOKED_PER_REMOVED;
        let row = sqlx::query(sqlx::AssertSqlSafe(format!(
            "WITH looked AS MATERIALIZED (
                 SELECT id, finished_at FROM {table}
                 WHERE finished_at < now() - make_interval(secs => $1) AND {which}
                   AND (finished_at, id) > (coalesce($3, '-infinity'), $4)
                 ORDER BY finished_at, id LIMIT $5
             ), fit AS MATERIALIZED (
                 SELECT j.id FROM looked CROSS JOIN LATERAL (
                     SELECT j.id FROM {table} j WHERE j.id = looked.id AND {may_go} FOR {lock} OF j SKIP LOCKED) AS j
                 LIMIT $2
             ), gone AS (
                 {then} WHERE id IN (SELECT id FROM fit) RETURNING id
             )
             SELECT (SELECT count(*) FROM gone) AS gone, (SELECT count(*) FROM looked) AS looked, last.finished_at, last.id
             FROM (SELECT) AS one LEFT JOIN (
                 SELECT finished_at, id FROM looked ORDER BY finished_at DESC, id DESC LIMIT 1) AS last ON true"
        )))
        .bind(keep.as_secs_f64())
        .bind(limit)
        .bind(place.0.map(|(finished_at, _)| finished_at))
        .bind(place.0.map_or(Uuid::nil(), |(_, id)| id))
        .bind(most)
        .fetch_one(&self.pool)
        .await?;
        let gone: i64 = row.try_get("gone")?;
        // Of a full one there may be more to remove.
        if gone < limit {
            let all = row.try_get::<i64, _>("looked")? < most;
            place.0 = if all { None } else { Some((row.try_get("finished_at")?, row.try_get("id")?)) };
        }
        Ok(gone.unsigned_abs())
    }

    /// Removes jobs that have ended longer than `keep` ago, with their logs; at most `limit`. Kept, however old: a job with
    /// an open dead letter, with a run that is not over, or with children, or ended batches of them, that have not gone; what an unfinished
    /// or a parked parent may still look at, replays in the batch of its children included; and parked ones.
    pub async fn expire_jobs(
        &self,
        keep: Duration,
        limit: i64,
        place: &mut Place,
    ) -> Result<u64, StoreError> {
        // A parent that went before its children would be taken out of every one's row, in one statement.
        let may_go = format!(
            "(SELECT d.state = 'open' FROM dead_letters d WHERE d.job_id = j.id) IS NOT TRUE
             AND NOT EXISTS (SELECT FROM sagas s WHERE s.job_id = j.id
                             AND s.state IN ('running', 'compensating', 'finishing', 'parked'))
             AND NOT EXISTS (SELECT FROM jobs c WHERE c.parent = j.id)
             AND NOT EXISTS (SELECT FROM batches b WHERE b.parent = j.id AND b.finished_at IS NOT NULL)
             AND {NO_PARENT_LOOKS}"
        );
        let aged = Aged {
            table: "jobs",
            which: "state <> 'parked'",
            may_go: &may_go,
            lock: "UPDATE",
            then: "DELETE FROM jobs",
        };
        self.look(&aged, keep, limit, place).await
    }

    /// Clears the results of jobs that have ended longer than `keep` ago, at most `limit`; the jobs' records stay, and so do
    /// results that an unfinished or a parked parent may still look at.
    pub async fn expire_results(
        &self,
        keep: Duration,
        limit: i64,
        place: &mut Place,
    ) -> Result<u64, StoreError> {
        let aged = Aged {
            table: "jobs",
            which: "result IS NOT NULL",
            may_go: NO_PARENT_LOOKS,
            lock: "NO KEY UPDATE",
            then: "UPDATE jobs SET result = NULL, result_key_id = NULL",
        };
        self.look(&aged, keep, limit, place).await
    }

    /// Closes letters that have been open for longer than `keep`, at most `limit`; they go with their jobs.
    pub async fn expire_letters(&self, keep: Duration, limit: i64) -> Result<u64, StoreError> {
        let done = sqlx::query(
            "WITH due AS (
                 SELECT id FROM dead_letters WHERE state = 'open' AND created_at < now() - make_interval(secs => $1)
                 ORDER BY created_at LIMIT $2 FOR NO KEY UPDATE SKIP LOCKED
             ), closed AS (
                 UPDATE dead_letters l SET state = 'discarded', resolved_at = now(), resolved_by = 'janitor', note = 'retention'
                 FROM due WHERE l.id = due.id RETURNING l.id)
             INSERT INTO audit_log (id, actor, action, subject, detail)
             SELECT uuid7(), 'janitor', 'dlq.discard', id::text, '{\"reason\": \"retention\"}' FROM closed",
        )
        .bind(keep.as_secs_f64())
        .bind(limit)
        .execute(&self.pool)
        .await?;
        Ok(done.rows_affected())
    }

    /// Removes batches that ended longer than `keep` ago and whose members, batches among them, have gone; at most `limit`. One whose
    /// parent is unfinished or parked stays: without it the parent would enqueue its children again.
    pub async fn expire_batches(
        &self,
        keep: Duration,
        limit: i64,
        place: &mut Place,
    ) -> Result<u64, StoreError> {
        let aged = Aged {
            table: "batches",
            which: "true",
            may_go: "NOT EXISTS (SELECT FROM jobs m WHERE m.batch_id = j.id)
                     AND NOT EXISTS (SELECT FROM batches i WHERE i.outer_batch = j.id)
                     AND NOT EXISTS (SELECT FROM batch_events e WHERE e.batch = j.id)
                     AND (SELECT p.finished_at IS NULL OR p.state = 'parked' FROM jobs p WHERE p.id = j.parent) IS NOT TRUE",
            lock: "UPDATE",
            then: "DELETE FROM batches",
        };
        self.look(&aged, keep, limit, place).await
    }

    /// Removes idempotency keys that have expired, at most `limit`. Those held until their job has ended go with the job.
    pub async fn expire_keys(&self, limit: i64) -> Result<u64, StoreError> {
        let done = sqlx::query(
            "DELETE FROM idempotency_keys WHERE ctid IN (
                 SELECT ctid FROM idempotency_keys WHERE expires_at < now() ORDER BY expires_at LIMIT $1
                 FOR UPDATE SKIP LOCKED)",
        )
        .bind(limit)
        .execute(&self.pool)
        .await?;
        Ok(done.rows_affected())
    }

    /// Makes the audit log's next partitions and drops those older than `keep`.
    pub async fn expire_audit_log(&self, keep: Duration) -> Result<(), StoreError> {
        sqlx::query("SELECT ensure_audit_partitions(3)").execute(&self.pool).await?;
        sqlx::query("SELECT drop_audit_partitions(make_interval(secs => $1))")
            .bind(keep.as_secs_f64())
            .execute(&self.pool)
            .await?;
        Ok(())
    }
}
