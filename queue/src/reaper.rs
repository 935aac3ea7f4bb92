//! Finds expired leases and puts their jobs back.

use std::{collections::HashMap, sync::Arc, time::Duration};

use tokio::{
    task::JoinHandle,
    time::{MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;

use crate::{
    envelope::Epoch, error::QueueError, ids::QueueName, outage::Outage, queue::Queue, upkeep::ReapGuard,
};

/// The reaper. Every worker runs one; several do no harm.
///
/// A lease that ran out because Redis was away is no sign of a dead worker, so the reaper waits one full lease, in
/// which the workers register theirs again: after it could not reach Redis for half a lease, when the server's
/// `run_id` changed, when the data was lost, and when it starts, because it can't know what happened before. All of
/// it is measured by Redis' clock.
pub struct Reaper {
    queue: Queue,
    queues: Vec<QueueName>,
    /// What is known of each server; there is one unless the partitions are spread over a cluster.
    servers: HashMap<Arc<str>, Server>,
    /// A longer silence than this, in ms, was an outage.
    outage: i64,
    epochs: HashMap<(QueueName, u16), Option<Epoch>>,
    turn: u16,
}

/// One server, as the reaper saw it last.
struct Server {
    guard: ReapGuard,
    run_id: Option<Arc<str>>,
}

impl Reaper {
    /// Looks every `min(lease / 4, 1 s)` at one partition of each queue, in turn, until shutdown.
    pub fn spawn(queue: Queue, queues: Vec<QueueName>, shutdown: CancellationToken) -> JoinHandle<()> {
        let lease = queue.config().lease;
        let tick = (lease / 4).min(queue.config().safety_poll);
        let mut outage = lease / 2;
        if queue.is_cluster() {
            // The turns of a server may be this far apart.
            outage += tick * u32::from(queue.config().partitions);
        }
        let outage = outage.as_millis() as i64;
        let reaper = Self { queue, queues, servers: HashMap::new(), outage, epochs: HashMap::new(), turn: 0 };
        tokio::spawn(reaper.run(tick, shutdown))
    }

    async fn run(mut self, tick: Duration, shutdown: CancellationToken) {
        let mut ticks = interval(tick);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut outage = Outage::new("reaper");
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                _ = ticks.tick() => {}
            }
            for name in self.queues.clone() {
                match self.look(&name).await {
                    Ok(()) => outage.over(),
                    Err(error) => {
                        // The next tick is pause enough.
                        outage.wait(&error);
                    }
                }
            }
            self.turn = (self.turn + 1) % self.queue.config().partitions;
        }
    }

    async fn look(&mut self, name: &QueueName) -> Result<(), QueueError> {
        let server = self.queue.server(name, self.turn).await?;
        let server = self.servers.entry(server).or_insert_with(|| Server {
            guard: ReapGuard { last: 0, outage: self.outage, not_before: i64::MAX },
            run_id: None,
        });
        let found = self.queue.reap_partition(name, self.turn, Some(server.guard)).await?;
        server.guard.last = found.now_ms;
        let mut wait = found.outage;
        if let Some(epoch) = &found.epoch {
            wait |= server.run_id.replace(Arc::clone(&epoch.run)).is_some_and(|before| before != epoch.run);
        }
        let place = (name.clone(), self.turn);
        let before = self.epochs.insert(place, found.epoch.clone());
        wait |=
            before.flatten().is_some_and(|before| Some(before.data) != found.epoch.map(|epoch| epoch.data));
        if wait {
            let lease = self.queue.config().lease;
            server.guard.not_before = found.now_ms.saturating_add(lease.as_millis() as i64);
            tracing::info!(queue = %name, ?lease, "no lease is reaped for the time of one lease, so that workers can renew theirs");
        }
        for id in &found.jobs {
            tracing::warn!(%id, queue = %name, "the lease expired; the job waits again");
        }
        Ok(())
    }
}
