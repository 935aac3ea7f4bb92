//! Jobs with `durability=fast` that no worker has claimed yet: only Redis knows them.

use std::collections::{BTreeMap, HashMap};

use queue::{Envelope, JobId, Listed, Queue, QueueError, QueueName};
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

    /// Brings into the ledger all jobs of a selection's queue, tenant and kind that so far only Redis knows, however many, so that
    /// those who choose jobs there find them, too. They stay where they wait. Without a queue all are looked at that somebody
    /// served or pushed to within a week. Fails if Redis can't be asked; what was found until then is in the ledger.
    pub async fn settle_all_fast(&self, which: &Selection) -> Result<(), StoreError> {
        self.each_fast(which, async |jobs| self.bring_in(jobs).await).await
    }

    /// How many fast jobs only Redis has, by the key that they are sealed with, if any; without those of queues that nobody served
    /// or pushed to within a week. Fails if Redis can't be asked.
    pub async fn fast_by_key(&self) -> Result<BTreeMap<Option<String>, u64>, StoreError> {
        let mut counts = BTreeMap::new();
        let postgres = self.postgres();
        self.each_fast(&Selection::default(), async |jobs| {
            let ids: Vec<JobId> = jobs.iter().map(|job| job.id).collect();
            let known = within(postgres.call_timeout(), postgres.known_jobs(&ids)).await?;
            for job in jobs.into_iter().filter(|job| !known.contains(&job.id)) {
                *counts.entry(job.sealed.map(|sealed| sealed.key_id)).or_default() += 1;
            }
            Ok(())
        })
        .await?;
        Ok(counts)
    }

    /// Hands out, in pages, the fast jobs of a selection's queue, tenant and kind that Redis has.
    async fn each_fast(
        &self,
        which: &Selection,
        mut handle: impl AsyncFnMut(Vec<NewJob>) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let queue = self.queue_that_may_have_it()?;
        let meant = |envelope: &Envelope| {
            which.tenant.as_deref().is_none_or(|tenant| tenant == envelope.tenant.as_str())
                && which.kind.as_deref().is_none_or(|kind| kind == envelope.kind)
        };
        let names = match which.queue.as_deref().map(QueueName::new) {
            Some(Ok(name)) => vec![name],
            // No queue is called so.
            Some(Err(_)) => vec![],
            None => {
                let known = queue.queues().await;
                self.learn(&known);
                known.map_err(away)?
            }
        };
        for name in names {
            for partition in 0..queue.config().partitions {
                let mut further = Some(0);
                while let Some(from) = further {
                    let page = queue.scan(&name, partition, from).await;
                    self.learn(&page);
                    let found;
                    (found, further) = page.map_err(away)?;
                    let jobs: Vec<NewJob> = found.into_iter().filter(meant).filter_map(fast_job).collect();
                    if !jobs.is_empty() {
                        handle(jobs).await?;
                    }
                }
            }
        }
        Ok(())
    }

    fn queue_that_may_have_it(&self) -> Result<&Queue, StoreError> {
        match (self.open_queue(), self.queue()) {
            (Some(queue), _) => Ok(queue),
            (None, Some(_)) => Err(away(
                "the queue's Redis failed just now, and may have fast jobs that the ledger doesn't know",
            )),
            (None, None) => Err(away(
                "the queue's Redis can't be reached, and may have fast jobs that the ledger doesn't know",
            )),
        }
    }

    /// What the ledger refuses leaves Redis, as if a worker had come to it: nobody would find it, and it might run once its key is
    /// free.
    async fn bring_in(&self, jobs: Vec<NewJob>) -> Result<(), StoreError> {
        let postgres = self.postgres();
        let queues: HashMap<JobId, QueueName> = jobs.iter().map(|job| (job.id, job.queue.clone())).collect();
        let refused = within(postgres.call_timeout() * 2, postgres.admit_fast(jobs)).await?;
        let places: Vec<_> = refused.iter().map(|id| (queues[id].clone(), *id)).collect();
        if !places.is_empty() {
            self.queue_that_may_have_it()?.forget(&places).await.map_err(away)?;
        }
        Ok(())
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
