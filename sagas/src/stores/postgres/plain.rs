//! The ledger for jobs that are no sagas: [`queue::Ledger`] over the table `jobs`.

use std::time::Duration;

use async_trait::async_trait;
use chrono::Utc;
use queue::{
    Envelope, JobId, WorkerId,
    ledger::{self, End, FailureClass, Grant, Ledger, LedgerError},
};
use serde_json::Value;
use sqlx::Row;
use tokio::time::Instant;
use uuid::Uuid;

use super::{
    Fence, Postgres,
    ending::{Failure, Run, Verdict},
    take::{Take, TakeBatch, TakeItem, TakenJob},
};
use crate::{
    coalescing::{Batch, Coalescer, Limits},
    error::{Class, Dependency, StoreError},
    results::{MAX_RESULT, fits},
};

/// The ledger of one worker for jobs that are no sagas. Takes and successes of jobs that run at the same time share their
/// commits. Clones share everything. Needs a tokio runtime, on which it starts two tasks that end with the last clone.
#[derive(Clone)]
pub struct PlainLedger {
    postgres: Postgres,
    worker: WorkerId,
    take: Coalescer<TakeBatch>,
    succeed: Coalescer<SucceedBatch>,
    max_result: usize,
}

impl std::fmt::Debug for PlainLedger {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PlainLedger").field("worker", &self.worker).finish_non_exhaustive()
    }
}

/// How long a job waits whose payload this worker can't read.
const UNREADABLE_FOR: Duration = Duration::from_secs(10);

impl PlainLedger {
    /// The ledger as `worker` sees it.
    pub fn new(postgres: Postgres, worker: WorkerId) -> Self {
        let take = TakeBatch { postgres: postgres.clone(), worker: worker.clone() };
        let succeed = SucceedBatch(postgres.clone());
        Self {
            take: Coalescer::spawn(take, Limits::default()),
            succeed: Coalescer::spawn(succeed, Limits::default()),
            postgres,
            worker,
            max_result: MAX_RESULT,
        }
    }

    /// Takes results of at most so many bytes of JSON in place of [`MAX_RESULT`]. A job with a larger one is dead.
    #[must_use]
    pub fn with_max_result(self, bytes: usize) -> Self {
        Self { max_result: bytes, ..self }
    }

    /// A payload that this worker has no key for goes back uncharged: another worker may have it.
    async fn unreadable(&self, job: TakenJob) -> Result<ledger::Take, LedgerError> {
        let why = format!("payload: {}", job.unreadable.as_deref().unwrap_or_default());
        tracing::warn!(job = %job.id, why, "a payload can't be read here: released uncharged");
        let run = Run {
            job_id: job.id,
            fence: job.fence,
            saga_id: None,
            worker: self.worker.clone(),
            started_at: Utc::now(),
        };
        self.postgres.note_error(job.id, job.fence, &why).await.map_err(ledger_error)?;
        let kept = self.postgres.release(&run, UNREADABLE_FOR, None, true).await.map_err(ledger_error)?;
        Ok(if kept { ledger::Take::NotYet(UNREADABLE_FOR) } else { ledger::Take::Gone })
    }

    /// Whether the refused end was this delivery's own, whose answer was lost (PROTOCOL.md 20).
    async fn ended_before(&self, run: &Run) -> Result<bool, LedgerError> {
        let standing = self.postgres.standing(run.job_id).await.map_err(ledger_error)?;
        Ok(standing.is_some_and(|(state, fence)| fence == run.fence && state != "running"))
    }
}

impl Ledger for PlainLedger {
    async fn take(&self, envelope: &Envelope, within: Duration) -> Result<ledger::Take, LedgerError> {
        let fast = match envelope.fast.clone().map(serde_json::from_value).transpose() {
            Ok(fast) => fast,
            Err(error) => {
                tracing::error!(job = %envelope.id, %error, "a fast job's record can't be read; dropped");
                return Ok(ledger::Take::Gone);
            }
        };
        let item = TakeItem { id: envelope.id, fast };
        Ok(match self.take.call(item, Instant::now() + within).await.map_err(ledger_error)? {
            Take::Taken(job) if job.unreadable.is_some() => self.unreadable(*job).await?,
            Take::Taken(job) => ledger::Take::Granted(grant(*job)),
            Take::Gone => ledger::Take::Gone,
            Take::NotYet(wait) => ledger::Take::NotYet(wait),
        })
    }

    async fn alone(&self, job: JobId, grant: &Grant) -> Result<bool, LedgerError> {
        self.postgres.mark_alone(job, Fence(grant.fence)).await.map_err(ledger_error)
    }

    async fn end(&self, job: JobId, grant: &Grant, end: &End) -> Result<bool, LedgerError> {
        let run = Run {
            job_id: job,
            fence: Fence(grant.fence),
            saga_id: None,
            worker: self.worker.clone(),
            started_at: Utc::now(),
        };
        let finish = |verdict: Verdict| {
            let run = &run;
            async move { self.postgres.finish(run, &verdict, &[]).await }
        };
        let written = match end {
            End::Succeeded(result) => {
                fits(result, self.max_result).map_err(|error| LedgerError::Refused(error.to_string()))?;
                let success = Success { job, fence: run.fence, result: result.clone() };
                self.succeed.call(success, Instant::now() + self.postgres.call_timeout()).await
            }
            End::Retry(failure, wait) => {
                let retry_in_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
                finish(Verdict::Retry { failure: charged(failure), retry_in_ms }).await
            }
            End::Dead(failure) => finish(Verdict::Dead { failure: charged(failure) }).await,
            End::Cancelled => finish(Verdict::Cancelled).await,
            End::Released(wait) => self.postgres.release(&run, *wait, None, false).await,
        };
        Ok(written.map_err(ledger_error)? || self.ended_before(&run).await?)
    }
}

fn grant(job: TakenJob) -> Grant {
    let count = |number: i32| u32::try_from(number).unwrap_or_default();
    Grant {
        payload: job.payload,
        fence: job.fence.0,
        attempts: count(job.attempts),
        max_attempts: Some(count(job.max_attempts)),
        timeout: Some(job.timeout),
        lost: count(job.lost_deliveries),
        lost_alone: count(job.lost_alone),
        cancelled: job.cancel_requested,
    }
}

fn charged(failure: &ledger::Failure) -> Failure {
    Failure {
        class: match failure.class {
            FailureClass::Transient => Class::Transient,
            FailureClass::Timeout => Class::Timeout,
            FailureClass::RateLimited => Class::RateLimited,
            FailureClass::Permanent => Class::Permanent,
        },
        code: failure.code.to_owned(),
        error: failure.error.clone(),
        chain: failure.chain.clone(),
    }
}

/// Only an error of the data is the job's own; everything else is waited out, as nothing of it was the job's doing.
fn ledger_error(error: StoreError) -> LedgerError {
    match error.class {
        Class::Data | Class::Permanent => LedgerError::Refused(error.to_string()),
        _ => LedgerError::Unavailable(error.to_string()),
    }
}

/// One job that succeeded.
#[derive(Debug, Clone)]
struct Success {
    job: JobId,
    fence: Fence,
    result: Value,
}

struct SucceedBatch(Postgres);

#[async_trait]
impl Batch for SucceedBatch {
    type Item = Success;
    type Reply = bool;
    const OP: &'static str = "succeed";
    const DEPENDENCY: Dependency = Dependency::Postgres;

    async fn flush(&self, items: &[Success]) -> Result<Vec<bool>, StoreError> {
        self.0.succeed(items).await
    }
}

impl Postgres {
    /// Ends jobs without a saga as succeeded, in one statement; answers in the items' order. `false`: the fence refused.
    async fn succeed(&self, items: &[Success]) -> Result<Vec<bool>, StoreError> {
        let given: Vec<(JobId, &Value)> = items.iter().map(|item| (item.job, &item.result)).collect();
        let (results, keys): (Vec<Value>, Vec<Option<String>>) =
            self.seal_results(&given).await?.into_iter().unzip();
        let rows = sqlx::query(crate::fenced_sql!(
            "WITH alive AS (
                SELECT j.id, held.result, held.key_id FROM jobs j
                JOIN unnest($1::uuid[], $2::bigint[], $3::jsonb[], $4::text[]) AS held (id, fence, result, key_id) ON held.id = j.id
                WHERE j.fence = held.fence AND j.state = 'running'
                ORDER BY j.id FOR NO KEY UPDATE OF j
             )
             UPDATE jobs j SET state = 'succeeded', result = nullif(alive.result, 'null'), result_key_id = alive.key_id,
                    finished_at = now(), last_error = NULL
             FROM alive WHERE j.id = alive.id RETURNING j.id",
            "j.fence = held.fence AND j.state = 'running'"
        ))
        .bind(items.iter().map(|item| item.job.0).collect::<Vec<_>>())
        .bind(items.iter().map(|item| item.fence.0).collect::<Vec<_>>())
        .bind(results)
        .bind(keys)
        .fetch_all(&self.pool)
        .await?;
        let ended = rows.iter().map(|row| row.try_get("id")).collect::<Result<Vec<Uuid>, _>>()?;
        Ok(items.iter().map(|item| ended.contains(&item.job.0)).collect())
    }
}
