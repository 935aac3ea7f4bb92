//! What can go wrong when jobs are enqueued, waited for, served and dispatched.

use std::{net::SocketAddr, time::Duration};

use queue::{JobId, QueueError, QueueName};
use sagas::{JobState, StoreError, stores::postgres::batches::BatchId};

/// Why a job was not accepted.
#[derive(Debug, Clone, thiserror::Error)]
pub enum EnqueueError {
    /// The request can't be done as it is; sending it again changes nothing.
    #[error("{message}")]
    BadRequest {
        /// What is wrong, and what is allowed.
        message: String,
    },
    /// The payload, or the whole batch, is over its limit.
    #[error("the request has {size} bytes of payload; at most {limit} are allowed")]
    TooLarge {
        /// Bytes of JSON.
        size: usize,
        /// Bytes allowed.
        limit: usize,
    },
    /// The job's tenant is not in the ledger.
    #[error("no such tenant: create it with `flotilla tenants create` first")]
    UnknownTenant,
    /// The idempotency key was used with another request.
    #[error("the idempotency key was used with another request, which is job {job}")]
    Conflict {
        /// The job of the other request.
        job: JobId,
    },
    /// The tenant has no such batch.
    #[error("no such batch: {batch}")]
    UnknownBatch {
        /// The batch that was named.
        batch: BatchId,
    },
    /// The batch was sealed or cancelled.
    #[error("batch {batch} takes no more jobs: it is sealed")]
    BatchSealed {
        /// The batch.
        batch: BatchId,
    },
    /// The queue, or Redis, has as many waiting jobs as it may have.
    #[error("the queue is full: try again in {} s", retry_after.as_secs().max(1))]
    QueueFull {
        /// When to try again.
        retry_after: Duration,
    },
    /// The tenant has as many waiting jobs in this queue as it may have.
    #[error("the tenant has as many waiting jobs in this queue as it may have: try again in {} s", retry_after.as_secs().max(1))]
    TenantFull {
        /// When to try again.
        retry_after: Duration,
    },
    /// The queue takes no new jobs.
    #[error("queue {queue} is being drained and takes no new jobs until `flotilla queues resume {queue}`")]
    Draining {
        /// The queue.
        queue: QueueName,
    },
    /// The ledger can't be reached. Nothing was accepted.
    #[error("jobs can't be accepted now, because the ledger can't be reached: try again in {} s", retry_after.as_secs().max(1))]
    Unavailable {
        /// When to try again.
        retry_after: Duration,
    },
    /// The ledger, or the queue of a [`Fast`](crate::Durability::Fast) job, was lost in the middle of the acceptance, and the
    /// ledger did not come back in time: the job may be accepted.
    #[error(
        "contact was lost while job {job} was being accepted: ask for that job later, or send the request again with the \
         same idempotency key"
    )]
    OutcomeUnknown {
        /// The id that the job has if it was accepted.
        job: JobId,
        /// When to ask.
        retry_after: Duration,
    },
    /// The ledger refused the statement for a reason that is not the request's, for example missing migrations.
    #[error("the ledger refused the job: {message}")]
    Ledger {
        /// What Postgres said.
        message: String,
    },
}

/// Why waiting for a job ended without its end.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WaitError {
    /// The time is over; the job goes on.
    #[error("job {job} is still {state} after {waited:?}")]
    Timeout {
        /// The job.
        job: JobId,
        /// Its state when it was last seen.
        state: JobState,
        /// How long was waited.
        waited: Duration,
    },
    /// The ledger doesn't know the job. A `fast` one is unknown until a worker claims it.
    #[error("the ledger doesn't know job {0}")]
    Unknown(JobId),
    /// The ledger did not answer until the time was over.
    #[error("the state of job {job} can't be read: {reason}")]
    Unavailable {
        /// The job.
        job: JobId,
        /// What happened last.
        reason: String,
    },
}

/// Why the loops of [`maintain`](crate::maintain()) ended before they were told to.
#[derive(Debug, thiserror::Error)]
pub enum MaintainError {
    /// The queue's Redis refuses us: its prefix belongs to another ledger, or it may evict jobs.
    #[error(transparent)]
    Queue(#[from] QueueError),
}

/// Why the HTTP API can't be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The address can't be used.
    #[error("FLOTILLA_PRODUCER_ADDR is {addr}: can't listen there: {error}")]
    Listen {
        /// The address.
        addr: SocketAddr,
        /// Why not.
        error: std::io::Error,
    },
    /// A setting can't be read.
    #[error("{setting} is {value:?}: {allowed}")]
    Setting {
        /// The environment variable.
        setting: &'static str,
        /// What was seen.
        value: String,
        /// What is allowed.
        allowed: &'static str,
    },
}

impl EnqueueError {
    /// When to try again, for those errors that time mends.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::QueueFull { retry_after }
            | Self::TenantFull { retry_after }
            | Self::Unavailable { retry_after }
            | Self::OutcomeUnknown { retry_after, .. } => Some(*retry_after),
            _ => None,
        }
    }
}

/// Says of a ledger error what it means for a caller; for errors whose transaction is known not to have committed.
pub(crate) fn refused(error: &StoreError, retry_after: Duration) -> EnqueueError {
    match error.class {
        sagas::Class::Data => EnqueueError::BadRequest {
            message: format!("the ledger refused the job's data: {}", error.message),
        },
        sagas::Class::Permanent => EnqueueError::Ledger { message: error.message.clone() },
        _ => EnqueueError::Unavailable { retry_after },
    }
}
