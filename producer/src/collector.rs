//! The collector: folds the ends of members into their batches, finishes batches, enqueues their callbacks, and goes on with
//! cancels that somebody left half done.
//!
//! Any number may run: a batch's row is locked while it is folded, and a locked one is skipped. One that dies leaves its
//! transaction undone, callback included.

use std::{collections::HashMap, time::Duration};

use queue::Queue;
use sagas::{
    StoreError,
    stores::postgres::{Postgres, batches::BatchId, collecting::CancelledPage},
};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    pacing::{Growing, pause, within},
    settings::MaintainSettings,
};

/// Batches that one round looks at.
const BATCHES: i64 = 200;
/// Members that are cancelled in one transaction.
pub(crate) const PAGE: i64 = 200;
/// How long a batch waits that could not be folded: its callback's key is missing here, say.
const PUT_OFF: Duration = Duration::from_secs(10);
/// Between two looks for members of cancelled batches.
const CANCEL_EVERY: Duration = Duration::from_secs(1);

pub(crate) struct Collector {
    postgres: Postgres,
    queue: Queue,
    settings: MaintainSettings,
    /// Until when those wait that could not be folded.
    put_off: HashMap<BatchId, Instant>,
    /// The last cancelled batch that was looked at, of more than a look takes.
    cancelled: BatchId,
}

impl Collector {
    pub fn new(postgres: Postgres, queue: Queue, settings: MaintainSettings) -> Self {
        Self { postgres, queue, settings, put_off: HashMap::new(), cancelled: BatchId(Uuid::nil()) }
    }

    /// Runs until `shutdown`.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let mut pauses = Growing::new(self.settings.collect_every, Duration::from_secs(5));
        let mut cancel_at = Instant::now();
        while !shutdown.is_cancelled() {
            let round = async {
                let more = self.fold().await?;
                if Instant::now() >= cancel_at {
                    self.cancel(&shutdown).await?;
                    cancel_at = Instant::now() + CANCEL_EVERY;
                }
                Ok::<bool, StoreError>(more)
            };
            let wait = match round.await {
                Ok(true) => continue,
                Ok(false) => {
                    pauses.reset();
                    self.settings.collect_every
                }
                Err(error) => {
                    let wait = pauses.next();
                    tracing::warn!(%error, again_in = ?wait, "batches wait to be counted");
                    wait
                }
            };
            if !pause(wait, &shutdown).await {
                return;
            }
        }
    }

    /// Folds what there is; `true` if one fold was not enough for a batch.
    async fn fold(&mut self) -> Result<bool, StoreError> {
        let limit = self.postgres.call_timeout() * 2;
        let mut more = false;
        self.put_off.retain(|_, until| *until > Instant::now());
        let but: Vec<BatchId> = self.put_off.keys().copied().collect();
        for batch in within(limit, self.postgres.batches_to_fold(BATCHES, &but)).await? {
            match within(limit, self.postgres.fold_batch(batch)).await {
                Ok(folded) => {
                    more |= folded.more;
                    if folded.finished {
                        metrics::counter!("batches_finished_total").increment(1);
                        tracing::info!(%batch, callback = ?folded.called.map(|id| id.to_string()), "batch finished");
                    }
                }
                Err(error) if error.is_unavailable() => return Err(error),
                // The next round folds it.
                Err(error) if error.conflict => more = true,
                // One batch that can't be folded must not hold up the others.
                Err(error) => {
                    tracing::warn!(%batch, %error, again_in = ?PUT_OFF, "a batch waits to be counted");
                    self.put_off.insert(batch, Instant::now() + PUT_OFF);
                }
            }
        }
        Ok(more)
    }

    async fn cancel(&mut self, shutdown: &CancellationToken) -> Result<(), StoreError> {
        let limit = self.postgres.call_timeout() * 2;
        let batches = within(limit, self.postgres.batches_to_cancel(self.cancelled, BATCHES)).await?;
        // After a page that is not full comes the first again.
        let full = i64::try_from(batches.len()).is_ok_and(|found| found >= BATCHES);
        self.cancelled = batches.last().copied().filter(|_| full).unwrap_or(BatchId(Uuid::nil()));
        for batch in batches {
            let mut after = Uuid::nil();
            while !shutdown.is_cancelled() {
                let page = cancel_page(&self.postgres, Some(&self.queue), batch, after).await?;
                let Some(last) = page.last else { break };
                after = last;
            }
        }
        Ok(())
    }
}

/// Cancels one page of members, and tells the queue where it is there.
pub(crate) async fn cancel_page(
    postgres: &Postgres,
    queue: Option<&Queue>,
    batch: BatchId,
    after: Uuid,
) -> Result<CancelledPage, StoreError> {
    let page = within(postgres.call_timeout() * 2, postgres.cancel_members(batch, after, PAGE)).await?;
    if let Some(queue) = queue
        && !page.cancelled.is_empty()
    {
        // Only to save work: the take drops what was cancelled. The relay brings forward what has effects to undo.
        if let Err(error) = queue.forget(&page.cancelled).await {
            tracing::debug!(%error, %batch, "the queue was not told of cancelled members");
        }
    }
    Ok(page)
}
