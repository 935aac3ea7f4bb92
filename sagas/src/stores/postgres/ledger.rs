//! What people do to jobs: cancel them.

use queue::JobId;
use serde_json::Value;
use sqlx::PgConnection;
use uuid::Uuid;

use super::Postgres;
use crate::error::StoreError;

/// The answer to a cancel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cancel {
    /// The job waited and is cancelled.
    Cancelled,
    /// The job runs, or its saga has effects: it ends as `cancelled` once they are undone.
    Requested,
    /// The job's saga has passed its pivot, or the job has succeeded.
    PastPivot,
    /// The job has ended otherwise.
    Ended,
    /// No such job of this tenant.
    Unknown,
}

impl Postgres {
    /// Cancels a job of `tenant` (PROTOCOL.md 14). A waiting job without effects ends here and now; its entry in Redis is
    /// dropped at the take.
    pub async fn cancel(&self, job: JobId, tenant: Option<&str>) -> Result<Cancel, StoreError> {
        let mut tx = self.begin().await?;
        let state: Option<String> = sqlx::query_scalar(
            "SELECT state FROM jobs WHERE id = $1 AND ($2::text IS NULL OR tenant = $2) FOR NO KEY UPDATE",
        )
        .bind(job.0)
        .bind(tenant)
        .fetch_optional(&mut *tx)
        .await?;
        let Some(state) = state else { return Ok(Cancel::Unknown) };
        // In a statement of its own: one that had waited for the job's row would not see a run that was logged meanwhile.
        let (open_saga, past_pivot): (bool, bool) = sqlx::query_as(
            "SELECT EXISTS (SELECT FROM sagas WHERE job_id = $1 AND state IN ('running', 'compensating')),
                    EXISTS (SELECT FROM sagas WHERE job_id = $1 AND state = 'running' AND pivot_at IS NOT NULL)",
        )
        .bind(job.0)
        .fetch_one(&mut *tx)
        .await?;
        let answer = match (state.as_str(), open_saga) {
            ("succeeded", _) => Cancel::PastPivot,
            ("waiting" | "running", _) if past_pivot => Cancel::PastPivot,
            ("waiting", false) => {
                sqlx::query("UPDATE jobs SET state = 'cancelled', cancel_requested_at = now(), finished_at = now() WHERE id = $1")
                    .bind(job.0)
                    .execute(&mut *tx)
                    .await?;
                Cancel::Cancelled
            }
            ("waiting" | "running", _) => {
                // A waiting job with effects runs now, in order to undo them; the relay tells Redis.
                sqlx::query(
                    "UPDATE jobs SET cancel_requested_at = coalesce(cancel_requested_at, now()),
                            run_at = CASE WHEN state = 'waiting' THEN now() ELSE run_at END,
                            dispatched_at = CASE WHEN state <> 'waiting' THEN dispatched_at END WHERE id = $1",
                )
                .bind(job.0)
                .execute(&mut *tx)
                .await?;
                Cancel::Requested
            }
            _ => Cancel::Ended,
        };
        tx.commit().await?;
        Ok(answer)
    }

    /// Writes a line of the audit log: who did what to what by hand.
    pub async fn record_action(
        &self,
        actor: &str,
        action: &str,
        subject: &str,
        detail: &Value,
    ) -> Result<(), StoreError> {
        Ok(record_in(&mut *self.pool.acquire().await?, actor, action, subject, detail).await?)
    }
}

/// Writes a line of the audit log in the transaction of what it tells.
pub(super) async fn record_in(
    connection: &mut PgConnection,
    actor: &str,
    action: &str,
    subject: &str,
    detail: &Value,
) -> Result<(), sqlx::Error> {
    sqlx::query("INSERT INTO audit_log (id, actor, action, subject, detail) VALUES ($1, $2, $3, $4, $5)")
        .bind(Uuid::now_v7())
        .bind(actor)
        .bind(action)
        .bind(subject)
        .bind(detail)
        .execute(connection)
        .await?;
    Ok(())
}
