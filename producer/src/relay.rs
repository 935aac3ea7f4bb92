//! The relay: puts undispatched jobs of the ledger into Redis (PROTOCOL.md 18).
//!
//! A job that waits there already either was pushed by one that died, or was changed since: it is brought in line.
//!
//! It also has SQL's enqueue refuse jobs for queues and tenants that are full, see [`crate::refusals`].
//!
//! Any number may run: each takes rows that no other holds. A relay that dies between push and commit leaves its rows to
//! the next one, whose push finds the jobs present.

use std::{collections::HashMap, time::Duration};

use queue::{JobId, Pushed, Queue, QueueError};
use sagas::{StoreError, stores::postgres::Postgres};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{
    dispatch::place,
    pacing::{Growing, pause, within},
    refusals::Refusals,
    settings::MaintainSettings,
};

/// How long a queue whose window is full is left alone.
const FULL_PAUSE: Duration = Duration::from_secs(1);

#[derive(Debug, thiserror::Error)]
enum RelayError {
    #[error(transparent)]
    Ledger(#[from] StoreError),
    #[error(transparent)]
    Queue(#[from] QueueError),
}

pub(crate) struct Relay {
    postgres: Postgres,
    queue: Queue,
    settings: MaintainSettings,
    /// Queues whose window was full, and until when; those whose window for later jobs was.
    full: HashMap<String, Instant>,
    later_full: HashMap<String, Instant>,
    refusals: Refusals,
}

impl Relay {
    pub fn new(postgres: Postgres, queue: Queue, settings: MaintainSettings) -> Self {
        Self {
            postgres,
            queue,
            settings,
            full: HashMap::new(),
            later_full: HashMap::new(),
            refusals: Refusals::default(),
        }
    }

    /// Runs until `shutdown`. Ends a round under way first, unless a server hangs.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let mut pauses = Growing::new(self.settings.relay_every, Duration::from_secs(5));
        while !shutdown.is_cancelled() {
            if let Err(error) = self.refusals.look(&self.postgres, &self.queue, &self.settings).await {
                tracing::debug!(%error, "limits of depth are not kept for SQL's enqueue");
            }
            let wait = match self.round().await {
                Ok(0) => {
                    pauses.reset();
                    self.settings.relay_every
                }
                Ok(dispatched) => {
                    tracing::debug!(dispatched, "relayed");
                    pauses.reset();
                    continue;
                }
                Err(error) => {
                    let wait = pauses.next();
                    tracing::warn!(%error, again_in = ?wait, "jobs wait in the ledger to be relayed");
                    wait
                }
            };
            if !pause(wait, &shutdown).await {
                return;
            }
        }
    }

    /// Dispatches one batch; returns how many jobs Redis took.
    async fn round(&mut self) -> Result<usize, RelayError> {
        let now = Instant::now();
        let full = still(&mut self.full, now);
        let later_full = still(&mut self.later_full, now);
        let limit = self.postgres.call_timeout() * 2;
        let most = self.settings.relay_batch as i64;
        let batch = within(limit, self.postgres.undispatched(most, &full, &later_full)).await?;
        if batch.envelopes.is_empty() {
            return Ok(0);
        }
        self.refusals.saw(&batch.envelopes);
        let pushed = place(&self.queue, &batch.envelopes).await?;
        let mut there: Vec<JobId> = Vec::with_capacity(pushed.len());
        for (envelope, pushed) in batch.envelopes.iter().zip(pushed) {
            match pushed {
                Some(Pushed::Queued | Pushed::Present) => there.push(envelope.id),
                // Its worker is about to put it back where it was. Until it has, the job counts as not dispatched.
                None => {}
                // Accepted jobs are not subject to policies; only the window refuses them.
                Some(Pushed::Full | Pushed::QueueFull | Pushed::TenantFull | Pushed::Draining) => {
                    // Due and later jobs have a window each.
                    let full =
                        if envelope.run_at_ms.is_some() { &mut self.later_full } else { &mut self.full };
                    full.insert(envelope.queue.to_string(), now + FULL_PAUSE);
                }
            }
        }
        if !there.is_empty() {
            within(limit, batch.done(&there)).await?;
        }
        Ok(there.len())
    }
}

/// The queues that were full less than a moment ago.
fn still(full: &mut HashMap<String, Instant>, now: Instant) -> Vec<String> {
    full.retain(|_, until| *until > now);
    full.keys().cloned().collect()
}
