//! What the janitor reads and writes: sweeps of versions that readers can't see any more. What it removes by age is in
//! [`retention`](super::retention).

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
    call_timeout: Duration,
    /// What to sweep.
    pub due: Vec<Sweep>,
}

impl Sweeps {
    /// Waits for what goes on elsewhere, however long it takes. The server ends a transaction from which it hears nothing for two calls'
    /// time, so it is told that this one goes on.
    pub async fn meanwhile<T>(&mut self, work: impl Future<Output = T>) -> Result<T, StoreError> {
        let mut work = std::pin::pin!(work);
        loop {
            match tokio::time::timeout(self.call_timeout / 2, &mut work).await {
                Ok(done) => return Ok(done),
                Err(_) => sqlx::query("SELECT").execute(&mut *self.tx).await?,
            };
        }
    }

    /// Leaves the versions of a collection for later: they are looked at again after `wait`, and overdue since they were
    /// due first.
    pub async fn put_off(&mut self, collection: &str, wait: Duration) -> Result<(), StoreError> {
        let (left, due): (Vec<Sweep>, _) =
            std::mem::take(&mut self.due).into_iter().partition(|sweep| sweep.collection == collection);
        self.due = due;
        sqlx::query(
            "UPDATE document_versions
             SET sweep_missed = coalesce(sweep_missed, sweep_after), sweep_after = now() + make_interval(secs => $2)
             WHERE id = ANY($1)",
        )
        .bind(left.iter().map(|sweep| sweep.version).collect::<Vec<_>>())
        .bind(wait.as_secs_f64())
        .execute(&mut *self.tx)
        .await?;
        Ok(())
    }

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
            "UPDATE document_versions SET sweeps = sweeps + 1, body = NULL, sweep_missed = NULL,
                    sweep_after = now() + make_interval(secs => $2)
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
        let mut tx = self.begin().await?;
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
        Ok(Sweeps { tx, call_timeout: self.call_timeout, due })
    }
}
