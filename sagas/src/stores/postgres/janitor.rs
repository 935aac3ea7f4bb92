//! What the janitor reads and writes: sweeps of versions that readers can't see any more, and retention.

use std::time::Duration;

use sqlx::{Postgres as Db, Row, Transaction};
use uuid::Uuid;

use super::Postgres;
use crate::error::StoreError;

/// A version whose points and cache entry must go.
#[derive(Debug, Clone)]
pub struct Sweep {
    /// The version.
    pub version: Uuid,
    /// Its collection.
    pub collection: String,
    /// Its number of points.
    pub chunk_count: i32,
    /// Whether this is the last sweep, after which no late writer is left and the row itself goes.
    pub last: bool,
}

/// Due sweeps, locked against other janitors until [`Sweeps::done`] or drop.
pub struct Sweeps {
    tx: Transaction<'static, Db>,
    /// What to sweep.
    pub due: Vec<Sweep>,
}

impl Sweeps {
    /// Records that all of them were swept. Those not swept for the last time are due again after `bound`, when nothing a
    /// zombie sent can still be under way (PROTOCOL.md 9).
    pub async fn done(mut self, bound: Duration) -> Result<(), StoreError> {
        let (last, first): (Vec<&Sweep>, Vec<&Sweep>) = self.due.iter().partition(|sweep| sweep.last);
        let first: Vec<Uuid> = first.iter().map(|sweep| sweep.version).collect();
        let last: Vec<Uuid> = last.iter().map(|sweep| sweep.version).collect();
        sqlx::query("DELETE FROM chunks WHERE version_id = ANY($1)")
            .bind(&first)
            .execute(&mut *self.tx)
            .await?;
        sqlx::query(
            "UPDATE document_versions SET sweeps = sweeps + 1, body = NULL, sweep_after = now() + make_interval(secs => $2)
             WHERE id = ANY($1)",
        )
        .bind(&first)
        .bind(bound.as_secs_f64())
        .execute(&mut *self.tx)
        .await?;
        sqlx::query(
            "WITH retired AS (
                UPDATE sagas s SET state = 'completed', finished_at = now(), updated_at = now()
                FROM document_versions v WHERE v.id = ANY($1) AND v.retired_by = s.id AND s.state = 'finishing'
                RETURNING s.id, s.fence)
             INSERT INTO saga_steps (saga_id, fence, seq, step_name, direction, state, attempts, started_at, ended_at)
             SELECT id, fence, 1000, 'retire', 'execute', 'succeeded', 1, now(), clock_timestamp() FROM retired
             ON CONFLICT DO NOTHING",
        )
        .bind(&first)
        .execute(&mut *self.tx)
        .await?;
        sqlx::query("DELETE FROM document_versions WHERE id = ANY($1)")
            .bind(&last)
            .execute(&mut *self.tx)
            .await?;
        Ok(self.tx.commit().await?)
    }
}

impl Postgres {
    /// Versions whose sweep is due, at most `limit`.
    pub async fn due_sweeps(&self, limit: i64) -> Result<Sweeps, StoreError> {
        let mut tx = self.pool.begin().await?;
        let rows = sqlx::query(
            "SELECT id, collection, chunk_count, sweeps > 0 OR state = 'abandoned' AS last FROM document_versions
             WHERE sweep_after <= now() ORDER BY sweep_after LIMIT $1 FOR UPDATE SKIP LOCKED",
        )
        .bind(limit)
        .fetch_all(&mut *tx)
        .await?;
        let due = rows
            .iter()
            .map(|row| {
                Ok(Sweep {
                    version: row.try_get("id")?,
                    collection: row.try_get("collection")?,
                    chunk_count: row.try_get("chunk_count")?,
                    last: row.try_get("last")?,
                })
            })
            .collect::<Result<_, sqlx::Error>>()?;
        Ok(Sweeps { tx, due })
    }

    /// Removes records that have outlived their retention: finished jobs with their logs (not those with an open dead
    /// letter), finished batches whose members have gone, expired idempotency keys and old partitions of the audit log; makes the audit log's next partitions.
    /// Returns how many jobs went. Bounded: at most `limit` jobs a call.
    pub async fn expire(&self, keep: Duration, audit_log: Duration, limit: i64) -> Result<u64, StoreError> {
        let jobs = sqlx::query(
            "DELETE FROM jobs WHERE id IN (
                 SELECT j.id FROM jobs j
                 WHERE j.finished_at < now() - make_interval(secs => $1) AND j.state <> 'parked'
                   AND NOT EXISTS (SELECT FROM dead_letters d WHERE d.job_id = j.id AND d.state = 'open')
                   AND NOT EXISTS (SELECT FROM sagas s WHERE s.job_id = j.id AND s.state = 'finishing')
                 ORDER BY j.finished_at LIMIT $2)",
        )
        .bind(keep.as_secs_f64())
        .bind(limit)
        .execute(&self.pool)
        .await?;
        sqlx::query(
            "DELETE FROM batches WHERE id IN (
                 SELECT b.id FROM batches b WHERE b.finished_at < now() - make_interval(secs => $1)
                   AND NOT EXISTS (SELECT FROM jobs j WHERE j.batch_id = b.id)
                   AND NOT EXISTS (SELECT FROM batch_events e WHERE e.batch = b.id)
                 ORDER BY b.finished_at LIMIT $2)",
        )
        .bind(keep.as_secs_f64())
        .bind(limit)
        .execute(&self.pool)
        .await?;
        sqlx::query("DELETE FROM idempotency_keys WHERE expires_at < now()").execute(&self.pool).await?;
        sqlx::query("SELECT ensure_audit_partitions(3)").execute(&self.pool).await?;
        sqlx::query("SELECT drop_audit_partitions(make_interval(secs => $1))")
            .bind(audit_log.as_secs_f64())
            .execute(&self.pool)
            .await?;
        Ok(jobs.rows_affected())
    }
}
