//! Keeps the limits of depth for jobs that come by `flotilla.enqueue` in SQL, which sees nothing of Redis: tells Postgres
//! which queues and tenants are full.
//!
//! A part of the relay: it watches only places from which it has dispatched jobs lately, so that nothing is looked up where
//! nobody uses SQL, and those that it called full. If it dies, what it said is void after a few seconds.

use std::{collections::HashMap, time::Duration};

use queue::{Envelope, Queue, TenantId};
use sagas::stores::postgres::{Postgres, refusals::Place};
use tokio::time::Instant;

use crate::{
    pacing::within,
    policies::{PolicyView, SyncError},
    settings::MaintainSettings,
};

/// Between two looks: by what is enqueued in this time a limit may be passed.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How long a refusal holds that nobody renews.
const LASTS: Duration = Duration::from_secs(5);
/// A place from which nothing came for so long is not watched any more, unless it is full.
const QUIET: Duration = Duration::from_secs(10);
/// Most places that are watched.
const WATCHED: usize = 1000;

#[derive(Debug, Clone, Copy)]
struct Watched {
    seen: Instant,
    full: bool,
}

#[derive(Default)]
pub(crate) struct Refusals {
    places: HashMap<Place, Watched>,
    policies: PolicyView,
    looked: Option<Instant>,
}

impl Refusals {
    /// Watches where these jobs went.
    pub fn saw(&mut self, envelopes: &[Envelope]) {
        let seen = Instant::now();
        for envelope in envelopes {
            for tenant in [None, Some(envelope.tenant.clone())] {
                let place = (envelope.queue.clone(), tenant);
                if let Some(watched) = self.places.get_mut(&place) {
                    watched.seen = seen;
                } else if self.places.len() < WATCHED {
                    self.places.insert(place, Watched { seen, full: false });
                }
            }
        }
    }

    /// Compares depths with limits if it is time, and tells Postgres what is full and what is so no more.
    pub async fn look(
        &mut self,
        postgres: &Postgres,
        queue: &Queue,
        settings: &MaintainSettings,
    ) -> Result<(), SyncError> {
        let now = Instant::now();
        if self.places.is_empty() || self.looked.is_some_and(|at| now - at < LOOK_EVERY) {
            return Ok(());
        }
        self.looked = Some(now);
        let limit = postgres.call_timeout() * 2;
        within(limit, self.policies.refresh(postgres)).await?;
        let tenants: Vec<&str> =
            self.places.keys().filter_map(|(_, tenant)| tenant.as_ref().map(TenantId::as_str)).collect();
        let own = within(limit, postgres.waiting_limits(&tenants)).await?;
        let (mut full, mut free) = (vec![], vec![]);
        for (place, watched) in &mut self.places {
            let (name, tenant) = place;
            let (most, depth) = match tenant {
                None => match self.policies.queue(name).0.max_depth {
                    Some(most) => (most, queue.depth(name).await?),
                    None => (u64::MAX, 0),
                },
                Some(tenant) => {
                    let policy = self.policies.tenant(tenant, name).and_then(|(policy, _)| policy.max_depth);
                    let most = policy
                        .or_else(|| own.get(tenant.as_str()).copied())
                        .unwrap_or(settings.max_waiting_per_tenant);
                    (most, queue.tenant_depth(name, tenant).await?)
                }
            };
            let is_full = depth >= most;
            if is_full {
                full.push(place.clone());
            } else if watched.full {
                free.push(place.clone());
            }
            if is_full != watched.full {
                tracing::info!(queue = %name, tenant = tenant.as_ref().map(tracing::field::display), depth, most,
                    "SQL's enqueue {}", if is_full { "is refused: as many jobs wait as may" } else { "goes on" });
            }
        }
        if !(full.is_empty() && free.is_empty()) {
            within(limit, postgres.refuse(&full, &free, LASTS)).await?;
        }
        for place in full {
            self.places.entry(place).and_modify(|watched| watched.full = true);
        }
        for place in free {
            self.places.entry(place).and_modify(|watched| watched.full = false);
        }
        self.places.retain(|_, watched| watched.full || now - watched.seen < QUIET);
        Ok(())
    }
}
