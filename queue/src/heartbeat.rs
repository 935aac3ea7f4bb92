//! Keeps leases alive.
//!
//! Runs on a thread of its own with a runtime and a connection of its own, so that work which keeps every core and
//! every runtime thread busy (embedding) can't starve it.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    thread,
    time::{Duration, Instant},
};

use futures::future::join_all;
use tokio::{sync::Notify, time::sleep};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{
    config::QueueConfig,
    envelope::{Beat, Claim, LeaseRef},
    error::QueueError,
    ids::{JobId, LeaseToken, QueueName},
    lease::{Lease, LeaseState},
    outage::Outage,
    queue::Queue,
};

/// Early beats that waiting jobs ask for come at most this often.
const NUDGE_PAUSE: Duration = Duration::from_millis(100);

/// Settings of the heartbeat.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeartbeatConfig {
    /// `FLOTILLA_HEARTBEAT_MS`: how often leases are extended (default 10 s); at most half the lease.
    pub interval: Duration,
}

impl Default for HeartbeatConfig {
    fn default() -> Self {
        Self { interval: Duration::from_secs(10) }
    }
}

/// Extends the leases of this process. Clones share one thread, which ends when the last clone is dropped; leases that
/// are still registered then run out.
#[derive(Clone)]
pub struct Heartbeat {
    registry: Arc<Registry>,
    _stop: Arc<DropGuard>,
}

/// By job and claim: a job that was lost may be claimed again while its first run has not ended yet.
type Leases = HashMap<(JobId, LeaseToken), Weak<LeaseState>>;

struct Registry {
    lease: Duration,
    nudge: Arc<Notify>,
    /// Weak: a job that was dropped without ack or release must not be kept alive for ever.
    leases: Mutex<Leases>,
}

impl std::fmt::Debug for Heartbeat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Heartbeat").field("leases", &self.registry.lock().len()).finish_non_exhaustive()
    }
}

impl Heartbeat {
    /// Starts the thread. Fails on settings that can't work, or if the system gives no thread; doesn't connect.
    pub fn spawn(queue: QueueConfig, config: HeartbeatConfig) -> Result<Self, QueueError> {
        if config.interval.is_zero() || config.interval > queue.lease / 2 {
            return Err(QueueError::Config {
                setting: "FLOTILLA_HEARTBEAT_MS",
                value: config.interval.as_millis().to_string(),
                allowed: "at least 1 and at most half of FLOTILLA_LEASE_MS is allowed",
            });
        }
        let stop = CancellationToken::new();
        let registry =
            Arc::new(Registry { lease: queue.lease, nudge: Arc::default(), leases: Mutex::default() });
        let queue = Queue::lazy(queue)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| QueueError::Start(format!("the heartbeat's runtime: {error}")))?;
        let (beats, stopped) = (Arc::clone(&registry), stop.clone());
        thread::Builder::new()
            .name("queue-heartbeat".to_owned())
            .spawn(move || runtime.block_on(beats.run(queue, config.interval, stopped)))
            .map_err(|error| QueueError::Start(format!("the heartbeat's thread: {error}")))?;
        Ok(Self { registry, _stop: Arc::new(stop.drop_guard()) })
    }

    /// Keeps a claimed job's lease alive from now on.
    pub fn register(&self, claim: &Claim) -> Lease {
        let lease = Lease::new(claim, self.registry.lease, Arc::clone(&self.registry.nudge));
        self.registry.lock().insert(lease.key(), Arc::downgrade(&lease.state));
        lease
    }

    /// As [`register`](Self::register), for a whole batch.
    pub(crate) fn register_all(&self, claims: &[Claim]) -> Vec<Lease> {
        let nudge = &self.registry.nudge;
        let leases: Vec<Lease> =
            claims.iter().map(|claim| Lease::new(claim, self.registry.lease, Arc::clone(nudge))).collect();
        let mut registered = self.registry.lock();
        for lease in &leases {
            registered.insert(lease.key(), Arc::downgrade(&lease.state));
        }
        drop(registered);
        leases
    }

    /// Ends the heartbeats of one lease, because it was acked or given back. [`Lease::valid`] fails from now on.
    pub fn end(&self, lease: &Lease) {
        lease.state.end();
        self.registry.lock().remove(&lease.key());
    }

    /// Ends the heartbeats of every lease that this process holds on a job.
    pub fn remove(&self, id: JobId) {
        self.registry.lock().retain(|_, state| match state.upgrade() {
            Some(state) if state.with_ref(|lease| lease.id) == id => {
                state.end();
                false
            }
            other => other.is_some(),
        });
    }

    /// How many leases are kept alive.
    pub fn len(&self) -> usize {
        self.registry.lock().values().filter(|state| state.strong_count() > 0).count()
    }

    /// Whether no lease is kept alive.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Registry {
    fn lock(&self) -> MutexGuard<'_, Leases> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn run(self: Arc<Self>, queue: Queue, interval: Duration, stop: CancellationToken) {
        let mut outage = Outage::new("heartbeat");
        let mut pause = interval;
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = sleep(pause) => {}
                () = self.nudge.notified() => sleep(NUDGE_PAUSE.min(pause)).await,
            }
            pause = match self.beat(&queue).await {
                Ok(()) => {
                    outage.over();
                    interval
                }
                Err(error) => outage.wait(&error).min(interval),
            };
        }
    }

    /// One heartbeat for all leases. On an error no lease is declared lost: they run out locally, and the next beat
    /// that gets through finds out.
    async fn beat(&self, queue: &Queue) -> Result<(), QueueError> {
        let states: Vec<Arc<LeaseState>> = {
            let mut leases = self.lock();
            leases.retain(|_, state| state.strong_count() > 0);
            leases.values().filter_map(Weak::upgrade).collect()
        };
        // By server: in a cluster one that is away must not cost the leases on the others.
        let mut places: HashMap<(QueueName, u16), Vec<Arc<LeaseState>>> = HashMap::new();
        for state in states {
            let place = state.with_ref(|lease| (lease.queue.clone(), lease.partition));
            places.entry(place).or_default().push(state);
        }
        let mut servers: HashMap<Arc<str>, Vec<Arc<LeaseState>>> = HashMap::new();
        for ((name, partition), states) in places {
            servers.entry(queue.server(&name, partition).await?).or_default().extend(states);
        }
        let beats = servers.into_values().map(|states| self.beat_server(queue, states));
        join_all(beats).await.into_iter().collect()
    }

    /// One heartbeat for the leases on one server.
    async fn beat_server(&self, queue: &Queue, states: Vec<Arc<LeaseState>>) -> Result<(), QueueError> {
        let refs: Vec<LeaseRef> = states.iter().map(|state| state.with_ref(|lease| lease.clone())).collect();
        // Before sending: Redis extends the lease later than this, never earlier.
        let sent_at = Instant::now();
        let beats = queue.heartbeat(&refs).await?;
        let Some(first) = refs.first() else { return Ok(()) };
        let run_id = queue.server_run_id(&first.queue, first.partition).await?;
        let mut moved = HashSet::new();
        for ((state, lease), beat) in states.iter().zip(&refs).zip(beats) {
            match beat {
                Beat::Extended => {
                    state.confirm(sent_at);
                    if *lease.epoch.run != *run_id {
                        let mut epoch = lease.epoch.clone();
                        epoch.run = Arc::clone(&run_id);
                        state.moved_to(epoch);
                    }
                }
                Beat::Reregistered => {
                    state.confirm(sent_at);
                    moved.insert((lease.queue.clone(), lease.partition));
                    tracing::info!(id = %lease.id, "registered a lease again after Redis lost its data");
                }
                // An ack that was under way makes the job unknown as well.
                Beat::Lost if state.is_over() => {}
                Beat::Lost => {
                    self.lock().remove(&lease.key());
                    state.lose();
                    metrics::counter!("queue_leases_lost_total", "queue" => lease.queue.to_string())
                        .increment(1);
                    tracing::warn!(id = %lease.id, queue = %lease.queue, "lost a lease");
                }
            }
        }
        for (name, partition) in moved {
            if let Some(epoch) = queue.epoch(&name, partition).await? {
                for (state, lease) in states.iter().zip(&refs) {
                    if lease.queue == name && lease.partition == partition {
                        state.moved_to(epoch.clone());
                    }
                }
            }
        }
        Ok(())
    }
}
