//! Jobs with `durability=fast` that no worker has claimed yet: only Redis knows them.

use queue::{JobId, Listed, Queue, QueueError};
use sagas::{StoreError, stores::postgres::accept::NewJob};

use crate::{Client, pacing::within};

impl Client {
    /// Brings a job into the ledger that so far only Redis knows, so that it is seen, cancelled and changed as any other. It stays
    /// where it waits. `false`: Redis has no such job of `tenant` either, or can't be asked.
    pub async fn settle_fast(&self, id: JobId, tenant: Option<&str>) -> Result<bool, StoreError> {
        let Some(queue) = self.open_queue() else { return Ok(false) };
        let found = find(queue, id).await;
        self.learn(&found);
        let envelope = match found {
            Ok(Some(listed)) => listed.envelope,
            Ok(None) => return Ok(false),
            Err(error) => {
                tracing::warn!(%error, job = %id, "the queue can't be asked for a job that the ledger doesn't know");
                return Ok(false);
            }
        };
        if tenant.is_some_and(|tenant| tenant != envelope.tenant.as_str()) {
            return Ok(false);
        }
        let Some(record) = envelope.fast else { return Ok(false) };
        let job: NewJob = match serde_json::from_value(record) {
            Ok(job) => job,
            Err(error) => {
                tracing::warn!(job = %id, %error, "the record of a fast job can't be read");
                return Ok(false);
            }
        };
        let postgres = self.postgres();
        within(postgres.call_timeout() * 2, postgres.admit_fast(&[job])).await?;
        Ok(true)
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
