//! What the queue stores of a job, and what a claim returns.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::ids::{JobId, LeaseToken, Priority, QueueName, TenantId};

/// W3C trace context of whoever enqueued the job, so that its trace goes on in the worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceContext {
    /// The `traceparent` header.
    pub traceparent: String,
    /// The `tracestate` header.
    pub tracestate: Option<String>,
}

/// What dispatch needs to know of a job. The payload stays in the ledger, except with `durability=fast`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Envelope {
    /// The job; pushes are idempotent by it.
    pub id: JobId,
    /// What to do, e.g. `ingest`.
    pub kind: String,
    /// The queue it waits in.
    pub queue: QueueName,
    /// 9 is served first.
    pub priority: Priority,
    /// Whose job it is; tenants of one priority take turns.
    pub tenant: TenantId,
    /// Not before this time, in unix milliseconds of Redis' clock. `None` is now.
    pub run_at_ms: Option<i64>,
    /// When the job was accepted, in unix milliseconds, as the producer saw it. For people only.
    pub enqueued_at_ms: i64,
    /// The trace that the job belongs to.
    pub trace: Option<TraceContext>,
    /// The full job record. Only for `durability=fast`, whose jobs have no row in the ledger yet.
    pub fast: Option<serde_json::Value>,
    /// Charged failures so far. Kept here only where there is no ledger, which otherwise counts them.
    #[serde(default)]
    pub attempts: u32,
    /// Leases of the job that ran out, as far as the queue knows; the ledger counts better where there is one.
    #[serde(default)]
    pub lost: u32,
    /// Of those, how many ran out while the job ran alone in its process. Kept here only where there is no ledger.
    #[serde(default)]
    pub lost_alone: u32,
}

impl Envelope {
    /// A job with default priority that may run at once, accepted now.
    pub fn new(kind: impl Into<String>, queue: QueueName, tenant: TenantId) -> Self {
        Self {
            id: JobId::new(),
            kind: kind.into(),
            queue,
            priority: Priority::default(),
            tenant,
            run_at_ms: None,
            enqueued_at_ms: chrono::Utc::now().timestamp_millis(),
            trace: None,
            fast: None,
            attempts: 0,
            lost: 0,
            lost_alone: 0,
        }
    }
}

/// What became of one envelope of a push.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pushed {
    /// It waits, or is scheduled, now.
    Queued,
    /// The job was already waiting, scheduled or leased, and was left as it is.
    Present,
    /// The window of the queue is full; the job was not stored. It waits in the ledger, or the caller is told.
    Full,
    /// The queue has as many jobs as its policy allows; the job was not stored.
    QueueFull,
    /// The tenant has as many jobs in this queue as its policy allows; the job was not stored.
    TenantFull,
    /// The queue takes no new jobs; the job was not stored.
    Draining,
}

impl Pushed {
    /// Why the job was not stored; `None` if it is there.
    pub const fn refusal(self) -> Option<&'static str> {
        match self {
            Self::Queued | Self::Present => None,
            Self::Full => Some("the queue's window in Redis is full"),
            Self::QueueFull => Some("the queue has as many jobs as its policy allows"),
            Self::TenantFull => Some("the tenant has as many jobs in this queue as its policy allows"),
            Self::Draining => Some("the queue takes no new jobs: it is drained"),
        }
    }
}

/// What ack, release and heartbeat need to name a lease.
#[derive(Debug, Clone)]
pub struct LeaseRef {
    /// The leased job.
    pub id: JobId,
    /// Its queue.
    pub queue: QueueName,
    /// Its partition at the time of the claim.
    pub partition: u16,
    /// Proof of the claim.
    pub token: LeaseToken,
    /// The job's record, kept to register the lease again when Redis has lost its data.
    pub envelope: Arc<Envelope>,
    /// Which life of the data the claim saw; see [`Epoch`].
    pub epoch: Epoch,
}

impl LeaseRef {
    /// What tells this lease from all others.
    pub(crate) fn key(&self) -> (JobId, LeaseToken) {
        (self.id, self.token.clone())
    }
}

/// Names one life of a partition's data: it changes when the data was lost (`FLUSHALL`, empty restart) and when the
/// server restarted. A job that is unknown in the *same* life was finished or cancelled by somebody else; one
/// unknown in *another* life may have been lost, so its lease is registered again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Epoch {
    /// Random text that the partition's first write stored.
    pub data: Arc<str>,
    /// The server's `run_id`.
    pub run: Arc<str>,
}

/// One claimed job with its lease, which starts in Redis when the claim ran there.
#[derive(Debug, Clone)]
pub struct Claim {
    /// The job.
    pub envelope: Arc<Envelope>,
    /// Proof of this claim; the jobs that were claimed with it have the same.
    pub token: LeaseToken,
    /// Where the job lives.
    pub partition: u16,
    /// The queue it came from.
    pub queue: QueueName,
    /// Which life of the data the claim saw.
    pub epoch: Epoch,
    /// The local monotonic time just *before* the claim was sent, from which the local lease is counted.
    pub sent_at: std::time::Instant,
}

impl Claim {
    /// What ack, release and heartbeat take.
    pub fn lease_ref(&self) -> LeaseRef {
        LeaseRef {
            id: self.envelope.id,
            queue: self.queue.clone(),
            partition: self.partition,
            token: self.token.clone(),
            envelope: Arc::clone(&self.envelope),
            epoch: self.epoch.clone(),
        }
    }
}

/// The answer to one lease's heartbeat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Beat {
    /// The lease is ours and runs for its full time again.
    Extended,
    /// Redis had lost the job; the lease is registered again with our token.
    Reregistered,
    /// The lease is no longer ours: expired and given to somebody else, finished or cancelled.
    Lost,
}

/// Where a job that Redis knows is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In the list of its priority and tenant.
    Waiting,
    /// On the schedule, until its time comes.
    Scheduled,
    /// With a worker.
    Leased {
        /// How long the lease lasts by Redis' clock, in ms; negative: it has ended and no reaper has looked yet.
        /// `None`: there is no lease, although the job's record says so.
        left_ms: Option<i64>,
    },
}

/// Depth and age of one priority.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct PriorityStats {
    /// Waiting jobs.
    pub depth: u64,
    /// How long the oldest waiting job has waited, in milliseconds; looks at the first
    /// [`STATS_TENANTS`](crate::STATS_TENANTS) tenants in turn, and at as many of those that a pause or a limit holds back.
    pub oldest_ms: Option<u64>,
}

/// What a queue holds right now, over all its partitions.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct QueueStats {
    /// Index is the priority, 0 to 9.
    pub by_priority: [PriorityStats; Priority::LEVELS],
    /// Jobs that wait for their time.
    pub scheduled: u64,
    /// Leased jobs.
    pub in_flight: u64,
    /// Nothing is claimed, because the queue's policy says so.
    pub paused: bool,
    /// Tenants with waiting jobs that a pause or a limit holds back, summed over partitions.
    pub blocked_tenants: u64,
}

impl QueueStats {
    /// Waiting jobs of all priorities.
    pub fn depth(&self) -> u64 {
        self.by_priority.iter().map(|level| level.depth).sum()
    }

    /// The age of the oldest waiting job of any priority, in milliseconds.
    pub fn oldest_ms(&self) -> Option<u64> {
        self.by_priority.iter().filter_map(|level| level.oldest_ms).max()
    }
}
