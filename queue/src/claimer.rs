//! Claims jobs and hands them over to whoever runs them.

use std::{future::pending, sync::Arc};

use futures::future::BoxFuture;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinHandle,
    time::{Instant, MissedTickBehavior, interval, sleep_until},
};
use tokio_util::sync::CancellationToken;

use crate::{
    envelope::Envelope,
    error::QueueError,
    gates::Gates,
    hand_over::{HandOver, Jobs, hand_over},
    heartbeat::Heartbeat,
    ids::{QueueName, WorkerId},
    lease::Lease,
    ledger::Grant,
    outage::Outage,
    queue::{Claimed, Queue},
    rests::Rests,
    wakeups::{self, Places},
};

/// Settings of the claimer.
#[derive(Debug, Clone)]
pub struct ClaimerConfig {
    /// Which queues to serve; they are served in turn.
    pub queues: Vec<QueueName>,
    /// Who claims, for people.
    pub worker: WorkerId,
    /// Most jobs in one claim, 1 to [`MAX_CLAIM`](crate::queue::MAX_CLAIM).
    pub batch: usize,
    /// Most jobs that are claimed and not yet dropped, running or waiting to run.
    pub slots: usize,
}

/// A claimed job. Dropping it frees its slot; drop it when the work has ended. Tell the
/// [`Acker`](crate::Acker) what became of it: a job that is only dropped comes back after its lease has run out.
#[derive(Debug)]
pub struct Job {
    /// What to do.
    pub envelope: Arc<Envelope>,
    /// The hold on it.
    pub lease: Lease,
    /// What the ledger granted; set by [`AckLayer`](crate::AckLayer) before the handler runs.
    pub grant: Option<Grant>,
    /// One of the claimer's slots.
    pub slot: OwnedSemaphorePermit,
    /// Cancelled when a person wants the job's end; set by [`AckLayer`](crate::AckLayer) where a ledger knows.
    pub(crate) cancel: Option<CancellationToken>,
}

impl Job {
    /// Ends when a person wants the job's end, about a second after it was asked for; never without a ledger. A handler that
    /// stops for it returns an error, and the job ends as cancelled, uncharged. One that does not look goes on to its end.
    pub async fn cancelled(&self) {
        match &self.cancel {
            Some(token) => token.cancelled().await,
            None => std::future::pending().await,
        }
    }

    /// Whether a person wants the job's end; see [`cancelled`](Self::cancelled).
    pub fn is_cancelled(&self) -> bool {
        self.cancel.as_ref().is_some_and(CancellationToken::is_cancelled)
    }

    /// The request, read as `T`: the ledger's where there is one, else the envelope's `fast` record.
    pub fn payload<T: DeserializeOwned>(&self) -> Result<T, serde_json::Error> {
        let payload = self.grant.as_ref().map(|grant| &grant.payload).or(self.envelope.fast.as_ref());
        T::deserialize(payload.unwrap_or(&Value::Null))
    }
}

/// The claiming loop of a worker. It outlives every outage of Redis, and ends only on shutdown, or when the receiver is
/// dropped. Jobs that it claimed but did not hand over by then go back to the front of their lists.
#[derive(Debug)]
pub struct Claimer {
    task: JoinHandle<()>,
    shutdown: CancellationToken,
    slots: Arc<Semaphore>,
    total: usize,
}

impl Claimer {
    /// Starts the loop and the listener for wake-ups on the present runtime. The receiver ends after shutdown.
    pub fn spawn(
        queue: Queue,
        heartbeat: Heartbeat,
        config: ClaimerConfig,
        gates: Gates,
        shutdown: CancellationToken,
    ) -> (Self, Jobs) {
        let (jobs, receiver) = hand_over();
        let total = config.slots.clamp(1, Semaphore::MAX_PERMITS);
        let slots = Arc::new(Semaphore::new(total));
        let places = Arc::new(Places::new(&config.queues, queue.config().partitions));
        let waits = places.spots.len();
        let listener = shutdown.child_token();
        tokio::spawn(wakeups::listen(queue.clone(), Arc::clone(&places), listener.clone()));
        let claiming = Claiming {
            queue,
            heartbeat,
            gates,
            worker: config.worker,
            batch: config.batch.clamp(1, crate::queue::MAX_CLAIM),
            queues: config.queues.len(),
            slots: Arc::clone(&slots),
            places,
            jobs,
            turn: 0,
            poll_turn: 0,
            enough: config.batch.clamp(1, crate::queue::MAX_CLAIM).min(total / 2).max(1),
            waits: vec![None; waits],
            rests: Rests::default(),
        };
        let stop = shutdown.clone();
        let task = tokio::spawn(async move {
            claiming.run(stop).await;
            listener.cancel();
        });
        (Self { task, shutdown, slots, total }, receiver)
    }

    /// How many jobs are claimed and not yet dropped, including those being claimed.
    pub fn in_use(&self) -> usize {
        self.total.saturating_sub(self.slots.available_permits())
    }

    /// Asks the loop to end. Returns at once; [`join`](Self::join) waits.
    pub fn stop(&self) {
        self.shutdown.cancel();
    }

    /// Waits until the loop has ended and has given back what it still held. Call [`stop`](Self::stop) first.
    pub async fn join(self) {
        if let Err(error) = self.task.await {
            tracing::error!(%error, "the claimer ended abnormally; the leases of its jobs will run out");
        }
    }
}

/// What one round trip brought.
enum Outcome {
    Claimed { place: usize, slots: OwnedSemaphorePermit, result: Result<Claimed, QueueError> },
    Probed(Result<(), QueueError>),
    Returned,
}

struct Claiming {
    queue: Queue,
    heartbeat: Heartbeat,
    gates: Gates,
    worker: WorkerId,
    batch: usize,
    queues: usize,
    slots: Arc<Semaphore>,
    places: Arc<Places>,
    jobs: HandOver,
    turn: usize,
    poll_turn: usize,
    /// While claimed jobs still wait to be taken, a claim is worth its round trip only with so many free slots.
    enough: usize,
    /// When a limit lets a place be claimed from again.
    waits: Vec<Option<Instant>>,
    /// In a cluster: places whose node didn't answer.
    rests: Rests,
}

impl Claiming {
    async fn run(mut self, shutdown: CancellationToken) {
        let mut ticks = interval(self.queue.config().safety_poll);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut closed = self.gates.watch();
        let mut outage = Outage::new("claimer");
        // During an outage: when to probe Redis.
        let mut probe_at = None;
        // At most one round trip is under way. It runs beside the hand-over and is never cancelled, because a claim
        // that is abandoned leaves leases behind.
        let mut trip: Option<BoxFuture<'static, Outcome>> = None;
        let mut free: Option<OwnedSemaphorePermit> = None;
        loop {
            let at_rest = self.jobs.is_at_rest();
            if at_rest && trip.is_none() && probe_at.is_none() && !self.jobs.is_empty() {
                let returning = self.return_waiting();
                trip = Some(Box::pin(async move {
                    returning.await;
                    Outcome::Returned
                }));
            }
            let may_claim = trip.is_none() && probe_at.is_none() && !at_rest;
            let place = if may_claim { self.next_place() } else { None };
            match place {
                None => free = None,
                Some(place) => {
                    if let Some(first) = free.take() {
                        trip = Some(self.claim(place, first));
                    }
                }
            }
            let wanted = if self.jobs.is_empty() { 1 } else { self.enough as u32 };
            tokio::select! {
                biased;
                () = shutdown.cancelled() => break,
                () = self.jobs.changed() => if self.jobs.is_closed() { break },
                outcome = maybe(&mut trip) => {
                    trip = None;
                    probe_at = self.settle(outcome, &mut outage);
                }
                permit = Arc::clone(&self.slots).acquire_many_owned(wanted), if place.is_some() && trip.is_none() => {
                    // The semaphore is never closed.
                    free = permit.ok();
                }
                () = at(probe_at), if trip.is_none() => {
                    probe_at = None;
                    let queue = self.queue.clone();
                    trip = Some(Box::pin(async move { Outcome::Probed(queue.ping().await) }));
                }
                () = at(self.waits.iter().flatten().min().copied()) => self.over(),
                () = at(self.rests.next_end()), if trip.is_none() => {}
                () = self.places.changed() => {}
                _ = ticks.tick() => self.poll(),
                changed = closed.changed() => if changed.is_err() { break },
            }
        }
        self.give_back(trip).await;
    }

    /// The next place that may hold something and whose gate is open.
    fn next_place(&self) -> Option<usize> {
        let count = self.places.spots.len();
        (0..count).map(|step| (self.turn + step) % count).find(|&index| {
            self.places.is_hot(index)
                && self.gates.is_open(&self.places.spots[index].0)
                && !self.rests.is_resting(index)
        })
    }

    /// The safety poll: one partition of each queue, in turn.
    fn poll(&mut self) {
        let count = self.places.spots.len();
        for _ in 0..self.queues.min(count) {
            self.places.heat(self.poll_turn % count);
            self.poll_turn = (self.poll_turn + 1) % count;
        }
    }

    /// Looks again at the places whose limit lets something through now.
    fn over(&mut self) {
        let now = Instant::now();
        for (place, wait) in self.waits.iter_mut().enumerate() {
            if wait.is_some_and(|until| until <= now) {
                *wait = None;
                self.places.heat(place);
            }
        }
    }

    fn claim(&mut self, place: usize, mut slots: OwnedSemaphorePermit) -> BoxFuture<'static, Outcome> {
        self.turn = place + 1;
        self.places.cool(place);
        self.waits[place] = None;
        let more = self.slots.available_permits().min(self.batch.saturating_sub(slots.num_permits()));
        // Only this loop takes permits, so what is available stays available.
        if more > 0
            && let Ok(others) = Arc::clone(&self.slots).try_acquire_many_owned(more as u32)
        {
            slots.merge(others);
        }
        let (queue, worker) = (self.queue.clone(), self.worker.clone());
        let (name, partition) = self.places.spots[place].clone();
        Box::pin(async move {
            let result = queue.claim_partition(&name, partition, &worker, slots.num_permits()).await;
            Outcome::Claimed { place, slots, result }
        })
    }

    /// Takes in what a round trip brought. Returns when to probe, if Redis is away.
    fn settle(&mut self, outcome: Outcome, outage: &mut Outage) -> Option<Instant> {
        let error = match outcome {
            Outcome::Claimed { place, mut slots, result: Ok(claimed) } => {
                outage.over();
                self.rests.over(place);
                if claimed.more {
                    self.places.heat(place);
                }
                self.waits[place] = claimed.wait.map(|wait| Instant::now() + wait);
                let leases = self.heartbeat.register_all(&claimed.claims);
                let mut jobs = Vec::with_capacity(leases.len());
                for (claim, lease) in claimed.claims.iter().zip(leases) {
                    let Some(slot) = slots.split(1) else {
                        // A claim never returns more than was asked for; if it did, the lease would run out.
                        tracing::error!(id = %lease.id(), "claimed more jobs than slots");
                        continue;
                    };
                    let envelope = Arc::clone(&claim.envelope);
                    jobs.push(Job { envelope, lease, grant: None, slot, cancel: None });
                }
                if !jobs.is_empty() {
                    self.jobs.give(jobs);
                }
                return None;
            }
            Outcome::Probed(Ok(())) => {
                // Whether the outage is over is for the next claim to find out: a replica answers a ping too.
                self.places.heat_all();
                return None;
            }
            Outcome::Claimed { place, result: Err(error), .. } => {
                self.places.heat(place);
                if self.queue.is_cluster() {
                    self.rests.begin(place, &error);
                    return None;
                }
                error
            }
            Outcome::Returned => return None,
            Outcome::Probed(Err(error)) => error,
        };
        Some(Instant::now() + outage.wait(&error))
    }

    /// Gives back what was claimed and not handed over, also by a claim that is still under way.
    async fn give_back(&mut self, trip: Option<BoxFuture<'static, Outcome>>) {
        if let Some(trip) = trip {
            self.settle(trip.await, &mut Outage::new("claimer"));
        }
        self.return_waiting().await;
    }

    /// Gives back what waits to be taken.
    fn return_waiting(&self) -> BoxFuture<'static, ()> {
        let (queue, back) = (self.queue.clone(), self.jobs.take_back());
        let leases: Vec<_> = back
            .into_iter()
            .map(|job| {
                self.heartbeat.end(&job.lease);
                (job.lease.lease_ref(), std::time::Duration::ZERO)
            })
            .collect();
        Box::pin(async move {
            if leases.is_empty() {
                return;
            }
            match queue.release(&leases).await {
                Ok(_) => tracing::info!(count = leases.len(), "gave claimed jobs back that had not started"),
                Err(error) => {
                    tracing::warn!(count = leases.len(), %error, "couldn't give jobs back; their leases will run out");
                }
            }
        })
    }
}

async fn maybe(trip: &mut Option<BoxFuture<'static, Outcome>>) -> Outcome {
    match trip {
        Some(trip) => trip.await,
        None => pending().await,
    }
}

async fn at(when: Option<Instant>) {
    match when {
        Some(when) => sleep_until(when).await,
        None => pending().await,
    }
}
