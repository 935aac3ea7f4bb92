//! All roles of a worker, started at once.

use std::time::Duration;

use tokio::{task::JoinHandle, time::timeout};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{
    ack_layer::AckLayer,
    acker::Acker,
    backend::QueueBackend,
    claimer::{Claimer, ClaimerConfig},
    error::QueueError,
    gates::Gates,
    heartbeat::{Heartbeat, HeartbeatConfig},
    ids::{QueueName, WorkerId},
    queue::Queue,
    reaper::Reaper,
    registry::Presence,
    scheduler::Scheduler,
};

/// Settings of a whole worker.
#[derive(Debug, Clone)]
pub struct RolesConfig {
    /// Which queues to serve, in turn.
    pub queues: Vec<QueueName>,
    /// Who works, for people.
    pub worker: WorkerId,
    /// Most jobs that are claimed and not yet ended. At least the worker's concurrency; twice that keeps it busy.
    pub slots: usize,
    /// Most jobs in one claim.
    pub batch: usize,
    /// How often leases are extended.
    pub heartbeat: HeartbeatConfig,
    /// Which queues are paused by this process.
    pub gates: Gates,
}

impl RolesConfig {
    /// This process serves these queues with 64 slots.
    pub fn new(queues: Vec<QueueName>) -> Self {
        Self {
            queues,
            worker: WorkerId::for_this_process(),
            slots: 64,
            batch: 64,
            heartbeat: HeartbeatConfig::default(),
            gates: Gates::new(),
        }
    }
}

/// The roles that a worker needs, running: heartbeat, acker, claimer, reaper, scheduler, presence. Owns them; they end
/// when it is dropped or [`stop`](Self::stop) is called, and [`join`](Self::join) waits for it. Whoever needs other
/// settings spawns the parts.
#[derive(Debug)]
pub struct Roles {
    /// Tells Redis what became of jobs.
    pub acker: Acker,
    /// Keeps leases alive.
    pub heartbeat: Heartbeat,
    shutdown: CancellationToken,
    tasks: Vec<JoinHandle<()>>,
    /// Outlives the others: the worker is there, and counts, until its last jobs are known to have ended.
    presence: JoinHandle<()>,
    leave: CancellationToken,
    lease: Duration,
    _stop: [DropGuard; 2],
}

impl Roles {
    /// Starts all roles on the present runtime; the backend goes to an apalis worker. When that worker stops, it gives
    /// back what has not started and tells Redis of what has ended; `shutdown` stops the worker and every role.
    pub fn spawn(
        queue: &Queue,
        config: RolesConfig,
        shutdown: &CancellationToken,
    ) -> Result<(Self, QueueBackend), QueueError> {
        let RolesConfig { queues, worker, slots, batch, heartbeat, gates } = config;
        let shutdown = shutdown.child_token();
        let heartbeat = Heartbeat::spawn(queue.config().clone(), heartbeat)?;
        let acker = Acker::spawn(queue.clone(), heartbeat.clone());
        let tasks = vec![
            Reaper::spawn(queue.clone(), queues.clone(), shutdown.clone()),
            Scheduler::spawn(queue.clone(), queues.clone(), shutdown.clone()),
        ];
        let leave = CancellationToken::new();
        let presence = Presence::spawn(queue.clone(), worker.clone(), queues.clone(), leave.clone());
        let claimer = ClaimerConfig { queues, worker, batch, slots };
        let (claimer, jobs) =
            Claimer::spawn(queue.clone(), heartbeat.clone(), claimer, gates, shutdown.clone());
        let backend = QueueBackend::new(claimer, jobs, acker.clone());
        let stop = [shutdown.clone().drop_guard(), leave.clone().drop_guard()];
        let lease = queue.config().lease;
        Ok((Self { acker, heartbeat, shutdown, tasks, presence, leave, lease, _stop: stop }, backend))
    }

    /// The layer that acks what succeeds and tries the rest again, first within `base`; see [`AckLayer`].
    pub fn acks(&self, base: Duration) -> AckLayer {
        AckLayer::new(self.acker.clone(), base)
    }

    /// Asks all roles to end, and the worker with them. Returns at once.
    pub fn stop(&self) {
        self.shutdown.cancel();
    }

    /// Stops the roles and waits for them, and at most for one lease until Redis knows what became of all jobs. Call it after
    /// the apalis worker has ended.
    pub async fn join(self) {
        self.stop();
        if timeout(self.lease, self.acker.flush()).await.is_err() {
            tracing::warn!("Redis wasn't told of all jobs that ended; their leases have run out");
        }
        self.leave.cancel();
        for task in self.tasks.into_iter().chain([self.presence]) {
            if let Err(error) = task.await {
                tracing::error!(%error, "a role ended abnormally");
            }
        }
    }
}
