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
        let row: Option<(String, bool, bool)> = sqlx::query_as(
            "SELECT j.state, EXISTS (SELECT FROM sagas s WHERE s.job_id = j.id AND s.state IN ('running', 'compensating')),
                    EXISTS (SELECT FROM sagas s WHERE s.job_id = j.id AND s.state = 'running'
                              AND s.pivot_at IS NOT NULL)
             FROM jobs j WHERE j.id = $1 AND ($2::text IS NULL OR j.tenant = $2) FOR NO KEY UPDATE OF j",
        )
        .bind(job.0)
        .bind(tenant)
        .fetch_optional(&mut *tx)
        .await?;
        let Some((state, open_saga, past_pivot)) = row else { return Ok(Cancel::Unknown) };
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
                // A waiting job with effects runs now, in order to undo them.
                sqlx::query(
                    "UPDATE jobs SET cancel_requested_at = coalesce(cancel_requested_at, now()),
                            run_at = CASE WHEN state = 'waiting' THEN now() ELSE run_at END WHERE id = $1",
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
