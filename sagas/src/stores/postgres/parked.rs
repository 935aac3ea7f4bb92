//! What a person does about a parked run: let it go on from its log, or close it.

use std::{collections::HashSet, time::Duration};

use chrono::{DateTime, Utc};
use queue::{JobId, WorkerId};
use serde::Serialize;
use serde_json::{Value, json};
use sqlx::{FromRow, PgConnection};
use uuid::Uuid;

use super::{
    Fence, Postgres,
    ending::{Ending, Failure, Run, Verdict, settle},
    ledger::record_in,
    waits::cancel_children_of_parked,
};
use crate::error::{Class, StoreError};

/// What was done with a parked run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Handled {
    /// Done: the job, and its state now.
    Done(JobId, String),
    /// The run is not parked (any more), but in this state: nothing was done.
    Not(String),
    /// No such run.
    Unknown,
}

/// A version that a run staged, published or is to erase.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, FromRow)]
pub struct RunVersion {
    /// The version.
    pub id: Uuid,
    /// `staged`, `published`, `retired`, `abandoned` or `erased`.
    pub state: String,
    /// Where its points are.
    pub collection: String,
    /// How many points it has when they are all there.
    pub chunk_count: i32,
    /// Chunk rows that are there.
    pub chunk_rows: i64,
    /// Whether its text is there.
    pub has_body: bool,
}

/// A parked run, its row locked together with its job's.
#[derive(FromRow)]
struct Parked {
    job_id: Uuid,
    state: String,
    verdict: Option<Value>,
    error: Option<String>,
    fence: i64,
    worker: Option<String>,
    taken_at: Option<DateTime<Utc>>,
}

impl Parked {
    /// How the job was to end; `None`: the run was not on its way back.
    fn verdict(&self) -> Option<Verdict> {
        self.verdict.clone().and_then(|verdict| serde_json::from_value(verdict).ok())
    }

    /// Whether its effect is seen by readers. Runs are parked on the way forward only past their pivot, but for those
    /// whose data can't be read, or whose kind nobody knows, which say so.
    fn past_pivot(&self) -> bool {
        let forward = self.verdict.as_ref().is_none_or(|verdict| verdict.get("end").is_none());
        forward
            && self.verdict.as_ref().and_then(|verdict| verdict.get("past_pivot")?.as_bool()).unwrap_or(true)
    }
}

impl Postgres {
    /// Lets a parked run go on from its log: its job waits again, and the next take grants a new fence. The budgets that
    /// may have run out begin anew. Of two who ask at once one is told that the run is not parked any more.
    pub async fn retry_parked(&self, saga: Uuid, actor: &str) -> Result<Handled, StoreError> {
        let mut tx = self.begin().await?;
        let Some(parked) = lock_parked(&mut tx, saga).await? else { return Ok(Handled::Unknown) };
        if parked.state != "parked" {
            return Ok(Handled::Not(parked.state));
        }
        sqlx::query(
            "UPDATE sagas SET state = CASE WHEN verdict ? 'end' THEN 'compensating' ELSE 'running' END,
                    verdict = CASE WHEN verdict ? 'end' THEN verdict END, lost_compensating = 0,
                    retried_fence = $2, updated_at = now()
             WHERE id = $1",
        )
        .bind(saga)
        .bind(parked.fence)
        .execute(&mut *tx)
        .await?;
        sqlx::query(
            "UPDATE jobs SET state = 'waiting', worker = NULL, finished_at = NULL, run_at = now(), dispatched_at = NULL,
                    lost_alone = 0, unroutable_since = NULL WHERE id = $1",
        )
        .bind(parked.job_id)
        .execute(&mut *tx)
        .await?;
        let detail = json!({ "job": parked.job_id, "error": parked.error });
        record_in(&mut tx, actor, "saga.retry", &saga.to_string(), &detail).await?;
        tx.commit().await?;
        Ok(Handled::Done(JobId(parked.job_id), "waiting".to_owned()))
    }

    /// Closes a parked run. Past the pivot its effect stands, and the job has succeeded with the outcome `resolved`.
    /// Before it, readers saw nothing: the job ends as the run's verdict says, where another attempt counts as none, so
    /// that it is dead with a dead letter; its children are cancelled; a staged version goes to the janitor after `sweep_after`,
    /// when what others of the run, such as its embedding's own job, still write has arrived.
    pub async fn resolve_parked(
        &self,
        saga: Uuid,
        actor: &str,
        reason: &str,
        sweep_after: Duration,
    ) -> Result<Handled, StoreError> {
        let mut tx = self.begin().await?;
        cancel_children_of_parked(&mut tx, saga).await?;
        sqlx::query("SELECT FROM document_versions WHERE saga_id = $1 FOR NO KEY UPDATE")
            .bind(saga)
            .execute(&mut *tx)
            .await?;
        let Some(parked) = lock_parked(&mut tx, saga).await? else { return Ok(Handled::Unknown) };
        if parked.state != "parked" {
            return Ok(Handled::Not(parked.state));
        }
        let past_pivot = parked.past_pivot();
        if !past_pivot {
            sqlx::query("DELETE FROM chunks WHERE version_id IN (SELECT id FROM document_versions WHERE saga_id = $1 AND state = 'staged')")
                .bind(saga)
                .execute(&mut *tx)
                .await?;
            sqlx::query(
                "UPDATE document_versions SET state = 'abandoned', body = NULL, sweep_after = now() + make_interval(secs => $2)
                 WHERE saga_id = $1 AND state = 'staged'",
            )
            .bind(saga)
            .bind(sweep_after.as_secs_f64())
            .execute(&mut *tx)
            .await?;
        }
        sqlx::query(
            "UPDATE sagas SET state = CASE WHEN $2 THEN 'completed' ELSE 'compensated' END, finished_at = now(),
                    updated_at = now(), resolved_at = now(), resolved_by = $3, resolution = $4 WHERE id = $1",
        )
        .bind(saga)
        .bind(past_pivot)
        .bind(actor)
        .bind(reason)
        .execute(&mut *tx)
        .await?;
        let state = end_job(&mut tx, saga, &parked, past_pivot).await?;
        let detail =
            json!({ "job": parked.job_id, "job_state": state, "reason": reason, "error": parked.error });
        record_in(&mut tx, actor, "saga.resolve", &saga.to_string(), &detail).await?;
        tx.commit().await?;
        Ok(Handled::Done(JobId(parked.job_id), state.to_owned()))
    }

    /// The versions that a run made, and those that it is to erase.
    pub async fn run_versions(&self, saga: Uuid) -> Result<Vec<RunVersion>, StoreError> {
        Ok(sqlx::query_as(
            "SELECT v.id, v.state, v.collection, v.chunk_count, v.body IS NOT NULL AS has_body,
                    (SELECT count(*) FROM chunks c WHERE c.version_id = v.id) AS chunk_rows
             FROM document_versions v
             WHERE v.saga_id = $1 OR v.id IN (
                 SELECT (d ->> 'version')::uuid FROM sagas s
                 CROSS JOIN LATERAL jsonb_array_elements(CASE WHEN jsonb_typeof(s.data -> 'doomed') = 'array'
                                                              THEN s.data -> 'doomed' ELSE '[]' END) AS d
                 WHERE s.id = $1 AND s.kind = 'delete')
             ORDER BY v.id",
        )
        .bind(saga)
        .fetch_all(&self.pool)
        .await?)
    }
}

async fn lock_parked(connection: &mut PgConnection, saga: Uuid) -> Result<Option<Parked>, sqlx::Error> {
    // The job's row alone is locked, as all who write to its runs do. A statement of its own reads the run after that.
    sqlx::query("SELECT FROM jobs WHERE id = (SELECT job_id FROM sagas WHERE id = $1) FOR NO KEY UPDATE")
        .bind(saga)
        .execute(&mut *connection)
        .await?;
    sqlx::query_as(
        "SELECT s.job_id, s.state, s.verdict, s.error, j.fence, j.worker, j.taken_at
         FROM sagas s JOIN jobs j ON j.id = s.job_id WHERE s.id = $1",
    )
    .bind(saga)
    .fetch_optional(connection)
    .await
}

/// Gives the job of a closed run its end; returns its state.
async fn end_job(
    connection: &mut PgConnection,
    saga: Uuid,
    parked: &Parked,
    past_pivot: bool,
) -> Result<&'static str, sqlx::Error> {
    if past_pivot {
        sqlx::query(
            "UPDATE jobs SET state = 'succeeded', outcome = 'resolved', finished_at = now() WHERE id = $1",
        )
        .bind(parked.job_id)
        .execute(connection)
        .await?;
        return Ok("succeeded");
    }
    let run = Run {
        job_id: JobId(parked.job_id),
        fence: Fence(parked.fence),
        saga_id: Some(saga),
        worker: WorkerId::new(parked.worker.clone().unwrap_or_default()),
        started_at: parked.taken_at.unwrap_or_default(),
    };
    let verdict = match parked.verdict() {
        Some(verdict @ (Verdict::Cancelled | Verdict::Superseded)) => verdict,
        verdict => Verdict::Dead { failure: failure_of(verdict, parked.error.clone().unwrap_or_default()) },
    };
    let ending = Ending { run, verdict, steps: vec![] };
    settle(connection, &[&ending], &HashSet::from([saga])).await?;
    Ok(ending.verdict.state().as_str())
}

/// Why the job failed, and behind it why it could not be undone.
fn failure_of(verdict: Option<Verdict>, parked_by: String) -> Failure {
    match verdict {
        Some(Verdict::Retry { failure, .. } | Verdict::Dead { failure }) => {
            let chain = failure.chain.into_iter().chain([parked_by]).collect();
            Failure { chain, ..failure }
        }
        _ => Failure {
            class: Class::Permanent,
            code: "parked".to_owned(),
            chain: vec![parked_by.clone()],
            error: parked_by,
        },
    }
}
