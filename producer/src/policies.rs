//! The policies' loop: keeps Redis' copy of the ledger's policies in step.
//!
//! Any number of processes may run it: what they store is the same, and an older revision never overwrites a newer one.
//! Every second it asks the ledger what has changed. When a claim finds a partition without its policies (Redis lost its
//! data, or the server is another one), it stores all of that queue's again, at once; nothing is claimed there meanwhile.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use queue::{PolicySet, Queue, QueueError, QueueName, QueuePolicy, TenantId, TenantPolicy};
use sagas::{
    StoreError,
    stores::postgres::{
        Postgres,
        policies::{PolicyChanges, QueueRow, TenantRow},
    },
};
use tokio_util::sync::CancellationToken;

use crate::{
    pacing::{Growing, pause, within},
    settings::MaintainSettings,
};

/// How often the ledger is asked what has changed.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The ledger's policies as of one moment.
#[derive(Debug, Clone, Default)]
pub(crate) struct PolicyView {
    revision: i64,
    queues: HashMap<QueueName, QueueRow>,
    tenants: HashMap<TenantId, HashMap<Option<QueueName>, TenantRow>>,
}

impl PolicyView {
    /// Takes in what has changed, and returns it.
    pub async fn refresh(&mut self, postgres: &Postgres) -> Result<PolicyChanges, StoreError> {
        let changes = postgres.policies_since(self.revision).await?;
        for row in &changes.queues {
            self.revision = self.revision.max(row.revision);
            self.queues.insert(row.queue.clone(), row.clone());
        }
        for row in &changes.tenants {
            self.revision = self.revision.max(row.revision);
            self.tenants.entry(row.tenant.clone()).or_default().insert(row.queue.clone(), row.clone());
        }
        Ok(changes)
    }

    /// A queue's policy and its revision; 0 if nobody ever set one.
    pub fn queue(&self, queue: &QueueName) -> (QueuePolicy, i64) {
        self.queues.get(queue).map(|row| (row.policy, row.revision)).unwrap_or_default()
    }

    /// What holds for a tenant in a queue: the row of that queue, else that of every queue. The revision is the newer of
    /// both, because a change of either may change what holds. `None`: nobody ever set one.
    pub fn tenant(&self, tenant: &TenantId, queue: &QueueName) -> Option<(TenantPolicy, i64)> {
        let rows = self.tenants.get(tenant)?;
        let (own, every) = (rows.get(&Some(queue.clone())), rows.get(&None));
        let revision = own.into_iter().chain(every).map(|row| row.revision).max()?;
        let policy = own.and_then(|row| row.policy).or_else(|| every.and_then(|row| row.policy));
        Some((policy.unwrap_or_default(), revision))
    }

    /// All that holds in a queue for these tenants.
    fn of<'a>(&self, queue: &QueueName, tenants: impl IntoIterator<Item = &'a TenantId>) -> PolicySet {
        let tenants = tenants.into_iter().filter_map(|tenant| {
            self.tenant(tenant, queue).map(|(policy, revision)| (tenant.clone(), policy, revision))
        });
        PolicySet { queue: queue.clone(), policy: self.queue(queue), tenants: tenants.collect() }
    }

    /// The queues that any policy names.
    fn named(&self) -> impl Iterator<Item = &QueueName> {
        let of_tenants = self.tenants.values().flat_map(|rows| rows.keys().flatten());
        self.queues.keys().chain(of_tenants)
    }
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum SyncError {
    #[error(transparent)]
    Ledger(#[from] StoreError),
    #[error(transparent)]
    Queue(#[from] QueueError),
}

pub(crate) struct Policies {
    postgres: Postgres,
    queue: Queue,
    view: PolicyView,
    /// Queues whose copy this process keeps in step.
    kept: HashSet<QueueName>,
    /// Queues whose policies must all be stored.
    behind: HashSet<QueueName>,
}

impl Policies {
    pub fn new(postgres: Postgres, queue: Queue, settings: &MaintainSettings) -> Self {
        let behind = settings.queues.iter().cloned().collect();
        Self { postgres, queue, view: PolicyView::default(), kept: HashSet::new(), behind }
    }

    /// Runs until `shutdown`.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let mut pauses = Growing::new(Duration::from_millis(50), Duration::from_secs(2));
        while !shutdown.is_cancelled() {
            match self.round().await {
                Ok(()) => pauses.reset(),
                Err(error) => {
                    let wait = pauses.next();
                    tracing::warn!(%error, again_in = ?wait, "the queue's copy of the policies is stale");
                    pause(wait, &shutdown).await;
                    continue;
                }
            }
            tokio::select! {
                () = shutdown.cancelled() => return,
                wanted = self.queue.policies_wanted() => self.behind.extend(wanted),
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
        }
    }

    async fn round(&mut self) -> Result<(), SyncError> {
        let limit = self.postgres.call_timeout() * 2;
        let changes = within(limit, self.view.refresh(&self.postgres)).await?;
        let new: Vec<QueueName> =
            self.view.named().filter(|name| !self.kept.contains(*name)).cloned().collect();
        self.behind.extend(new);
        for name in self.kept.clone() {
            let Some(set) = self.changed(&name, &changes) else { continue };
            if let Err(error) = self.queue.update_policies(&set).await {
                self.behind.extend(self.kept.drain());
                return Err(error.into());
            }
            tracing::info!(queue = %name, tenants = set.tenants.len(), "policies changed");
        }
        for name in self.behind.clone() {
            let set = self.view.of(&name, self.view.tenants.keys());
            self.queue.sync_policies(&set).await?;
            self.behind.remove(&name);
            self.kept.insert(name);
        }
        Ok(())
    }

    /// What of the changes holds in a queue.
    fn changed(&self, queue: &QueueName, changes: &PolicyChanges) -> Option<PolicySet> {
        let own = changes.queues.iter().any(|row| row.queue == *queue);
        let tenants: HashSet<&TenantId> = changes
            .tenants
            .iter()
            .filter(|row| row.queue.as_ref().is_none_or(|named| named == queue))
            .map(|row| &row.tenant)
            .collect();
        (own || !tenants.is_empty()).then(|| self.view.of(queue, tenants))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_row_of_the_queue_wins_as_a_whole_and_the_newer_revision_counts() {
        let (tenant, queue) = (TenantId::new("acme").unwrap(), QueueName::new("ingest").unwrap());
        let row = |queue: Option<&QueueName>, weight: Option<u8>, revision| TenantRow {
            tenant: tenant.clone(),
            queue: queue.cloned(),
            policy: weight.map(|weight| TenantPolicy { weight, ..TenantPolicy::default() }),
            revision,
        };
        let view = |rows: &[TenantRow]| PolicyView {
            tenants: HashMap::from([(
                tenant.clone(),
                rows.iter().map(|row| (row.queue.clone(), row.clone())).collect(),
            )]),
            ..PolicyView::default()
        };
        let seen = |rows: &[TenantRow]| {
            view(rows).tenant(&tenant, &queue).map(|(policy, revision)| (policy.weight, revision))
        };
        assert_eq!(view(&[]).tenant(&tenant, &queue), None);
        assert_eq!(seen(&[row(None, Some(2), 5)]), Some((2, 5)));
        assert_eq!(seen(&[row(None, Some(2), 5), row(Some(&queue), Some(3), 4)]), Some((3, 5)));
        // Removed: that of every queue holds again, and its age must not keep it from Redis.
        assert_eq!(seen(&[row(None, Some(2), 5), row(Some(&queue), None, 9)]), Some((2, 9)));
        assert_eq!(seen(&[row(Some(&queue), None, 9)]), Some((1, 9)));
    }
}
