//! Storing policies in Redis, and knowing which queues have their copy.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use tokio::sync::Notify;

use crate::{
    error::QueueError,
    ids::{QueueName, TenantId},
    policy::{PolicySet, QueuePolicy, TenantPolicy},
    queue::{Queue, nonce, text},
    reply::Reply,
    scripts,
};

/// Most tenants in one call of `policy.lua`.
const TENANTS_AT_ONCE: usize = 500;

/// Which queues have their policies in Redis, as far as this process made sure of it.
///
/// Redis' copy may be gone (`FLUSHALL`) or old (a restart with an old RDB, a failover that lost writes). The first shows in
/// the partition, which lacks a mark that the copy carries. The second shows in the server's `run_id`: what was stored on
/// another server is stored again before anything is claimed.
#[derive(Default)]
pub(crate) struct Copies {
    required: AtomicBool,
    /// The server on which each partition's copy was completed.
    stored: Mutex<HashMap<(QueueName, u16), Arc<str>>>,
    wanted: Mutex<HashSet<QueueName>>,
    told: Notify,
}

impl Copies {
    pub(crate) fn required(&self) -> bool {
        self.required.load(Ordering::Acquire)
    }

    pub(crate) fn has(&self, queue: &QueueName, partition: u16, run_id: &str) -> bool {
        let stored = self.stored.lock().unwrap_or_else(PoisonError::into_inner);
        stored.get(&(queue.clone(), partition)).is_some_and(|run| run.as_ref() == run_id)
    }

    /// The queues whose copy this process has completed.
    pub(crate) fn queues(&self) -> BTreeSet<QueueName> {
        self.stored
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .keys()
            .map(|(queue, _)| queue.clone())
            .collect()
    }

    /// Asks whoever waits in [`Queue::policies_wanted`] for the queue's policies.
    pub(crate) fn want(&self, queue: &QueueName) {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner).insert(queue.clone());
        self.told.notify_one();
    }

    fn stored(&self, queue: &QueueName, partition: u16, run_id: Arc<str>) {
        let mut stored = self.stored.lock().unwrap_or_else(PoisonError::into_inner);
        stored.insert((queue.clone(), partition), run_id);
    }
}

impl Queue {
    /// From now on, claims nothing from a partition before [`sync_policies`](Self::sync_policies) has completed its copy of
    /// the policies, so that a paused queue is paused after `FLUSHALL`. For processes that keep the copy in step with a
    /// ledger; holds for all clones.
    pub fn require_policies(&self) {
        self.shared.copies.required.store(true, Ordering::Release);
    }

    /// Waits until a claim found policies missing, and returns the queues. Cancel-safe.
    pub async fn policies_wanted(&self) -> Vec<QueueName> {
        loop {
            let told = self.shared.copies.told.notified();
            let wanted = std::mem::take(
                &mut *self.shared.copies.wanted.lock().unwrap_or_else(PoisonError::into_inner),
            );
            if !wanted.is_empty() {
                return wanted.into_iter().collect();
            }
            told.await;
        }
    }

    /// Stores a queue's policy. Idempotent; an older revision than the one that is there changes nothing.
    pub async fn set_policy(
        &self,
        queue: &QueueName,
        policy: &QueuePolicy,
        revision: i64,
    ) -> Result<(), QueueError> {
        self.store(queue, Some((policy, revision)), &[], false).await
    }

    /// Stores a tenant's policy in a queue. Idempotent; an older revision than the one that is there changes nothing.
    pub async fn set_tenant_policy(
        &self,
        queue: &QueueName,
        tenant: &TenantId,
        policy: &TenantPolicy,
        revision: i64,
    ) -> Result<(), QueueError> {
        self.store(queue, None, &[(tenant.clone(), *policy, revision)], false).await
    }

    /// Stores all policies of a queue, after which it may be claimed from (see [`require_policies`](Self::require_policies)).
    pub async fn sync_policies(&self, set: &PolicySet) -> Result<(), QueueError> {
        let (policy, revision) = &set.policy;
        self.store(&set.queue, Some((policy, *revision)), &set.tenants, true).await
    }

    /// Stores some policies of a queue, when the others are stored already. Idempotent by revision.
    pub async fn update_policies(&self, set: &PolicySet) -> Result<(), QueueError> {
        let (policy, revision) = &set.policy;
        self.store(&set.queue, Some((policy, *revision)), &set.tenants, false).await
    }

    async fn store(
        &self,
        queue: &QueueName,
        policy: Option<(&QueuePolicy, i64)>,
        tenants: &[(TenantId, TenantPolicy, i64)],
        complete: bool,
    ) -> Result<(), QueueError> {
        policy.map_or(Ok(()), |(policy, _)| policy.check())?;
        tenants.iter().try_for_each(|(_, policy, _)| policy.check())?;
        let partitions = self.config().partitions;
        for partition in 0..partitions {
            let mut servers = HashSet::new();
            let mut chunks = tenants.chunks(TENANTS_AT_ONCE).peekable();
            loop {
                let chunk = chunks.next().unwrap_or_default();
                let last = chunks.peek().is_none();
                let complete = if complete && last { text(1) } else { Vec::new() };
                let mut args = vec![nonce(), complete, text(partitions)];
                match policy {
                    Some((policy, revision)) => {
                        args.push(text(revision));
                        policy.write(&mut args, partitions);
                    }
                    None => args.resize(11, Vec::new()),
                }
                for (tenant, policy, revision) in chunk {
                    args.extend([text(tenant), text(revision)]);
                    policy.write(&mut args, partitions);
                }
                let answer = self.script(&scripts::POLICY, queue, partition, &args).await?;
                let taken = Reply::new(answer.value)?.integer()?;
                servers.insert(answer.run_id);
                if taken > 0 {
                    tracing::debug!(%queue, partition, taken, "policies stored");
                }
                if last {
                    break;
                }
            }
            if complete
                && let Some(run_id) = servers.iter().next()
                // A server that changed in the middle may lack the first part.
                && servers.len() == 1
            {
                self.shared.copies.stored(queue, partition, Arc::clone(run_id));
            }
        }
        Ok(())
    }
}
