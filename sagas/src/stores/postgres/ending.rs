//! How a run ends when not by its pivot: completed, released, retried, cancelled, superseded, dead or parked.
//! A job becomes dead here and nowhere else (PROTOCOL.md 12).

use std::time::Duration;

use chrono::{DateTime, Utc};
use queue::{JobId, WorkerId};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sqlx::PgConnection;
use uuid::Uuid;

use super::{Fence, Postgres, lock_alive, take::StepRecord};
use crate::error::{Class, StoreError};

/// Why a job failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What can be done about it.
    pub class: Class,
    /// The reason as a word: `empty_document`, `unknown_kind`, `poison`, …
    pub code: String,
    /// The reason as a sentence.
    pub error: String,
    /// The causes, outermost first.
    pub chain: Vec<String>,
}

/// How a job ends once its saga's effects are undone. Committed before the first compensating call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "end", rename_all = "snake_case")]
pub enum Verdict {
    /// Another attempt, as a new run, after `retry_in_ms`. Charged.
    Retry {
        /// Why.
        failure: Failure,
        /// Milliseconds until the next attempt.
        retry_in_ms: u64,
    },
    /// No attempt without a person: a dead letter.
    Dead {
        /// Why.
        failure: Failure,
    },
    /// As a person asked.
    Cancelled,
    /// A later job settled the document: succeeded, with nothing left to do.
    Superseded,
}

impl Verdict {
    /// The value of the label `status` of `saga_executions_total`.
    pub fn status(&self) -> &'static str {
        match self {
            Self::Retry { .. } => "retried",
            Self::Dead { .. } => "dead",
            Self::Cancelled => "cancelled",
            Self::Superseded => "superseded",
        }
    }
}

/// Who ends what.
#[derive(Debug, Clone)]
pub struct Run {
    /// The job.
    pub job_id: JobId,
    /// Under this fence.
    pub fence: Fence,
    /// The saga's run, if one began.
    pub saga_id: Option<Uuid>,
    /// Who ran it.
    pub worker: WorkerId,
    /// When this delivery began.
    pub started_at: DateTime<Utc>,
}

/// Writes the steps of a run's delivery. The caller holds the fences.
pub(super) async fn insert_steps(
    connection: &mut PgConnection,
    runs: &[(Uuid, Fence, &[StepRecord])],
) -> Result<(), sqlx::Error> {
    let (mut sagas, mut fences, mut seqs, mut records) = (vec![], vec![], vec![], vec![]);
    for (saga, fence, steps) in runs {
        for (seq, step) in steps.iter().enumerate() {
            sagas.push(*saga);
            fences.push(fence.0);
            seqs.push(seq as i32);
            records.push(step);
        }
    }
    if records.is_empty() {
        return Ok(());
    }
    sqlx::query(
        "INSERT INTO saga_steps (saga_id, fence, seq, step_name, direction, state, attempts, started_at, ended_at, error)
         SELECT saga_id, fence, seq, step, CASE WHEN compensation THEN 'compensate' ELSE 'execute' END,
                CASE WHEN error IS NULL THEN 'succeeded' ELSE 'failed' END, attempts, started_at, ended_at, error
         FROM unnest($1::uuid[], $2::bigint[], $3::integer[], $4::text[], $5::boolean[], $6::integer[],
                     $7::timestamptz[], $8::timestamptz[], $9::text[])
              AS s (saga_id, fence, seq, step, compensation, attempts, started_at, ended_at, error)
         ON CONFLICT (saga_id, fence, seq) DO NOTHING",
    )
    .bind(sagas)
    .bind(fences)
    .bind(seqs)
    .bind(records.iter().map(|r| r.step.clone()).collect::<Vec<_>>())
    .bind(records.iter().map(|r| r.compensation).collect::<Vec<_>>())
    .bind(records.iter().map(|r| r.attempts).collect::<Vec<_>>())
    .bind(records.iter().map(|r| r.started_at).collect::<Vec<_>>())
    .bind(records.iter().map(|r| r.ended_at).collect::<Vec<_>>())
    .bind(records.iter().map(|r| r.error.clone()).collect::<Vec<_>>())
    .execute(connection)
    .await?;
    Ok(())
}

impl Postgres {
    /// Ends a forward run whose pivot did not end the job itself. `false`: the fence refused.
    pub async fn complete(
        &self,
        run: &Run,
        result: &Value,
        steps: &[StepRecord],
    ) -> Result<bool, StoreError> {
        let sealed = self.seal_results(&[(run.job_id, result)]).await?;
        let mut tx = self.pool.begin().await?;
        if lock_alive(&mut tx, &[(run.job_id, run.fence)]).await?.is_empty() {
            return Ok(false);
        }
        if let Some(saga) = run.saga_id {
            sqlx::query("UPDATE sagas SET state = 'completed', finished_at = now(), updated_at = now(), fence = $2 WHERE id = $1")
                .bind(saga)
                .bind(run.fence.0)
                .execute(&mut *tx)
                .await?;
            insert_steps(&mut tx, &[(saga, run.fence, steps)]).await?;
        }
        let (result, key_id) = sealed.into_iter().next().unwrap_or_default();
        sqlx::query(
            "UPDATE jobs SET state = 'succeeded', result = nullif($2, 'null'::jsonb), result_key_id = $3, finished_at = now(), last_error = NULL WHERE id = $1",
        )
            .bind(run.job_id.0)
            .bind(result)
            .bind(key_id)
            .execute(&mut *tx)
            .await?;
        crate::fault_point!("engine.complete.inside");
        tx.commit().await?;
        Ok(true)
    }

    /// Ends a run as its verdict says; its effects are undone by now. `false`: the fence refused.
    pub async fn finish(
        &self,
        run: &Run,
        verdict: &Verdict,
        steps: &[StepRecord],
    ) -> Result<bool, StoreError> {
        let mut tx = self.pool.begin().await?;
        if lock_alive(&mut tx, &[(run.job_id, run.fence)]).await?.is_empty() {
            return Ok(false);
        }
        // A run whose first step failed has no row: its rollback left nothing to log steps for, or to point at.
        let mut begun = run.clone();
        if let Some(saga) = run.saga_id {
            let ended = sqlx::query(
                "UPDATE sagas SET state = 'compensated', verdict = $2, finished_at = now(), updated_at = now(), fence = $3
                 WHERE id = $1",
            )
            .bind(saga)
            .bind(json!(verdict))
            .bind(run.fence.0)
            .execute(&mut *tx)
            .await?;
            if ended.rows_affected() == 0 {
                begun.saga_id = None;
            } else {
                insert_steps(&mut tx, &[(saga, run.fence, steps)]).await?;
            }
        }
        let run = &begun;
        let job = run.job_id.0;
        match verdict {
            Verdict::Retry { failure, retry_in_ms } => {
                charge(&mut tx, run, failure).await?;
                sqlx::query(
                    "UPDATE jobs SET state = 'waiting', run_at = now() + make_interval(secs => $2), worker = NULL, last_error = $3
                     WHERE id = $1",
                )
                .bind(job)
                .bind(Duration::from_millis(*retry_in_ms).as_secs_f64())
                .bind(&failure.error)
                .execute(&mut *tx)
                .await?;
            }
            Verdict::Dead { failure } => {
                charge(&mut tx, run, failure).await?;
                die(&mut tx, run, failure).await?;
            }
            Verdict::Cancelled => {
                sqlx::query("UPDATE jobs SET state = 'cancelled', finished_at = now() WHERE id = $1")
                    .bind(job)
                    .execute(&mut *tx)
                    .await?;
            }
            Verdict::Superseded => {
                sqlx::query("UPDATE jobs SET state = 'succeeded', outcome = 'superseded', finished_at = now() WHERE id = $1")
                    .bind(job)
                    .execute(&mut *tx)
                    .await?;
            }
        }
        crate::fault_point!("engine.finish.inside");
        tx.commit().await?;
        Ok(true)
    }

    /// Parks a run whose effects can't be undone or finished without a person. `false`: the fence refused.
    pub async fn park(
        &self,
        run: &Run,
        verdict: Option<&Verdict>,
        error: &str,
        steps: &[StepRecord],
    ) -> Result<bool, StoreError> {
        let mut tx = self.pool.begin().await?;
        if lock_alive(&mut tx, &[(run.job_id, run.fence)]).await?.is_empty() {
            return Ok(false);
        }
        if let Some(saga) = run.saga_id {
            let parked = sqlx::query(
                "UPDATE sagas SET state = 'parked', verdict = coalesce($2, verdict, '{}'), error = $3, updated_at = now(), fence = $4
                 WHERE id = $1",
            )
            .bind(saga)
            .bind(verdict.map(|v| json!(v)))
            .bind(error)
            .bind(run.fence.0)
            .execute(&mut *tx)
            .await?;
            if parked.rows_affected() == 1 {
                insert_steps(&mut tx, &[(saga, run.fence, steps)]).await?;
            }
        }
        sqlx::query("UPDATE jobs SET state = 'parked', finished_at = now(), last_error = $2 WHERE id = $1")
            .bind(run.job_id.0)
            .bind(error)
            .execute(&mut *tx)
            .await?;
        tx.commit().await?;
        Ok(true)
    }

    /// Gives a job back, uncharged: the process stops, or nobody here can run it. The saga goes on from `next_step` with
    /// `data` in its next delivery. `false`: the fence refused.
    pub async fn release(
        &self,
        run: &Run,
        delay: Duration,
        progress: Option<(i16, &Value)>,
        unroutable: bool,
    ) -> Result<bool, StoreError> {
        let mut tx = self.pool.begin().await?;
        if lock_alive(&mut tx, &[(run.job_id, run.fence)]).await?.is_empty() {
            return Ok(false);
        }
        if let (Some(saga), Some((next_step, data))) = (run.saga_id, progress) {
            sqlx::query(
                // The log never goes back: a step whose commit was not answered may stand in it although it seemed to fail.
                "UPDATE sagas SET next_step = $2, data = $3, updated_at = now(), fence = $4 WHERE id = $1 AND next_step <= $2",
            )
            .bind(saga)
            .bind(next_step)
            .bind(data)
            .bind(run.fence.0)
            .execute(&mut *tx)
            .await?;
        }
        sqlx::query(
            "UPDATE jobs SET state = 'waiting', worker = NULL, run_at = now() + make_interval(secs => $2),
                    unroutable_since = CASE WHEN $3 THEN coalesce(unroutable_since, now()) END
             WHERE id = $1",
        )
        .bind(run.job_id.0)
        .bind(delay.as_secs_f64())
        .bind(unroutable)
        .execute(&mut *tx)
        .await?;
        tx.commit().await?;
        Ok(true)
    }

    /// Whether a job has ended, and under which fence it runs: read back after an answer that was lost
    /// (PROTOCOL.md 20).
    pub async fn standing(&self, job: JobId) -> Result<Option<(String, Fence)>, StoreError> {
        let row: Option<(String, i64)> = sqlx::query_as("SELECT state, fence FROM jobs WHERE id = $1")
            .bind(job.0)
            .fetch_optional(&self.pool)
            .await?;
        Ok(row.map(|(state, fence)| (state, Fence(fence))))
    }

    /// Which of these running jobs a person wants to end.
    pub async fn cancel_requests(&self, running: &[Uuid]) -> Result<Vec<JobId>, StoreError> {
        let ids: Vec<Uuid> =
            sqlx::query_scalar("SELECT id FROM jobs WHERE id = ANY($1) AND cancel_requested_at IS NOT NULL")
                .bind(running)
                .fetch_all(&self.pool)
                .await?;
        Ok(ids.into_iter().map(JobId).collect())
    }
}

/// Charges one attempt and keeps its record.
async fn charge(connection: &mut PgConnection, run: &Run, failure: &Failure) -> Result<(), sqlx::Error> {
    sqlx::query(
        "WITH charged AS (UPDATE jobs SET attempts = attempts + 1 WHERE id = $1 RETURNING id, attempts)
         INSERT INTO job_attempts (job_id, attempt, fence, worker, started_at, class, error)
         SELECT id, attempts, $2, $3, $4, $5, $6 FROM charged",
    )
    .bind(run.job_id.0)
    .bind(run.fence.0)
    .bind(run.worker.to_string())
    .bind(run.started_at)
    .bind(failure.class.name())
    .bind(&failure.error)
    .execute(connection)
    .await?;
    Ok(())
}

async fn die(connection: &mut PgConnection, run: &Run, failure: &Failure) -> Result<(), sqlx::Error> {
    sqlx::query(
        "WITH dead AS (UPDATE jobs SET state = 'dead', finished_at = now(), last_error = $2 WHERE id = $1 RETURNING *)
         INSERT INTO dead_letters (id, job_id, saga_id, tenant, kind, queue, class, reason, error_chain, payload, payload_key_id, traceparent)
         SELECT uuid7(), id, $3, tenant, kind, queue, $4, $2, $5, payload, payload_key_id, traceparent FROM dead",
    )
    .bind(run.job_id.0)
    .bind(&failure.error)
    .bind(run.saga_id)
    .bind(&failure.code)
    .bind(json!(failure.chain))
    .execute(connection)
    .await?;
    Ok(())
}
