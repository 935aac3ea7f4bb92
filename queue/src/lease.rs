//! A worker's view of one lease.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::{
    envelope::{Claim, Epoch, LeaseRef},
    ids::{JobId, LeaseToken},
};

/// The lease is not ours any more: it expired and the job went to somebody else, or the job was finished or given
/// back. Stop working on it, and start no further effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the lease on job {0} is lost: another worker may have the job now")]
pub struct LeaseLost(pub JobId);

/// A claimed job's lease, kept alive by the [`Heartbeat`](crate::Heartbeat) while any clone of it exists. When the
/// last clone is dropped without ack or release, heartbeats for it end, and the job is delivered again once the lease
/// has run out. Cheap to clone.
#[derive(Clone)]
pub struct Lease {
    pub(crate) state: Arc<LeaseState>,
}

pub(crate) struct LeaseState {
    lease_ref: Mutex<LeaseRef>,
    /// How long a lease lasts from its last confirmation.
    duration: Duration,
    /// The local end of the lease.
    deadline: watch::Sender<Instant>,
    lost: CancellationToken,
    /// Acked, given back, or removed.
    over: CancellationToken,
    /// The job has ended, and needs a person.
    dead: AtomicBool,
    /// Asks the heartbeat for an early beat.
    nudge: Arc<Notify>,
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lease")
            .field("id", &self.id())
            .field("remaining", &self.remaining())
            .field("lost", &self.is_lost())
            .finish_non_exhaustive()
    }
}

impl Lease {
    pub(crate) fn new(claim: &Claim, duration: Duration, nudge: Arc<Notify>) -> Self {
        Self {
            state: Arc::new(LeaseState {
                lease_ref: Mutex::new(claim.lease_ref()),
                duration,
                deadline: watch::Sender::new(claim.sent_at + duration),
                lost: CancellationToken::new(),
                over: CancellationToken::new(),
                dead: AtomicBool::new(false),
                nudge,
            }),
        }
    }

    /// The leased job.
    pub fn id(&self) -> JobId {
        self.state.with_ref(|lease| lease.id)
    }

    /// What the queue's ack, release and heartbeat take.
    pub fn lease_ref(&self) -> LeaseRef {
        self.state.with_ref(|lease| lease.clone())
    }

    /// What tells it from all others.
    pub(crate) fn key(&self) -> (JobId, LeaseToken) {
        self.state.with_ref(|lease| lease.key())
    }

    /// How long the lease certainly lasts, by this machine's monotonic clock: counted from the moment *before* the
    /// claim or the last confirmed heartbeat was sent. Zero during an outage of Redis does not mean lost.
    pub fn remaining(&self) -> Duration {
        self.state.deadline.borrow().saturating_duration_since(Instant::now())
    }

    /// How long it lasts from its last confirmation.
    pub(crate) fn duration(&self) -> Duration {
        self.state.duration
    }

    /// Cancelled at once when a heartbeat learns that the lease is lost.
    pub fn lost(&self) -> CancellationToken {
        self.state.lost.clone()
    }

    /// Whether a heartbeat has learnt that the lease is lost.
    pub fn is_lost(&self) -> bool {
        self.state.lost.is_cancelled()
    }

    /// Says that the job ends as dead or parked, before its end is told: for the queue's [`Rates`](crate::Rates) only.
    pub fn note_dead(&self) {
        self.state.dead.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_dead(&self) -> bool {
        self.state.dead.load(Ordering::Relaxed)
    }

    /// Whether the lease lasts at least `margin` more (at most half a lease).
    pub fn lasts(&self, margin: Duration) -> bool {
        let state = &self.state;
        !state.is_over() && !self.is_lost() && self.remaining() >= margin.min(state.duration / 2)
    }

    /// Waits until the lease [`lasts`](Self::lasts) so long, which is at once in normal times.
    /// During an outage of Redis it waits until the lease is confirmed again, or [`LeaseLost`]. Put a deadline around
    /// it. Cancel-safe.
    pub async fn valid(&self, margin: Duration) -> Result<(), LeaseLost> {
        if self.lasts(margin) {
            return Ok(());
        }
        let state = &self.state;
        let margin = margin.min(state.duration / 2);
        let mut deadline = state.deadline.subscribe();
        loop {
            if state.is_over() || self.is_lost() {
                return Err(LeaseLost(self.id()));
            }
            if deadline.borrow_and_update().saturating_duration_since(Instant::now()) >= margin {
                return Ok(());
            }
            state.nudge.notify_one();
            tokio::select! {
                () = state.lost.cancelled() => {}
                () = state.over.cancelled() => {}
                // The sender lives as long as `self`.
                _ = deadline.changed() => {}
            }
        }
    }
}

impl LeaseState {
    pub(crate) fn with_ref<T>(&self, read: impl FnOnce(&mut LeaseRef) -> T) -> T {
        read(&mut self.lease_ref.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn confirm(&self, sent_at: Instant) {
        self.deadline.send_replace(sent_at + self.duration);
    }

    pub(crate) fn lose(&self) {
        self.lost.cancel();
    }

    pub(crate) fn end(&self) {
        self.over.cancel();
    }

    pub(crate) fn is_over(&self) -> bool {
        self.over.is_cancelled()
    }

    /// Remembers under which life of the data the lease was last confirmed.
    pub(crate) fn moved_to(&self, epoch: Epoch) {
        self.with_ref(|lease| lease.epoch = epoch);
    }
}
