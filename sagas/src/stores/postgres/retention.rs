//! Retention: records that have outlived their time go, in bounded batches. Several janitors share the work: rows are
//! locked, and locked rows skipped.

use std::time::Duration;

use super::Postgres;
use crate::error::StoreError;

/// Whether no unfinished or parked parent may still look at job `j`, its own parent or that of its batch. Scalar sub-selects are
/// never merged into a join: each is one look at a primary key.
const NO_PARENT_LOOKS: &str =
    "(SELECT p.finished_at IS NULL OR p.state = 'parked' FROM jobs p WHERE p.id = j.parent) IS NOT TRUE
     AND (SELECT p.finished_at IS NULL OR p.state = 'parked' FROM batches b JOIN jobs p ON p.id = b.parent
          WHERE b.id = j.batch_id) IS NOT TRUE";

impl Postgres {
    /// Removes jobs that have ended longer than `keep` ago, with their logs; at most `limit`. Kept, however old: a job with
    /// an open dead letter, with a run that is not over, or with a child that has not ended; what an unfinished or a parked
    /// parent may still look at, replays in the batch of its children included; and parked ones.
    pub async fn expire_jobs(&self, keep: Duration, limit: i64) -> Result<u64, StoreError> {
        let done = sqlx::query(sqlx::AssertSqlSafe(format!(
            "DELETE FROM jobs WHERE id IN (
                 SELECT j.id FROM jobs j
                 WHERE j.finished_at < now() - make_interval(secs => $1) AND j.state <> 'parked'
                   AND NOT EXISTS (SELECT FROM dead_letters d WHERE d.job_id = j.id AND d.state = 'open')
                   AND NOT EXISTS (SELECT FROM sagas s WHERE s.job_id = j.id
                                   AND s.state IN ('running', 'compensating', 'finishing', 'parked'))
                   AND NOT EXISTS (SELECT FROM jobs c WHERE c.parent = j.id AND c.finished_at IS NULL)
                   AND {NO_PARENT_LOOKS}
                 ORDER BY j.finished_at LIMIT $2 FOR UPDATE SKIP LOCKED)",
        )))
        .bind(keep.as_secs_f64())
        .bind(limit)
        .execute(&self.pool)
        .await?;
        Ok(done.rows_affected())
    }

    /// Clears the results of jobs that have ended longer than `keep` ago, at most `limit`; the jobs' records stay, and so do
    /// results that an unfinished or a parked parent may still look at.
    pub async fn expire_results(&self, keep: Duration, limit: i64) -> Result<u64, StoreError> {
        let done = sqlx::query(sqlx::AssertSqlSafe(format!(
            "UPDATE jobs SET result = NULL, result_key_id = NULL WHERE id IN (
                 SELECT j.id FROM jobs j
                 WHERE j.result IS NOT NULL AND j.finished_at < now() - make_interval(secs => $1)
                   AND {NO_PARENT_LOOKS}
                 ORDER BY j.finished_at LIMIT $2 FOR NO KEY UPDATE SKIP LOCKED)",
        )))
        .bind(keep.as_secs_f64())
        .bind(limit)
        .execute(&self.pool)
        .await?;
        Ok(done.rows_affected())
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

    /// Removes batches that ended longer than `keep` ago and whose members have gone; at most `limit`. One whose parent is
    /// unfinished or parked stays: without it the parent would enqueue its children again.
    pub async fn expire_batches(&self, keep: Duration, limit: i64) -> Result<u64, StoreError> {
        let done = sqlx::query(
            "DELETE FROM batches WHERE id IN (
                 SELECT b.id FROM batches b WHERE b.finished_at < now() - make_interval(secs => $1)
                   AND NOT EXISTS (SELECT FROM jobs j WHERE j.batch_id = b.id)
                   AND NOT EXISTS (SELECT FROM batch_events e WHERE e.batch = b.id)
                   AND (SELECT p.finished_at IS NULL OR p.state = 'parked' FROM jobs p WHERE p.id = b.parent) IS NOT TRUE
                 ORDER BY b.finished_at LIMIT $2 FOR UPDATE SKIP LOCKED)",
        )
        .bind(keep.as_secs_f64())
        .bind(limit)
        .execute(&self.pool)
        .await?;
        Ok(done.rows_affected())
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
