//! Classes of tenants: how much waits, runs and ends of each. Counting looks at every unfinished job, so one process counts for the
//! whole fleet, the more rarely the longer it takes, and only where tenants have classes.

use std::time::Duration;

use serde::Serialize;
use serde_json::json;
use sqlx::FromRow;

use super::{Postgres, ledger::record_in};
use crate::error::StoreError;

/// The class of tenants that were given none.
pub const DEFAULT_CLASS: &str = "default";
/// Other classes at most: each is a label of metrics.
pub const MAX_CLASSES: i64 = 32;
/// Between two counts there is so many times what a count takes.
const REST: u32 = 20;

/// What became of a tenant that was to get a class.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Classified {
    /// It has it now.
    Done,
    /// There is no such tenant.
    UnknownTenant,
    /// There are [`MAX_CLASSES`] others already.
    TooMany,
}

/// The jobs of one class of tenants in one queue, as of the last count.
#[derive(Debug, Clone, Default, PartialEq, Serialize, FromRow)]
pub struct ClassCount {
    /// The queue.
    pub queue: String,
    /// The class.
    pub class: String,
    /// Jobs that may run.
    pub waiting: i64,
    /// How long the oldest of them has waited, in seconds.
    pub oldest_s: Option<f64>,
    /// Jobs that run.
    pub running: i64,
    /// Jobs that ended within a minute.
    pub ended: i64,
}

impl Postgres {
    /// Puts a tenant into a class, for metrics. The class is a name like a tenant's.
    pub async fn set_class(&self, tenant: &str, class: &str, actor: &str) -> Result<Classified, StoreError> {
        let mut tx = self.begin().await?;
        // One after the other, so that two can't both be the last that fits.
        sqlx::query("SELECT FROM class_counting FOR UPDATE").execute(&mut *tx).await?;
        let others: i64 = sqlx::query_scalar(
            "SELECT count(DISTINCT class) FROM tenants WHERE class NOT IN ($1, 'default') AND id <> $2",
        )
        .bind(class)
        .bind(tenant)
        .fetch_one(&mut *tx)
        .await?;
        if class != DEFAULT_CLASS && others >= MAX_CLASSES {
            return Ok(Classified::TooMany);
        }
        let done = sqlx::query("UPDATE tenants SET class = $2 WHERE id = $1")
            .bind(tenant)
            .bind(class)
            .execute(&mut *tx)
            .await?;
        if done.rows_affected() == 0 {
            return Ok(Classified::UnknownTenant);
        }
        if others == 0 && class == DEFAULT_CLASS {
            // Nobody counts any more, and the next class must not bring back what was counted for the last.
            sqlx::query("DELETE FROM class_counts").execute(&mut *tx).await?;
            sqlx::query("UPDATE class_counting SET next_at = now()").execute(&mut *tx).await?;
        }
        record_in(&mut tx, actor, "tenants.class", tenant, &json!({ "class": class })).await?;
        tx.commit().await?;
        Ok(Classified::Done)
    }

    /// What the last count found; nothing where no tenant has a class.
    pub async fn class_counts(&self) -> Result<Vec<ClassCount>, StoreError> {
        Ok(sqlx::query_as(
            "SELECT queue, class, waiting, extract(epoch FROM counted_at - oldest_at)::float8 AS oldest_s, running, ended
             FROM class_counts, class_counting
             WHERE EXISTS (SELECT FROM tenants WHERE class <> 'default') ORDER BY queue, class",
        )
        .fetch_all(&self.pool)
        .await?)
    }

    /// Counts if it is time to: not again within `every`. Returns whether it did.
    pub async fn count_classes(&self, every: Duration) -> Result<bool, StoreError> {
        // Whoever takes the turn and fails has kept the others from trying for as long as after the slowest count.
        let turn = sqlx::query(
            "UPDATE class_counting SET next_at = now() + make_interval(secs => $1)
             WHERE next_at <= now() AND EXISTS (SELECT FROM tenants WHERE class <> 'default')",
        )
        .bind((self.call_timeout * REST).as_secs_f64())
        .execute(&self.pool)
        .await?;
        if turn.rows_affected() == 0 {
            return Ok(false);
        }
        let mut tx = self.begin().await?;
        sqlx::query("DELETE FROM class_counts").execute(&mut *tx).await?;
        sqlx::query(
            "INSERT INTO class_counts (queue, class, waiting, oldest_at, running, ended)
             SELECT queue, class, sum(waiting), min(oldest_at), sum(running), sum(ended) FROM (
                SELECT j.queue, t.class, count(*) FILTER (WHERE state = 'waiting' AND run_at <= now()) AS waiting,
                       min(run_at) FILTER (WHERE state = 'waiting' AND run_at <= now()) AS oldest_at,
                       count(*) FILTER (WHERE state = 'running') AS running, 0 AS ended
                FROM jobs j JOIN tenants t ON t.id = j.tenant WHERE j.state IN ('waiting', 'running') GROUP BY 1, 2
                UNION ALL
                SELECT j.queue, t.class, 0, NULL, 0, count(*)
                FROM jobs j JOIN tenants t ON t.id = j.tenant
                WHERE j.finished_at IS NOT NULL AND j.finished_at > now() - interval '1 minute' GROUP BY 1, 2
             ) AS found GROUP BY 1, 2",
        )
        .execute(&mut *tx)
        .await?;
        sqlx::query(
            "UPDATE class_counting
             SET counted_at = now(), next_at = now() + greatest(make_interval(secs => $1), $2 * (clock_timestamp() - now()))",
        )
        .bind(every.as_secs_f64())
        .bind(f64::from(REST))
        .execute(&mut *tx)
        .await?;
        tx.commit().await?;
        Ok(true)
    }
}
