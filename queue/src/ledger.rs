//! What makes a job more than an entry in Redis: the ledger, as a trait, and the explicit choice to have none.

use std::{future::Future, time::Duration};

use serde_json::Value;

use crate::{envelope::Envelope, ids::JobId};

/// The durable record of jobs, as a worker needs it: it grants the right to run a job, and keeps how the job ended.
///
/// A lease in Redis is only a hint who should work (PROTOCOL.md 1). [`take`](Self::take) grants a *fence*, a number that
/// only grows; [`end`](Self::end) is refused for any but the newest one, in the statement that writes. So a worker that
/// was believed dead can't end a job a second time. `sagas` has an implementation over Postgres; [`NoLedger`] is the
/// choice to do without. Clones share everything.
pub trait Ledger: Clone + Send + Sync + 'static {
    /// Whether the ledger counts charged failures. If not, the job's entry in Redis does.
    const COUNTS: bool = true;

    /// Grants the fence for a claimed job. Ends within `within`.
    fn take(
        &self,
        envelope: &Envelope,
        within: Duration,
    ) -> impl Future<Output = Result<Take, LedgerError>> + Send;

    /// Records that the job runs alone in its process from now on, so that a loss counts towards the delivery limit
    /// (PROTOCOL.md 13). `false`: the fence refused. Not called if the job's entry in Redis [counts](Self::COUNTS).
    fn alone(&self, job: JobId, grant: &Grant) -> impl Future<Output = Result<bool, LedgerError>> + Send;

    /// Which of these jobs, which run here, a person wants to end. Asked about once a second while any run.
    fn wanted_to_end(&self, jobs: &[JobId]) -> impl Future<Output = Result<Vec<JobId>, LedgerError>> + Send;

    /// Records how the delivery ended. May be repeated: a second call with the same end finds that the first has written.
    fn end(
        &self,
        job: JobId,
        grant: &Grant,
        end: &End,
    ) -> impl Future<Output = Result<Written, LedgerError>> + Send;
}

/// Why a ledger gave no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LedgerError {
    /// It can't be reached, or didn't answer in time: the job is not charged, and the call is made again.
    #[error("the ledger is unavailable: {0}")]
    Unavailable(String),
    /// It refused this very call, for example a result that is too large; making it again is of no use.
    #[error("the ledger refused: {0}")]
    Refused(String),
}

/// The answer to a take.
#[derive(Debug, Clone, PartialEq)]
pub enum Take {
    /// The job is ours under this grant.
    Granted(Grant),
    /// It has ended, or never existed: drop it from Redis.
    Gone,
    /// It has ended by this very take, which nobody could run: as [`Gone`](Self::Gone), and it counts as dead.
    Dead,
    /// It may not run now: put it back for so long, uncharged.
    NotYet(Duration),
}

/// What a ledger says of a job that it grants.
#[derive(Debug, Clone, PartialEq)]
pub struct Grant {
    /// The request.
    pub payload: Value,
    /// Carried by every write of this delivery.
    pub fence: i64,
    /// Charged failures so far.
    pub attempts: u32,
    /// Charged failures after which the job is dead; `None`: the worker's own limit.
    pub max_attempts: Option<u32>,
    /// Hard cap on one run, which a heartbeat doesn't extend; `None`: there is none.
    pub timeout: Option<Duration>,
    /// Deliveries that ended in a lost lease.
    pub lost: u32,
    /// Of those, how many happened while the job ran alone in its process.
    pub lost_alone: u32,
    /// A person asked for the job's end.
    pub cancelled: bool,
}

/// How a delivery ended.
#[derive(Debug, Clone, PartialEq)]
pub enum End {
    /// The job is done. `Null` is no result.
    Succeeded(Value),
    /// Another attempt after the wait; charged.
    Retry(Failure, Duration),
    /// No attempt without a person; charged.
    Dead(Failure),
    /// As a person asked.
    Cancelled,
    /// Given back after the wait, uncharged.
    Released(Duration),
}

/// What became of an end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Written {
    /// It is recorded.
    Kept,
    /// It is recorded, but the job does not wait as long as the end says: a person wants its end, or what it waits for is not
    /// known here. The next take finds out.
    AtOnce,
    /// The fence refused, and nothing was written.
    Refused,
}

/// Why a job failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// What can be done about it.
    pub class: FailureClass,
    /// The reason as a word, for example `handler`, `timeout`, `poison`.
    pub code: &'static str,
    /// The reason as a sentence.
    pub error: String,
    /// The causes, outermost first.
    pub chain: Vec<String>,
}

/// What can be done about a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureClass {
    /// May well work the next time.
    Transient,
    /// No end within the job's timeout.
    Timeout,
    /// Too many requests; try again when told.
    RateLimited,
    /// Will not work however often it is tried.
    Permanent,
}

/// The durability mode without a ledger: a job is its entry in Redis and nothing else, and is lost with Redis' data.
/// It may run twice after a lost lease, and what is dead is logged, counted (`queue_jobs_dropped_total`) and dropped.
/// The payload is the envelope's `fast` record.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoLedger;

impl Ledger for NoLedger {
    const COUNTS: bool = false;

    async fn take(&self, envelope: &Envelope, _: Duration) -> Result<Take, LedgerError> {
        Ok(Take::Granted(Grant {
            payload: envelope.fast.clone().unwrap_or_default(),
            fence: 0,
            attempts: envelope.attempts,
            max_attempts: None,
            timeout: None,
            lost: envelope.lost,
            lost_alone: envelope.lost_alone,
            cancelled: false,
        }))
    }

    async fn wanted_to_end(&self, _: &[JobId]) -> Result<Vec<JobId>, LedgerError> {
        Ok(vec![])
    }

    async fn alone(&self, _: JobId, _: &Grant) -> Result<bool, LedgerError> {
        Ok(true)
    }

    async fn end(&self, job: JobId, _: &Grant, end: &End) -> Result<Written, LedgerError> {
        if let End::Dead(failure) = end {
            tracing::error!(%job, error = failure.error, code = failure.code, "the job is dropped and not tried again");
            metrics::counter!("queue_jobs_dropped_total", "reason" => failure.code).increment(1);
        }
        Ok(Written::Kept)
    }
}
