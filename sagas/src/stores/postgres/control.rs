//! What people change about jobs that wait: their priority, and when they run. Committed here first; the relay brings Redis'
//! copy up to date, because a changed job counts as not dispatched (PROTOCOL.md 17).

use chrono::{DateTime, Utc};
use queue::{Envelope, JobId, Priority};
use sqlx::Row;
use uuid::Uuid;

use super::{Postgres, relay};
use crate::error::StoreError;

/// What to change; what is `None` stays.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Change {
    /// The new priority.
    pub priority: Option<Priority>,
    /// Not before this time.
    pub run_at: Option<DateTime<Utc>>,
}

/// What became of one job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Changed {
    /// It is committed.
    Done,
    /// The job runs, and is left as it is.
    Running,
    /// The job has ended.
    Ended,
    /// No such job of this tenant.
    Unknown,
}

/// Which jobs; those that have not ended, oldest first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Selection {
    /// Only of this tenant.
    pub tenant: Option<String>,
    /// Only in this queue.
    pub queue: Option<String>,
    /// Only of this kind.
    pub kind: Option<String>,
    /// The running ones, too.
    pub running: bool,
    /// Only those behind this one.
    pub after: Option<Uuid>,
    /// At most so many.
    pub limit: i64,
}

impl Postgres {
    /// Changes jobs that wait, of `tenant` if given; one answer for each, in order.
    pub async fn change_jobs(
        &self,
        jobs: &[JobId],
        tenant: Option<&str>,
        change: Change,
    ) -> Result<Vec<Changed>, StoreError> {
        let rows = sqlx::query(
            "WITH asked AS (
                SELECT id, state FROM jobs WHERE id = ANY($1) AND ($2::text IS NULL OR tenant = $2)
                ORDER BY id FOR NO KEY UPDATE
             ), changed AS (
                UPDATE jobs j SET priority = coalesce($3, priority), run_at = coalesce($4, run_at), dispatched_at = NULL
                FROM asked a WHERE j.id = a.id AND a.state = 'waiting'
             )
             SELECT id, state FROM asked",
        )
        .bind(jobs.iter().map(|id| id.0).collect::<Vec<_>>())
        .bind(tenant)
        .bind(change.priority.map(i16::from))
        .bind(change.run_at)
        .fetch_all(&self.pool)
        .await?;
        let mut states = std::collections::HashMap::with_capacity(rows.len());
        for row in &rows {
            states.insert(row.try_get::<Uuid, _>("id")?, row.try_get::<String, _>("state")?);
        }
        Ok(jobs
            .iter()
            .map(|id| match states.get(&id.0).map(String::as_str) {
                None => Changed::Unknown,
                Some("waiting") => Changed::Done,
                Some("running") => Changed::Running,
                Some(_) => Changed::Ended,
            })
            .collect())
    }

    /// The ids of jobs that have not ended.
    pub async fn select_jobs(&self, which: &Selection) -> Result<Vec<JobId>, StoreError> {
        let ids: Vec<Uuid> = sqlx::query_scalar(
            "SELECT id FROM jobs
             WHERE state IN ('waiting', 'running') AND (state = 'waiting' OR $4) AND ($1::text IS NULL OR tenant = $1)
               AND ($2::text IS NULL OR queue = $2) AND ($3::text IS NULL OR kind = $3)
               AND ($6::uuid IS NULL OR id > $6)
             ORDER BY id LIMIT $5",
        )
        .bind(&which.tenant)
        .bind(&which.queue)
        .bind(&which.kind)
        .bind(which.running)
        .bind(which.limit)
        .bind(which.after)
        .fetch_all(&self.pool)
        .await?;
        Ok(ids.into_iter().map(JobId).collect())
    }

    /// The envelopes of those of these jobs that wait.
    pub async fn waiting_envelopes(&self, jobs: &[JobId]) -> Result<Vec<Envelope>, StoreError> {
        let rows = sqlx::query(sqlx::AssertSqlSafe(format!(
            "SELECT {} FROM jobs WHERE id = ANY($1) AND state = 'waiting' ORDER BY id",
            relay::ENVELOPE
        )))
        .bind(jobs.iter().map(|id| id.0).collect::<Vec<_>>())
        .fetch_all(&self.pool)
        .await?;
        rows.iter().map(relay::envelope).collect()
    }
}
