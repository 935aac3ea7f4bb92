//! What running jobs say of themselves: percent and message, written under the fence.

use queue::JobId;
use sqlx::Row;
use uuid::Uuid;

use super::{Fence, Postgres};
use crate::error::StoreError;

/// Longest message that is kept, in characters.
pub const MAX_MESSAGE: usize = 500;

/// How far a delivery says it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// The job.
    pub job: JobId,
    /// The delivery that speaks.
    pub fence: Fence,
    /// 0 to 100.
    pub percent: u8,
    /// For people.
    pub message: Option<String>,
}

impl Progress {
    /// Puts both into what the ledger takes: at most 100, at most [`MAX_MESSAGE`] characters, no NUL.
    pub fn new(job: JobId, fence: Fence, percent: u8, message: &str) -> Self {
        let message: String = message.chars().filter(|c| *c != '\0').take(MAX_MESSAGE).collect();
        Self { job, fence, percent: percent.min(100), message: (!message.is_empty()).then_some(message) }
    }
}

impl Postgres {
    /// Records the progress of jobs that still run under their fence; returns these. Each job at most once in one call.
    pub async fn record_progress(&self, reports: &[Progress]) -> Result<Vec<JobId>, StoreError> {
        let rows = sqlx::query(crate::fenced_sql!(
            "WITH said AS (
                 SELECT * FROM unnest((SELECT $1::uuid[]), $2::bigint[], $3::smallint[], $4::text[]) AS s (id, fence, percent, message)
                 ORDER BY id
             ), alive AS (
                 SELECT j.id FROM said CROSS JOIN LATERAL (
                     SELECT j.id FROM jobs j
                     WHERE j.id = said.id AND j.fence = said.fence AND j.state = 'running' FOR NO KEY UPDATE
                 ) AS j
             )
             INSERT INTO job_progress AS p (job_id, fence, percent, message)
             SELECT said.id, said.fence, said.percent, said.message FROM said JOIN alive USING (id)
             ON CONFLICT (job_id) DO UPDATE
                 SET fence = EXCLUDED.fence, percent = EXCLUDED.percent, message = EXCLUDED.message, at = now()
             RETURNING p.job_id",
            "j.fence = said.fence AND j.state = 'running'"
        ))
        .bind(reports.iter().map(|r| r.job.0).collect::<Vec<_>>())
        .bind(reports.iter().map(|r| r.fence.0).collect::<Vec<_>>())
        .bind(reports.iter().map(|r| i16::from(r.percent)).collect::<Vec<_>>())
        .bind(reports.iter().map(|r| r.message.clone()).collect::<Vec<_>>())
        .fetch_all(&self.pool)
        .await?;
        rows.iter().map(|row| Ok(JobId(row.try_get::<Uuid, _>("job_id")?))).collect()
    }
}
