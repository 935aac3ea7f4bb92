//! How many jobs of a tenant may wait (contract point 8).

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use queue::{QueueName, TenantId};
use sagas::stores::postgres::{Postgres, tenants::Tenant};

use crate::{
    client::Durability, dispatch::Dispatch, error::EnqueueError, pacing::within, settings::ClientSettings,
};

/// How long a depth far below its limit is believed, and one near it.
const FAR: Duration = Duration::from_secs(1);
const NEAR: Duration = Duration::from_millis(100);
/// How long a tenant's settings are believed.
const TENANT: Duration = Duration::from_secs(10);
/// What is remembered is bounded; beyond it everything is looked up anew.
const REMEMBERED: usize = 10_000;

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
    depths: Mutex<HashMap<(TenantId, QueueName), Depth>>,
    tenants: Mutex<HashMap<TenantId, (Tenant, Instant)>>,
}

impl Admission {
    /// Lets one more job in, or says that the tenant has too many. Passes while Redis is away: its depth is unknown, and
    /// the ledger has room.
    pub async fn admit(
        &self,
        dispatch: &Dispatch,
        postgres: &Postgres,
        settings: &ClientSettings,
        tenant: &TenantId,
        queue: &QueueName,
        durability: Durability,
    ) -> Result<(), EnqueueError> {
        let limit = self.limit(postgres, settings, tenant, durability).await?;
        let place = (tenant.clone(), queue.clone());
        let known = self.depths.lock().unwrap_or_else(PoisonError::into_inner).get(&place).copied();
        let believed = known.filter(|depth| {
            let near = (depth.read + depth.since).saturating_mul(2) >= limit;
            depth.at.elapsed() < if near { NEAR } else { FAR }
        });
        if believed.is_none() {
            let Some(redis) = dispatch.open() else { return Ok(()) };
            let answer = redis.tenant_depth(queue, tenant).await;
            dispatch.learn(&answer);
            let Ok(read) = answer else { return Ok(()) };
            let mut depths = self.depths.lock().unwrap_or_else(PoisonError::into_inner);
            if depths.len() >= REMEMBERED {
                depths.clear();
            }
            depths.insert(place.clone(), Depth { read, at: Instant::now(), since: 0 });
        }
        let mut depths = self.depths.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(depth) = depths.get_mut(&place) else { return Ok(()) };
        if depth.read + depth.since >= limit {
            return Err(EnqueueError::QueueFull { retry_after: settings.full_retry_after });
        }
        depth.since += 1;
        Ok(())
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
