//! The gauges that every process reports alike, read from the stores: how much waits, for how long, and what is stuck.

use std::{collections::HashSet, hash::Hash};

use metrics::gauge;
use queue::{Queue, QueueError, QueueName, QueueStats};
use sagas::{
    StoreError,
    audit::FindingKind,
    stores::postgres::{Postgres, classes::ClassCount},
};
use tokio_util::sync::CancellationToken;

use crate::{
    pacing::{pause, within},
    settings::MaintainSettings,
};

pub(crate) struct Stats {
    postgres: Postgres,
    queue: Queue,
    settings: MaintainSettings,
    /// Queues with gauges: of one that nobody has used for a week they must go to 0.
    queues: HashSet<QueueName>,
    /// Kinds and classes with a gauge: one whose last dead letter was dealt with must go to 0.
    dead: HashSet<(String, String)>,
    /// Queues and classes of tenants with a gauge, likewise.
    classes: HashSet<(String, String)>,
}

impl Stats {
    pub fn new(postgres: Postgres, queue: Queue, settings: MaintainSettings) -> Self {
        let (queues, dead, classes) = (HashSet::new(), HashSet::new(), HashSet::new());
        Self { postgres, queue, settings, queues, dead, classes }
    }

    /// Runs until `shutdown`. While a store is down its gauges keep their last values; `queue_redis_up` says so of the queue's.
    pub async fn run(mut self, shutdown: CancellationToken) {
        loop {
            let queues = self.queues().await;
            gauge!("queue_redis_up").set(f64::from(u8::from(queues.is_ok())));
            if let Err(error) = queues {
                tracing::debug!(%error, "the queue's gauges are stale");
            }
            if let Err(error) = self.ledger().await {
                tracing::debug!(%error, "the ledger's gauges are stale");
            }
            if let Err(error) = self.classes().await {
                tracing::debug!(%error, "the gauges of classes of tenants are stale");
            }
            if !pause(self.settings.stats_every, &shutdown).await {
                return;
            }
        }
    }

    async fn queues(&mut self) -> Result<(), QueueError> {
        // Those served by this process even before anything is known of them, and all that somebody pushes to or serves.
        let names: HashSet<QueueName> =
            self.queue.queues().await?.into_iter().chain(self.settings.queues.iter().cloned()).collect();
        for name in gone(&mut self.queues, names) {
            set_queue_gauges(&name, &QueueStats::default());
        }
        for name in &self.queues {
            set_queue_gauges(name, &self.queue.stats(name).await?);
        }
        Ok(())
    }

    async fn ledger(&mut self) -> Result<(), StoreError> {
        let (limit, postgres) = (self.postgres.call_timeout(), &self.postgres);
        gauge!("outbox_unrelayed").set(within(limit, postgres.undispatched_count()).await? as f64);
        gauge!("parked_sagas").set(within(limit, postgres.parked_count()).await? as f64);
        let drift = within(limit, postgres.drift()).await?;
        gauge!("audit_age_seconds").set(drift.age_s);
        for kind in FindingKind::ALL {
            let left = drift.by_kind.get(kind.name()).copied().unwrap_or_default();
            gauge!("audit_drift", "kind" => kind.name()).set(left as f64);
        }
        let counts = within(limit, postgres.dead_letter_counts()).await?;
        let place = |(kind, class, _): &(String, String, i64)| (kind.clone(), class.clone());
        for (kind, class) in gone(&mut self.dead, counts.iter().map(place).collect()) {
            gauge!("dead_letters", "kind" => kind, "class" => class).set(0.0);
        }
        for (kind, class, count) in counts {
            gauge!("dead_letters", "kind" => kind, "class" => class).set(count as f64);
        }
        Ok(())
    }

    /// What one process of the fleet has counted, if tenants have classes.
    async fn classes(&mut self) -> Result<(), StoreError> {
        let (limit, postgres) = (self.postgres.call_timeout(), &self.postgres);
        if let Err(error) = within(limit, postgres.count_classes(self.settings.stats_every * 3)).await {
            tracing::warn!(%error, "classes of tenants were not counted; what is reported of them is old");
        }
        let counts = within(limit, postgres.class_counts()).await?;
        let place = |count: &ClassCount| (count.queue.clone(), count.class.clone());
        for (queue, class) in gone(&mut self.classes, counts.iter().map(place).collect()) {
            set_class_gauges(&ClassCount { queue, class, ..ClassCount::default() });
        }
        counts.iter().for_each(set_class_gauges);
        Ok(())
    }
}

/// What was `shown` and is not there `now`: its gauges would stay where they are.
fn gone<K: Eq + Hash>(shown: &mut HashSet<K>, now: HashSet<K>) -> Vec<K> {
    let before = std::mem::replace(shown, now);
    before.into_iter().filter(|place| !shown.contains(place)).collect()
}

fn set_queue_gauges(name: &QueueName, stats: &QueueStats) {
    for (priority, level) in stats.by_priority.iter().enumerate() {
        let labels = [("queue", name.to_string()), ("priority", priority.to_string())];
        gauge!("queue_depth", &labels).set(level.depth as f64);
        gauge!("queue_oldest_age_seconds", &labels).set(level.oldest_ms.unwrap_or(0) as f64 / 1000.0);
    }
    gauge!("queue_in_flight", "queue" => name.to_string()).set(stats.in_flight as f64);
    gauge!("queue_scheduled", "queue" => name.to_string()).set(stats.scheduled as f64);
    gauge!("queue_paused", "queue" => name.to_string()).set(f64::from(u8::from(stats.paused)));
    gauge!("queue_blocked_tenants", "queue" => name.to_string()).set(stats.blocked_tenants as f64);
}

fn set_class_gauges(count: &ClassCount) {
    let labels = [("queue", count.queue.clone()), ("tenant_class", count.class.clone())];
    gauge!("queue_class_depth", &labels).set(count.waiting as f64);
    gauge!("queue_class_oldest_age_seconds", &labels).set(count.oldest_s.unwrap_or_default());
    gauge!("queue_class_in_flight", &labels).set(count.running as f64);
    gauge!("queue_class_ended_last_minute", &labels).set(count.ended as f64);
}
