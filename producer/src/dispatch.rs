//! Putting accepted jobs into Redis at once, while Redis is there.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use queue::{Envelope, JobId, Place, Priority, Pushed, Queue, QueueError, QueueName};
use sagas::stores::postgres::{Postgres, accept::NewJob};

/// How long Redis is left alone after it failed. Meanwhile the relay dispatches, so that being wrong costs little, and
/// callers don't wait for a Redis that hangs.
const LEFT_ALONE: Duration = Duration::from_secs(2);

/// The way to the queue's Redis, and whether it is worth trying.
#[derive(Clone)]
pub(crate) struct Dispatch {
    queue: Option<Queue>,
    postgres: Postgres,
    closed_until: Arc<Mutex<Option<Instant>>>,
}

impl Dispatch {
    pub fn new(queue: Option<Queue>, postgres: Postgres) -> Self {
        Self { queue, postgres, closed_until: Arc::default() }
    }

    /// The queue, whether or not it is worth trying.
    pub fn queue(&self) -> Option<&Queue> {
        self.queue.as_ref()
    }

    /// The queue, unless there is none or it failed just now. After a failure one caller at a time tries again.
    pub fn open(&self) -> Option<&Queue> {
        let queue = self.queue.as_ref()?;
        let mut closed = self.closed_until.lock().unwrap_or_else(PoisonError::into_inner);
        match *closed {
            Some(until) if Instant::now() < until => None,
            Some(_) => {
                *closed = Some(Instant::now() + LEFT_ALONE);
                Some(queue)
            }
            None => Some(queue),
        }
    }

    /// Remembers how a call to Redis went.
    pub fn learn<T>(&self, answer: &Result<T, QueueError>) {
        let failed = answer.as_ref().is_err_and(QueueError::is_unavailable);
        let until = failed.then(|| Instant::now() + LEFT_ALONE);
        *self.closed_until.lock().unwrap_or_else(PoisonError::into_inner) = until;
    }

    /// Pushes jobs that the ledger holds as dispatched; what Redis doesn't take is left to the relay. Never fails: at
    /// worst the reconciler finds the jobs.
    pub async fn dispatch(&self, queue: &Queue, jobs: &[&NewJob]) {
        if jobs.is_empty() {
            return;
        }
        let envelopes: Vec<Envelope> = jobs.iter().map(|job| envelope(job)).collect();
        let answer = queue.push_accepted(&envelopes).await;
        self.learn(&answer);
        let left: Vec<JobId> = match answer {
            Ok(pushed) => {
                jobs.iter().zip(pushed).filter(|(_, p)| *p == Pushed::Full).map(|(job, _)| job.id).collect()
            }
            Err(error) => {
                tracing::warn!(%error, jobs = jobs.len(), "accepted jobs wait for the relay");
                jobs.iter().map(|job| job.id).collect()
            }
        };
        self.leave_to_relay(&left).await;
    }

    /// Hands jobs that the ledger holds as dispatched to the relay.
    pub async fn leave_to_relay(&self, jobs: &[JobId]) {
        if jobs.is_empty() {
            return;
        }
        if let Err(error) = self.postgres.leave_to_relay(jobs).await {
            tracing::warn!(%error, jobs = jobs.len(), "accepted jobs wait for the reconciler");
        }
    }
}

/// Brings Redis' copies of jobs in line with the ledger's, which `envelopes` are: what is unknown there is stored. A job that
/// was known gets its priority where it stands, and keeps its age; one whose time has changed is stored anew. A leased job is
/// left to its worker, but for the priority that it has if it comes back: `None`. If the ledger says that it waits, its worker is
/// about to put it back, at a time that the ledger may have changed since.
pub(crate) async fn place(queue: &Queue, envelopes: &[Envelope]) -> Result<Vec<Option<Pushed>>, QueueError> {
    let pushed = queue.push_accepted(envelopes).await?;
    let known: Vec<&Envelope> =
        envelopes.iter().zip(&pushed).filter(|(_, p)| **p == Pushed::Present).map(|(e, _)| e).collect();
    if known.is_empty() {
        return Ok(pushed.into_iter().map(Some).collect());
    }
    let named: Vec<(QueueName, JobId)> = known.iter().map(|e| (e.queue.clone(), e.id)).collect();
    let (mut moved, mut stays): (Vec<Envelope>, Vec<(QueueName, JobId, Priority)>) = (vec![], vec![]);
    let mut leased: HashSet<JobId> = HashSet::new();
    for (envelope, place) in known.into_iter().zip(queue.places(&named).await?) {
        if matches!(place, Some(Place::Leased { .. })) {
            leased.insert(envelope.id);
        }
        match (place, envelope.run_at_ms) {
            (Some(Place::Waiting), None) | (Some(Place::Leased { .. }), _) => {
                stays.push((envelope.queue.clone(), envelope.id, envelope.priority));
            }
            _ => moved.push(envelope.clone()),
        }
    }
    queue.reprioritise(&stays).await?;
    let named: Vec<(QueueName, JobId)> = moved.iter().map(|e| (e.queue.clone(), e.id)).collect();
    queue.forget(&named).await?;
    let again = queue.push_accepted(&moved).await?;
    let again: HashMap<JobId, Pushed> = moved.iter().map(|e| e.id).zip(again).collect();
    let answer = |(e, pushed): (&Envelope, Pushed)| {
        (!leased.contains(&e.id)).then(|| again.get(&e.id).copied().unwrap_or(pushed))
    };
    Ok(envelopes.iter().zip(pushed).map(answer).collect())
}

/// What Redis holds of an accepted job.
pub(crate) fn envelope(job: &NewJob) -> Envelope {
    Envelope {
        id: job.id,
        kind: job.kind.clone(),
        queue: job.queue.clone(),
        priority: job.priority,
        tenant: job.tenant.clone(),
        run_at_ms: job.run_at.map(|at| at.timestamp_millis()),
        enqueued_at_ms: chrono::Utc::now().timestamp_millis(),
        trace: job.trace.clone(),
        fast: None,
        attempts: 0,
        lost: 0,
        lost_alone: 0,
    }
}
