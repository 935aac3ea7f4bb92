//! Jobs with `durability=fast` that no worker has claimed yet: only Redis knows them.

use queue::{Envelope, JobId, Listed, Queue, QueueError, QueueName, ScanCursor};
use sagas::{
    Class, Dependency, StoreError,
    stores::postgres::{accept::NewJob, control::Selection},
};

use crate::{Client, pacing::within};

impl Client {
    /// Brings a job into the ledger that so far only Redis knows, so that it is seen, cancelled and changed as any other. It stays
    /// where it waits. `false`: Redis has no such job of `tenant` either, or this client has no Redis.
    pub async fn settle_fast(&self, id: JobId, tenant: Option<&str>) -> Result<bool, StoreError> {
        if self.queue().is_none() {
            return Ok(false);
        }
        let found = find(self.queue_that_may_have_it()?, id).await;
        self.learn(&found);
        let Some(Listed { envelope, .. }) = found.map_err(away)? else { return Ok(false) };
        if tenant.is_some_and(|tenant| tenant != envelope.tenant.as_str()) {
            return Ok(false);
        }
        let Some(job) = fast_job(envelope) else { return Ok(false) };
        self.bring_in(vec![job]).await?;
        Ok(true)
    }

    /// Brings into the ledger all jobs of a selection's queue, tenant and kind that so far only Redis knows, so that those who choose
    /// jobs there find them, too. They stay where they wait. Fails if Redis can't be asked; what was found until then is in the
    /// ledger.
    pub async fn settle_all_fast(&self, which: &Selection) -> Result<(), StoreError> {
        let queue = self.queue_that_may_have_it()?;
        let meant = |envelope: &Envelope| {
            which.tenant.as_deref().is_none_or(|tenant| tenant == envelope.tenant.as_str())
                && which.kind.as_deref().is_none_or(|kind| kind == envelope.kind)
        };
        let names = match which.queue.as_deref().map(QueueName::new) {
            Some(Ok(name)) => vec![name],
            // No queue is called so.
            Some(Err(_)) => vec![],
            None => queue.queues().await.map_err(away)?,
        };
        for name in names {
            let mut further = Some(ScanCursor::default());
            while let Some(place) = further {
                let page = queue.scan(&name, place).await;
                self.learn(&page);
                let found;
                (found, further) = page.map_err(away)?;
                let jobs: Vec<NewJob> = found.into_iter().filter(meant).filter_map(fast_job).collect();
                if !jobs.is_empty() {
                    self.bring_in(jobs).await?;
                }
            }
        }
        Ok(())
    }

    fn queue_that_may_have_it(&self) -> Result<&Queue, StoreError> {
        match (self.open_queue(), self.queue()) {
            (Some(queue), _) => Ok(queue),
            (None, Some(_)) => Err(away("the queue's Redis failed just now, and may have the job")),
            (None, None) => Err(away("the queue's Redis can't be reached, and may have the job")),
        }
    }

    async fn bring_in(&self, jobs: Vec<NewJob>) -> Result<(), StoreError> {
        let postgres = self.postgres();
        within(postgres.call_timeout() * 2, postgres.admit_fast(jobs)).await
    }
}

fn away(why: impl ToString) -> StoreError {
    StoreError::new(Dependency::Other("queue"), Class::Unavailable, why.to_string())
}

/// What the ledger will know of a job, if it is fast.
fn fast_job(envelope: Envelope) -> Option<NewJob> {
    match serde_json::from_value(envelope.fast?) {
        Ok(job) => Some(job),
        Err(error) => {
            tracing::warn!(job = %envelope.id, %error, "the record of a fast job can't be read");
            None
        }
    }
}

/// A job in whichever queue it is.
async fn find(queue: &Queue, id: JobId) -> Result<Option<Listed>, QueueError> {
    for name in queue.queues().await? {
        if let Some(found) = queue.find(&name, id).await? {
            return Ok(Some(found));
        }
    }
    Ok(None)
}
