//! Jobs with `durability=fast` that no worker has claimed yet: only Redis knows them.

use queue::{JobId, Listed, Queue, QueueError};
use sagas::{Class, Dependency, StoreError, stores::postgres::accept::NewJob};

use crate::{Client, pacing::within};

impl Client {
    /// Brings a job into the ledger that so far only Redis knows, so that it is seen, cancelled and changed as any other. It stays
    /// where it waits. `false`: Redis has no such job of `tenant` either, or this client has no Redis.
    pub async fn settle_fast(&self, id: JobId, tenant: Option<&str>) -> Result<bool, StoreError> {
        let away = |why: String| StoreError::new(Dependency::Other("queue"), Class::Unavailable, why);
        if self.queue().is_none() {
            return Ok(false);
        }
        let Some(queue) = self.open_queue() else {
            return Err(away("the queue's Redis failed just now, and may have the job".to_owned()));
        };
        let found = find(queue, id).await;
        self.learn(&found);
        let envelope = match found {
            Ok(Some(listed)) => listed.envelope,
            Ok(None) => return Ok(false),
            Err(error) => return Err(away(error.to_string())),
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
        within(postgres.call_timeout() * 2, postgres.admit_fast(vec![job])).await?;
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
