//! The ledger for jobs that are no sagas: [`queue::Ledger`] over the table `jobs`.

use std::{sync::Arc, time::Duration};

use chrono::Utc;
use queue::{
    Envelope, JobId, WorkerId,
    ledger::{self, End, FailureClass, Grant, Ledger, LedgerError, Written},
};
use tokio::time::Instant;

use super::{
    Fence, Postgres,
    ending::{CompleteBatch, Completed, Completion, Ending, Failure, GivenBack, Run, Verdict},
    take::{Take, TakeBatch, TakeItem, TakenJob, UNROUTABLE_AFTER, look_again_in, refused_for},
};
use crate::{
    coalescing::{Coalescer, Limits},
    error::{Class, StoreError, storable},
    results::{MAX_RESULT, fits},
};

/// The ledger of one worker for jobs that are no sagas. Takes and successes of jobs that run at the same time share their
/// commits. Clones share everything. Needs a tokio runtime, on which it starts two tasks that end with the last clone.
#[derive(Clone)]
pub struct PlainLedger {
    postgres: Postgres,
    worker: WorkerId,
    take: Coalescer<TakeBatch>,
    complete: Coalescer<CompleteBatch>,
    max_result: usize,
    unroutable_after: Duration,
}

impl std::fmt::Debug for PlainLedger {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PlainLedger").field("worker", &self.worker).finish_non_exhaustive()
    }
}

impl PlainLedger {
    /// The ledger as `worker` sees it.
    pub fn new(postgres: Postgres, worker: WorkerId) -> Self {
        let take = TakeBatch::new(postgres.clone(), worker.clone()).knowing_all();
        Self {
            take: Coalescer::spawn(take, Limits::default()),
            complete: Coalescer::spawn(CompleteBatch(postgres.clone()), Limits::default()),
            postgres,
            worker,
            max_result: MAX_RESULT,
            unroutable_after: UNROUTABLE_AFTER,
        }
    }

    /// Takes results of at most so many bytes of JSON in place of [`MAX_RESULT`]. A job with a larger one is dead.
    #[must_use]
    pub fn with_max_result(self, bytes: usize) -> Self {
        Self { max_result: bytes, ..self }
    }

    /// Waits so long, in place of [`UNROUTABLE_AFTER`], for a worker that can read a job's payload; then the job is dead.
    #[must_use]
    pub fn with_unroutable_after(self, time: Duration) -> Self {
        Self { unroutable_after: time, ..self }
    }

    /// A payload that this worker has no key for goes back uncharged: another worker may have it. The job is dead only when none
    /// had it for long.
    async fn unreadable(&self, job: TakenJob) -> Result<ledger::Take, LedgerError> {
        let why = job.unreadable.unwrap_or_default();
        tracing::warn!(job = %job.id, why, "a payload can't be read here");
        let run = Run {
            job_id: job.id,
            fence: job.fence,
            saga_id: None,
            worker: self.worker.clone(),
            started_at: Utc::now(),
        };
        if job.cancel_requested {
            self.postgres.finish(&run, &Verdict::Cancelled, &[]).await.map_err(ledger_error)?;
            return Ok(ledger::Take::Gone);
        }
        let waited = job.unroutable_for.unwrap_or_default();
        if waited >= self.unroutable_after {
            let error = format!("no worker could read the payload for {:?}: {why}", self.unroutable_after);
            let failure = Failure {
                class: Class::Permanent,
                code: "unreadable_payload".to_owned(),
                chain: vec![error.clone()],
                error,
            };
            let kept =
                self.postgres.finish(&run, &Verdict::Dead { failure }, &[]).await.map_err(ledger_error)?;
            return Ok(if kept { ledger::Take::Dead } else { ledger::Take::Gone });
        }
        let why = format!("payload: {why}");
        self.postgres.note_error(job.id, job.fence, &why).await.map_err(ledger_error)?;
        let wait = look_again_in(self.unroutable_after, waited);
        let release = self.postgres.release(&run, wait, GivenBack::Unroutable(waited));
        let kept = release.await.map_err(ledger_error)?;
        Ok(kept.map_or(ledger::Take::Gone, ledger::Take::NotYet))
    }

    /// Whether the refused end was this delivery's own, whose answer was lost (PROTOCOL.md 20).
    async fn ended_before(&self, run: &Run) -> Result<bool, LedgerError> {
        let standing = self.postgres.standing(run.job_id).await.map_err(ledger_error)?;
        Ok(standing.is_some_and(|(state, fence)| fence == run.fence && state != "running"))
    }
}

impl Ledger for PlainLedger {
    async fn take(&self, envelope: &Envelope, within: Duration) -> Result<ledger::Take, LedgerError> {
        let item = match TakeItem::of(envelope) {
            Ok(item) => item,
            Err(wait) => return Ok(ledger::Take::NotYet(wait)),
        };
        let taken = match self.take.call(item, Instant::now() + within).await {
            Ok(taken) => taken,
            Err(error) => {
                let Some(wait) = refused_for(&error) else { return Err(ledger_error(error)) };
                tracing::error!(job = %envelope.id, %error, ?wait, "the ledger refuses the job; it is put off");
                return Ok(ledger::Take::NotYet(wait));
            }
        };
        Ok(match taken {
            Take::Taken(job) if job.unreadable.is_some() => self.unreadable(*job).await?,
            Take::Taken(job) => ledger::Take::Granted(grant(*job)),
            Take::Gone => ledger::Take::Gone,
            Take::NotYet(wait) => ledger::Take::NotYet(wait),
        })
    }

    async fn alone(&self, job: JobId, grant: &Grant) -> Result<bool, LedgerError> {
        self.postgres.mark_alone(job, Fence(grant.fence)).await.map_err(ledger_error)
    }

    async fn wanted_to_end(&self, jobs: &[JobId]) -> Result<Vec<JobId>, LedgerError> {
        let asked = self.postgres.in_time(self.postgres.cancel_requests(jobs));
        asked.await.map_err(ledger_error)
    }

    async fn end(&self, job: JobId, grant: &Grant, end: &End) -> Result<Written, LedgerError> {
        let run = Run {
            job_id: job,
            fence: Fence(grant.fence),
            saga_id: None,
            worker: self.worker.clone(),
            started_at: Utc::now(),
        };
        let finish = |verdict: Verdict| {
            let ending = Ending { run: run.clone(), verdict, steps: vec![] };
            async move { Ok(self.postgres.finish_all(&[&ending]).await?.remove(0)) }
        };
        let written = match end {
            End::Succeeded(result) => {
                fits(result, self.max_result).map_err(|error| LedgerError::Refused(error.to_string()))?;
                let success = Completion {
                    job_id: job,
                    fence: run.fence,
                    saga: None,
                    result: result.clone(),
                    steps: vec![],
                    revocable: false,
                };
                let deadline = Instant::now() + self.postgres.call_timeout();
                self.complete.call(Arc::new(success), deadline).await.map(|ended| match ended {
                    Completed::Done => Written::Kept,
                    Completed::Cancelled | Completed::Refused => Written::Refused,
                })
            }
            End::Retry(failure, wait) => {
                let retry_in_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
                finish(Verdict::Retry { failure: charged(failure), retry_in_ms }).await
            }
            End::Dead(failure) => finish(Verdict::Dead { failure: charged(failure) }).await,
            End::Cancelled => finish(Verdict::Cancelled).await,
            End::Released(wait) => {
                let release = self.postgres.release(&run, *wait, GivenBack::Asked);
                release.await.map(|kept| match kept {
                    Some(kept) if kept == *wait => Written::Kept,
                    Some(_) => Written::AtOnce,
                    None => Written::Refused,
                })
            }
        };
        Ok(match written.map_err(ledger_error)? {
            Written::Refused if self.ended_before(&run).await? => Written::AtOnce,
            written => written,
        })
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
        error: storable(failure.error.clone()),
        chain: failure.chain.iter().cloned().map(storable).collect(),
    }
}

/// Only an error of the data is the job's own; everything else is waited out, as nothing of it was the job's doing.
fn ledger_error(error: StoreError) -> LedgerError {
    match error.class {
        Class::Data | Class::Permanent => LedgerError::Refused(error.to_string()),
        _ => LedgerError::Unavailable(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_charged_with_texts_that_postgres_takes() {
        let failure = ledger::Failure {
            class: FailureClass::Permanent,
            code: "handler",
            error: "a\0b".to_owned(),
            chain: vec!["a".to_owned(), "\0b".to_owned()],
        };
        let charged = charged(&failure);
        assert_eq!(charged.error, "a\u{fffd}b");
        assert_eq!(charged.chain, ["a", "\u{fffd}b"]);
    }
}
