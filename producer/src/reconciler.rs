//! The reconciler: compares the ledger's unfinished jobs with Redis and dispatches what is missing there.
//!
//! One process at a time has the role. It makes a pass now and then, which leaves alone what changed just now, and one
//! at once when the prefix' stamp has vanished, which means that Redis lost its data. The stamp is written again only
//! after that pass, so that a reconciler that dies in the middle leaves the loss visible to the next one.

use std::{collections::HashSet, time::Duration};

use queue::{Envelope, JobId, Place, Pushed, Queue, QueueError, QueueName};
use sagas::{
    StoreError,
    stores::postgres::{Postgres, relay::Leadership},
};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    error::MaintainError,
    pacing::{pause, within},
    settings::MaintainSettings,
};

/// Jobs looked at, and compared, at once.
const PAGE: i64 = 1000;
/// Jobs compared per second at most: a pass over a long ledger must not keep the stores busy.
const COMPARED_PER_SECOND: u32 = 100_000;
/// How often the stamp and the leadership are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);

#[derive(Debug, thiserror::Error)]
enum PassError {
    #[error(transparent)]
    Ledger(#[from] StoreError),
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error("shutting down")]
    Stopping,
}

#[derive(Clone)]
pub(crate) struct Reconciler {
    pub postgres: Postgres,
    pub queue: Queue,
    pub settings: MaintainSettings,
    pub ledger: Uuid,
}

impl Reconciler {
    /// Runs until `shutdown`; fails if the prefix turns out to be another ledger's.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), MaintainError> {
        let look = LOOK_EVERY.min(self.settings.reconcile_every);
        while !shutdown.is_cancelled() {
            let limit = self.postgres.call_timeout();
            match within(limit, self.postgres.lead("reconciler")).await {
                Ok(Some(leadership)) => self.lead(leadership, look, &shutdown).await?,
                Ok(None) => {}
                Err(error) => tracing::debug!(%error, "no say yet in who reconciles"),
            }
            pause(look, &shutdown).await;
        }
        Ok(())
    }

    /// Has the role until it is lost or `shutdown`.
    async fn lead(
        &self,
        mut leadership: Leadership,
        look: Duration,
        shutdown: &CancellationToken,
    ) -> Result<(), MaintainError> {
        tracing::info!("this process reconciles ledger and queue");
        let mut next_pass = Instant::now();
        let mut lost_since: Option<Instant> = None;
        while !shutdown.is_cancelled() {
            if let Err(error) = within(self.postgres.call_timeout(), leadership.check()).await {
                tracing::warn!(%error, "the reconciler's role is lost");
                return Ok(());
            }
            let now = Instant::now();
            let result = match self.queue.is_stamped_by(self.ledger).await {
                Ok(true) => {
                    lost_since = None;
                    if now >= next_pass { Some(self.pass(self.settings.grace, shutdown).await) } else { None }
                }
                Ok(false) => self.after_loss(&mut lost_since, shutdown).await,
                Err(error) => Some(Err(error.into())),
            };
            match result {
                Some(Ok(())) => next_pass = Instant::now() + self.settings.reconcile_every,
                Some(Err(PassError::Stopping)) => return Ok(()),
                Some(Err(PassError::Queue(error @ QueueError::OtherLedger { .. }))) => {
                    return Err(error.into());
                }
                Some(Err(error)) => tracing::warn!(%error, "ledger and queue were not compared to the end"),
                None => {}
            }
            pause(look, shutdown).await;
        }
        Ok(())
    }

    /// What to do while the stamp is missing: once workers have had the time to register their leases again, dispatch
    /// everything that is missing, then stamp. `None`: that time is not over.
    async fn after_loss(
        &self,
        lost_since: &mut Option<Instant>,
        shutdown: &CancellationToken,
    ) -> Option<Result<(), PassError>> {
        let begun = if let Some(begun) = *lost_since {
            begun
        } else {
            let first = self.postgres.unfinished(Uuid::nil(), PAGE, Duration::ZERO);
            match within(self.postgres.call_timeout(), first).await {
                // Nothing can be missing: a new prefix.
                Ok(page) if page.settled.is_empty() && page.next.is_none() => {
                    return Some(self.stamp().await);
                }
                Ok(_) => {}
                Err(error) => return Some(Err(error.into())),
            }
            let wait = self.settings.heartbeat;
            tracing::warn!(
                ?wait,
                "the prefix is not stamped, so it is new or Redis has lost its data: dispatching what is missing after a wait"
            );
            *lost_since.insert(Instant::now())
        };
        if begun.elapsed() < self.settings.heartbeat {
            return None;
        }
        let result = match self.pass(Duration::ZERO, shutdown).await {
            Ok(()) => self.stamp().await,
            Err(error) => Err(error),
        };
        if result.is_ok() {
            *lost_since = None;
        }
        Some(result)
    }

    async fn stamp(&self) -> Result<(), PassError> {
        Ok(self.queue.stamp(self.ledger).await?)
    }

    /// Compares all unfinished jobs, but those changed within `grace`.
    async fn pass(&self, grace: Duration, shutdown: &CancellationToken) -> Result<(), PassError> {
        let limit = self.postgres.call_timeout() * 2;
        let (mut after, mut compared, mut redispatched) = (Uuid::nil(), 0_usize, 0_usize);
        loop {
            let page = within(limit, self.postgres.unfinished(after, PAGE, grace)).await?;
            let pushed = self.compare(&page.settled).await?;
            compared += page.settled.len();
            redispatched += pushed;
            let Some(next) = page.next else { break };
            after = next;
            let pace =
                per(PAGE as usize, COMPARED_PER_SECOND).max(per(pushed, self.settings.redispatch_per_second));
            if !pause(pace, shutdown).await {
                return Err(PassError::Stopping);
            }
        }
        if redispatched > 0 {
            tracing::warn!(compared, redispatched, "dispatched unfinished jobs that the queue did not know");
        }
        Ok(())
    }

    /// Dispatches what Redis doesn't know of a page, and has the relay bring forward what sleeps there although it is due: it was
    /// woken, and Redis lost that. Returns how many it dispatched.
    async fn compare(&self, page: &[Envelope]) -> Result<usize, PassError> {
        let names: Vec<(QueueName, JobId)> = page.iter().map(|job| (job.queue.clone(), job.id)).collect();
        let (missing, scheduled) = self.queue.missing_and_scheduled(&names).await?;
        let scheduled: HashSet<JobId> = scheduled.into_iter().collect();
        let is_due = |job: &&Envelope| job.run_at_ms.is_none() && scheduled.contains(&job.id);
        let due: Vec<_> = page.iter().filter(is_due).map(|job| (job.queue.clone(), job.id)).collect();
        // Few, and some of them may run under a lease that was registered again.
        let places = self.queue.places(&due).await?;
        let sleeps = |place: &Option<Place>| *place == Some(Place::Scheduled);
        let asleep: Vec<JobId> =
            due.iter().zip(&places).filter(|(_, place)| sleeps(place)).map(|((_, id), _)| *id).collect();
        if !asleep.is_empty() {
            let woken = self.postgres.wake_overdue(&asleep, self.settings.grace);
            let woken = within(self.postgres.call_timeout(), woken).await?;
            if woken > 0 {
                tracing::warn!(woken, "jobs slept in the queue that were due: the relay brings them forward");
            }
        }
        let missing: HashSet<JobId> = missing.into_iter().collect();
        let again: Vec<Envelope> = page.iter().filter(|job| missing.contains(&job.id)).cloned().collect();
        if again.is_empty() {
            return Ok(0);
        }
        let pushed = self.queue.push_accepted(&again).await?;
        let took = pushed.iter().filter(|pushed| **pushed == Pushed::Queued).count();
        metrics::counter!("reconciler_redispatched_total").increment(took as u64);
        let full: Vec<JobId> = again
            .iter()
            .zip(&pushed)
            .filter(|(_, pushed)| **pushed == Pushed::Full)
            .map(|(job, _)| job.id)
            .collect();
        if !full.is_empty() {
            // The relay has them when the window opens.
            within(self.postgres.call_timeout(), self.postgres.leave_to_relay(&full)).await?;
        }
        Ok(took)
    }
}

fn per(count: usize, second: u32) -> Duration {
    Duration::from_secs_f64(count as f64 / f64::from(second.max(1)))
}
