//! How many jobs of a tenant and of a queue may wait (contract point 8).

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use queue::{QueueName, TenantId};
use sagas::stores::postgres::{Postgres, tenants::Tenant};

use crate::{
    client::Durability, dispatch::Dispatch, error::EnqueueError, pacing::within, policies::PolicyView,
    settings::ClientSettings,
};

/// How long a depth far below its limit is believed, and one near it.
const FAR: Duration = Duration::from_secs(1);
const NEAR: Duration = Duration::from_millis(100);
/// How long a tenant's settings are believed.
const TENANT: Duration = Duration::from_secs(10);
/// What is remembered is bounded; beyond it everything is looked up anew.
const REMEMBERED: usize = 10_000;

/// Whose jobs are counted: a tenant's in a queue, or all of a queue.
type Place = (Option<TenantId>, QueueName);

#[derive(Debug, Clone, Copy)]
struct Depth {
    read: u64,
    at: Instant,
    /// Accepted by this process since it was read.
    since: u64,
}

/// What this process knows of the tenants' limits and depths.
#[derive(Default)]
pub(crate) struct Admission {
    depths: Mutex<HashMap<Place, Depth>>,
    tenants: Mutex<HashMap<TenantId, (Tenant, Instant)>>,
    policies: Mutex<Option<(Arc<PolicyView>, Instant)>>,
    looking: tokio::sync::Mutex<PolicyView>,
}

impl Admission {
    /// Lets one more job in, or says that the queue drains, or that it or the tenant has too many. Passes while Redis is
    /// away: its depth is unknown, and the ledger has room.
    pub async fn admit(
        &self,
        dispatch: &Dispatch,
        postgres: &Postgres,
        settings: &ClientSettings,
        tenant: &TenantId,
        queue: &QueueName,
        durability: Durability,
    ) -> Result<(), EnqueueError> {
        let of_tenant = self.limit(postgres, settings, tenant, durability).await?;
        let policies = self.policies(postgres, settings, durability).await?;
        let policy = policies.queue(queue).0;
        if policy.draining {
            return Err(EnqueueError::Draining { queue: queue.clone() });
        }
        let retry_after = settings.full_retry_after;
        let of_tenant =
            policies.tenant(tenant, queue).and_then(|found| found.0.max_depth).unwrap_or(of_tenant);
        let (whole, own) = ((None, queue.clone()), (Some(tenant.clone()), queue.clone()));
        if let Some(limit) = policy.max_depth
            && self.full(dispatch, &whole, limit).await
        {
            return Err(EnqueueError::QueueFull { retry_after });
        }
        if self.full(dispatch, &own, of_tenant).await {
            return Err(EnqueueError::TenantFull { retry_after });
        }
        let mut depths = self.depths.lock().unwrap_or_else(PoisonError::into_inner);
        for place in [whole, own] {
            if let Some(depth) = depths.get_mut(&place) {
                depth.since += 1;
            }
        }
        Ok(())
    }

    /// Whether a place has as many jobs as it may have; no while that can't be known.
    async fn full(&self, dispatch: &Dispatch, place: &Place, limit: u64) -> bool {
        let known = self.depths.lock().unwrap_or_else(PoisonError::into_inner).get(place).copied();
        let believed = known.filter(|depth| {
            let near = (depth.read + depth.since).saturating_mul(2) >= limit;
            depth.at.elapsed() < if near { NEAR } else { FAR }
        });
        let depth = match believed {
            Some(depth) => depth,
            None => {
                let Some(redis) = dispatch.open() else { return false };
                let (tenant, queue) = place;
                let answer = match tenant {
                    Some(tenant) => redis.tenant_depth(queue, tenant).await,
                    None => redis.depth(queue).await,
                };
                dispatch.learn(&answer);
                let Ok(read) = answer else { return false };
                let depth = Depth { read, at: Instant::now(), since: 0 };
                let mut depths = self.depths.lock().unwrap_or_else(PoisonError::into_inner);
                if depths.len() >= REMEMBERED {
                    depths.clear();
                }
                depths.insert(place.clone(), depth);
                depth
            }
        };
        depth.read + depth.since >= limit
    }

    /// The policies as of at most a second ago. One caller at a time looks; the others go on with what is known. When the
    /// ledger doesn't answer, what is known holds, and a `fast` job goes on with nothing.
    async fn policies(
        &self,
        postgres: &Postgres,
        settings: &ClientSettings,
        durability: Durability,
    ) -> Result<Arc<PolicyView>, EnqueueError> {
        let known = || self.policies.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut looking = match known() {
            Some((view, at)) if at.elapsed() < FAR => return Ok(view),
            Some((view, _)) => match self.looking.try_lock() {
                Ok(looking) => looking,
                Err(_) => return Ok(view),
            },
            None => self.looking.lock().await,
        };
        if let Some((view, at)) = known()
            && at.elapsed() < FAR
        {
            return Ok(view);
        }
        let looked = within(settings.connect_within, looking.refresh(postgres)).await;
        match (looked, known()) {
            (Ok(_), _) => {}
            (Err(error), Some(_)) => tracing::debug!(%error, "the policies can't be read"),
            (Err(error), None) if error.is_unavailable() && durability == Durability::Fast => {
                tracing::debug!(%error, "the policies can't be read");
                return Ok(Arc::default());
            }
            (Err(error), None) => return Err(crate::error::refused(&error, settings.retry_after)),
        }
        let view = Arc::new(looking.clone());
        *self.policies.lock().unwrap_or_else(PoisonError::into_inner) = Some((view.clone(), Instant::now()));
        Ok(view)
    }

    /// The tenant's own limit, or the default. When the ledger doesn't answer, a `fast` job gets what is known.
    async fn limit(
        &self,
        postgres: &Postgres,
        settings: &ClientSettings,
        tenant: &TenantId,
        durability: Durability,
    ) -> Result<u64, EnqueueError> {
        let of = |tenant: &Tenant| {
            tenant
                .max_waiting
                .and_then(|limit| u64::try_from(limit).ok())
                .unwrap_or(settings.max_waiting_per_tenant)
        };
        let known = self.tenants.lock().unwrap_or_else(PoisonError::into_inner).get(tenant).cloned();
        if let Some((tenant, at)) = &known
            && at.elapsed() < TENANT
        {
            return Ok(of(tenant));
        }
        match within(settings.connect_within, postgres.tenant(tenant.as_str())).await {
            Ok(Some(found)) => {
                let limit = of(&found);
                let mut tenants = self.tenants.lock().unwrap_or_else(PoisonError::into_inner);
                if tenants.len() >= REMEMBERED {
                    tenants.clear();
                }
                tenants.insert(tenant.clone(), (found, Instant::now()));
                Ok(limit)
            }
            Ok(None) => Err(EnqueueError::UnknownTenant),
            Err(error) if error.is_unavailable() && durability == Durability::Fast => {
                tracing::debug!(%error, %tenant, "the tenant's limit can't be read");
                Ok(known.map_or(settings.max_waiting_per_tenant, |(tenant, _)| of(&tenant)))
            }
            Err(error) => Err(crate::error::refused(&error, settings.retry_after)),
        }
    }
}
