//! Finds expired leases and puts their jobs back.

use std::{collections::HashMap, sync::Arc, time::Duration};

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::{
    envelope::Epoch,
    error::QueueError,
    ids::QueueName,
    queue::Queue,
    rounds::{Place, Rounds},
    upkeep::ReapGuard,
};

/// The reaper. Every worker runs one; several do no harm.
///
/// A lease that ran out because Redis was away is no sign of a dead worker, so the reaper waits one full lease, in
/// which the workers register theirs again: after it could not reach Redis for half a lease, when the server's
/// `run_id` changed, when the data was lost, and when it starts, because it can't know what happened before. All of
/// it is measured by Redis' clock.
pub struct Reaper {
    queue: Queue,
    /// What is known of each server; there is one unless the partitions are spread over a cluster.
    servers: HashMap<Arc<str>, Server>,
    /// A longer silence than this, in ms, was an outage.
    outage: i64,
    /// What each partition's life was when it was looked at last, and when that was by Redis' clock.
    seen: HashMap<Place, (i64, Option<Epoch>)>,
}

/// One server, as the reaper saw it last.
struct Server {
    guard: ReapGuard,
    run_id: Option<Arc<str>>,
}

impl Reaper {
    /// Until shutdown, looks at each partition when the first lease that it knows of there may expire, so that a job is
    /// redelivered within a second of that; and every `min(lease / 4, 1 s)` at one partition of each queue, in turn, which shows
    /// outages and new leases. With more partitions than such turns in a lease, a lease may end before it was seen.
    pub fn spawn(queue: Queue, queues: Vec<QueueName>, shutdown: CancellationToken) -> JoinHandle<()> {
        let lease = queue.config().lease;
        let tick = (lease / 4).min(queue.config().safety_poll);
        let mut outage = lease / 2;
        if queue.is_cluster() {
            // The turns of a server may be this far apart.
            outage += tick * u32::from(queue.config().partitions);
        }
        let outage = outage.as_millis() as i64;
        // A tick is rest enough.
        let rounds = Rounds::new("reaper", queues, queue.config().partitions, tick, tick);
        let reaper = Self { queue, servers: HashMap::new(), outage, seen: HashMap::new() };
        tokio::spawn(reaper.run(rounds, shutdown))
    }

    async fn run(mut self, mut rounds: Rounds, shutdown: CancellationToken) {
        while let Some(place) = rounds.next(&shutdown).await {
            let found = self.look(&place.0, place.1).await;
            rounds.looked(place, found);
        }
    }

    /// Looks at one partition; returns how long none of its leases can expire, if there are any.
    async fn look(&mut self, name: &QueueName, partition: u16) -> Result<Option<Duration>, QueueError> {
        let server = self.queue.server(name, partition).await?;
        let server = self.servers.entry(server).or_insert_with(|| Server {
            guard: ReapGuard { last: 0, outage: self.outage, not_before: i64::MAX, seen: 0 },
            run_id: None,
        });
        let place = (name.clone(), partition);
        let seen = self.seen.get(&place).map_or(0, |(when, _)| *when);
        let guard = ReapGuard { seen, ..server.guard };
        let found = self.queue.reap_partition(name, partition, Some(guard)).await?;
        server.guard.last = found.now_ms;
        let mut wait = found.outage;
        if let Some(epoch) = &found.epoch {
            wait |= server.run_id.replace(Arc::clone(&epoch.run)).is_some_and(|before| before != epoch.run);
        }
        let before = self.seen.insert(place, (found.now_ms, found.epoch.clone()));
        wait |= before
            .and_then(|(_, epoch)| epoch)
            .is_some_and(|before| Some(before.data) != found.epoch.map(|epoch| epoch.data));
        let lease = self.queue.config().lease;
        if wait {
            server.guard.not_before = found.now_ms.saturating_add(lease.as_millis() as i64);
            tracing::info!(queue = %name, ?lease, "no lease is reaped for the time of one lease, so that workers can renew theirs");
        }
        for id in &found.jobs {
            tracing::warn!(%id, queue = %name, "the lease expired; the job waits again");
        }
        // At least a millisecond: Redis rounds times down.
        let not_before = server.guard.not_before.saturating_sub(found.now_ms);
        Ok(found.next_ms.map(|next| Duration::from_millis(next.max(not_before).max(1) as u64).min(lease)))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use devstack::{RedisOptions, testing::TestServices};
    use futures::{FutureExt, StreamExt};

    use super::*;
    use crate::{Envelope, QueueConfig, Rate, TenantId, TenantPolicy, WorkerId, partition::partition_key};

    const NOW: i64 = 1_800_000_000_000;
    const STEP: i64 = 3_600_000;

    #[tokio::test]
    async fn after_the_clock_went_back_a_tenants_rate_goes_on_in_every_partition() {
        let services = TestServices::builder().redis_queue_with(RedisOptions::queue()).start().await.unwrap();
        let url = services.redis_queue().url().to_owned();
        let config = QueueConfig { url: url.clone(), partitions: 2, ..QueueConfig::default() };
        let queue = Queue::connect(config).await.unwrap();
        let (name, tenant) = (QueueName::new("ingest").unwrap(), TenantId::new("slow").unwrap());
        // 10 a second in each partition.
        let policy =
            TenantPolicy { rate: Some(Rate { per_second: 20.0, burst: 2 }), ..TenantPolicy::default() };
        queue.set_tenant_policy(&name, &tenant, &policy, 1).await.unwrap();
        let jobs: Vec<_> = (0..40).map(|_| Envelope::new("x", name.clone(), tenant.clone())).collect();
        queue.push(&jobs).await.unwrap();
        let claimed = async |at: i64, partition: u16| {
            let claim = queue.at(at).claim_partition(&name, partition, &WorkerId::new("test:1"), 4).await;
            claim.unwrap().claims.len()
        };
        let mut reaper = Reaper {
            queue: queue.at(NOW + STEP),
            servers: HashMap::new(),
            outage: 5000,
            seen: HashMap::new(),
        };
        for partition in 0..2 {
            assert_eq!(claimed(NOW + STEP, partition).await, 1);
            reaper.look(&name, partition).await.unwrap();
        }
        let (mut sink, mut heard) =
            redis::Client::open(url).unwrap().get_async_pubsub().await.unwrap().split();
        for partition in 0..2 {
            sink.subscribe(format!("{}:wake", partition_key(queue.config(), &name, partition)))
                .await
                .unwrap();
        }
        reaper.queue = queue.at(NOW);
        for partition in 0..2 {
            reaper.look(&name, partition).await.unwrap();
            // The answer comes after all messages of before.
            sink.ping::<redis::Value>().await.unwrap();
            assert!(heard.next().now_or_never().is_some(), "the workers of {partition} sleep on");
            assert_eq!(claimed(NOW, partition).await, 0, "no token was made yet");
            assert_eq!(claimed(NOW + 99, partition).await, 0);
            assert_eq!(claimed(NOW + 100, partition).await, 1);
        }
    }
}
