//! How a step waits without holding a slot: for a time, for a signal, for child jobs. Each ends the delivery by
//! [`StepError::Snooze`] until it is over; the step is then executed again from its beginning and gets the answer.

use std::time::Duration;

use chrono::{DateTime, Utc};
use queue::{JobId, Priority, QueueName, TenantId};
use serde::de::DeserializeOwned;
use serde_json::Value;
use uuid::Uuid;

use super::{LONGEST_WAIT, StepContext};
use crate::{
    error::{Dependency, StepError},
    kinds,
    stores::postgres::{
        accept::NewJob,
        batches::{BatchId, NewBatch},
        take::UNREADABLE_FOR,
        waits::{Awaited, ChildEnd, Due},
    },
};

/// Children of one call at most: their results come back together.
pub const MAX_CHILDREN: usize = 1000;

/// A job that a saga enqueues and waits for. It belongs to the parent's tenant.
#[derive(Debug, Clone)]
pub struct Child {
    /// What to do.
    pub kind: String,
    /// The request, a JSON object.
    pub payload: Value,
    /// Where it waits; its kind's own queue if absent.
    pub queue: Option<QueueName>,
    /// 9 first; the parent's if absent.
    pub priority: Option<Priority>,
    /// Charged failures before it is dead.
    pub max_attempts: i32,
    /// Hard cap on one run.
    pub timeout: Duration,
}

impl Child {
    /// A child with the defaults: its kind's queue, the parent's priority, 5 attempts, 5 minutes.
    pub fn new(kind: impl Into<String>, payload: Value) -> Self {
        Self {
            kind: kind.into(),
            payload,
            queue: None,
            priority: None,
            max_attempts: 5,
            timeout: Duration::from_secs(300),
        }
    }
}

impl StepContext {
    /// Sleeps for so long without holding a slot. The time is fixed by the first delivery that gets here and counted by
    /// Postgres' clock: no crash and no redelivery prolongs it, and once it is over the call returns at once. `name` tells
    /// this wait of the run from its others. The log must have the run: not in a step that [begins](super::Commits::Begin) it.
    pub async fn sleep(&self, name: &str, time: Duration) -> Result<(), StepError> {
        self.timer(name, Due::In(time)).await
    }

    /// Sleeps until then; see [`sleep`](Self::sleep).
    pub async fn sleep_until(&self, name: &str, at: DateTime<Utc>) -> Result<(), StepError> {
        self.timer(name, Due::At(at)).await
    }

    async fn timer(&self, name: &str, due: Due) -> Result<(), StepError> {
        check_name(name)?;
        let run = self.run();
        match self.call(Dependency::Postgres, |_| self.postgres.await_timer(&run, name, due)).await? {
            Awaited::Here(()) => Ok(()),
            other => Err(self.not_yet(other).await),
        }
    }

    /// Waits for the signal `name` without holding a slot, at most this long: `None` when that time is over. A signal that was
    /// sent before is there at once. Which of the two it was is decided once for the run, whoever executes the step again.
    /// Signals are sent to jobs: another run of the job, after a failure, finds the same ones.
    ///
    /// A payload of another shape than `T` fails the step for good, with the code `bad_signal`.
    pub async fn signal<T: DeserializeOwned>(
        &self,
        name: &str,
        within: Duration,
    ) -> Result<Option<T>, StepError> {
        check_name(name)?;
        let run = self.run();
        let answer =
            self.call(Dependency::Postgres, |_| self.postgres.await_signal(&run, name, within)).await?;
        match answer {
            Awaited::Here(payload) => serde_json::from_value(payload)
                .map(Some)
                .map_err(|error| StepError::permanent("bad_signal", format!("signal {name:?}: {error}"))),
            Awaited::TimedOut => Ok(None),
            other => Err(self.not_yet(other).await),
        }
    }

    /// Enqueues child jobs, exactly once however often the step is executed, and waits without holding a slot until all
    /// have ended, however they did. Returns how, in the order of `children`. At most 1,000; what a later delivery gives
    /// for the same `name` is not looked at.
    ///
    /// Undoing them is up to the step: [`cancel_children`](Self::cancel_children) ends those that have not ended.
    pub async fn children(&self, name: &str, children: &[Child]) -> Result<Vec<ChildEnd>, StepError> {
        check_name(name)?;
        if children.len() > MAX_CHILDREN {
            let message = format!("{} children for {name:?}: at most {MAX_CHILDREN}", children.len());
            return Err(StepError::permanent("too_many_children", message));
        }
        let odd = |e: &dyn std::fmt::Display| StepError::permanent("bad_child", e.to_string());
        let tenant = TenantId::new(self.job.tenant.clone()).map_err(|e| odd(&e))?;
        let own = Priority::try_from(i64::from(self.job.priority)).map_err(|e| odd(&e))?;
        let mut jobs = Vec::with_capacity(children.len());
        for (no, child) in children.iter().enumerate() {
            let queue = match &child.queue {
                Some(queue) => queue.clone(),
                None => QueueName::new(kinds::default_queue(&child.kind)).map_err(|e| odd(&e))?,
            };
            jobs.push(NewJob {
                id: child_id(self.saga_id, name, no),
                priority: child.priority.unwrap_or(own),
                max_attempts: child.max_attempts,
                timeout: child.timeout,
                document: kinds::document_of(&child.kind, &child.payload),
                parent: Some(self.job.id),
                ..NewJob::new(child.kind.clone(), queue, tenant.clone(), child.payload.clone())
            });
        }
        let batch = NewBatch {
            id: batch_id(self.saga_id, name),
            tenant,
            name: format!("{} of {}", name, self.job.kind),
            parent: Some(self.job.id),
            callback: None,
        };
        let run = self.run();
        let answer = self
            .call(Dependency::Postgres, |_| self.postgres.await_children(&run, name, &batch, &jobs))
            .await?;
        match answer {
            Awaited::Here(ends) => Ok(ends),
            other => Err(self.not_yet(other).await),
        }
    }

    /// Cancels those of the children that have not ended, and waits without holding a slot until all have. For compensations:
    /// it works also where none were enqueued. What a child that has succeeded did stays done.
    pub async fn cancel_children(&self, name: &str) -> Result<(), StepError> {
        check_name(name)?;
        let (run, batch) = (self.run(), batch_id(self.saga_id, name));
        let answer =
            self.call(Dependency::Postgres, |_| self.postgres.await_cancelled_children(&run, batch)).await?;
        match answer {
            Awaited::Here(()) => Ok(()),
            other => Err(self.not_yet(other).await),
        }
    }

    /// What a wait that gave no answer means for the delivery.
    async fn not_yet<T>(&self, answer: Awaited<T>) -> StepError {
        match answer {
            Awaited::NotYet(left) => StepError::Snooze(left.unwrap_or(LONGEST_WAIT)),
            // Like a payload that can't be read here, of a run that has begun: it waits for a worker with the key.
            Awaited::Unreadable(why) => {
                tracing::warn!(job = %self.job.id, why, "what a run waited for can't be read here: released uncharged");
                match self.postgres.in_time(self.postgres.note_error(self.job.id, self.fence(), &why)).await {
                    Ok(()) => StepError::Snooze(UNREADABLE_FOR),
                    Err(error) => error.into(),
                }
            }
            Awaited::NotBegun => StepError::permanent(
                "not_begun",
                "a step that begins its run's log itself can't wait: nothing could be kept of it",
            ),
            Awaited::Here(_) | Awaited::TimedOut | Awaited::LeaseLost => StepError::LeaseLost,
        }
    }
}

fn check_name(name: &str) -> Result<(), StepError> {
    if (1..=128).contains(&name.chars().count()) {
        Ok(())
    } else {
        Err(StepError::permanent("bad_name", format!("{name:?}: a wait's name has 1 to 128 characters")))
    }
}

fn batch_id(saga: Uuid, name: &str) -> BatchId {
    BatchId(Uuid::new_v5(&saga, name.as_bytes()))
}

/// The same for each delivery of the run. It has the time of the run's own id, so that it is listed near it, and the
/// child's number at its end, so that children are in order.
fn child_id(saga: Uuid, name: &str, no: usize) -> JobId {
    let mut id = *Uuid::new_v5(&saga, name.as_bytes()).as_bytes();
    id[..6].copy_from_slice(&saga.as_bytes()[..6]);
    id[6] = 0x70 | (id[6] & 0x0f);
    id[12..].copy_from_slice(&(no as u32).to_be_bytes());
    JobId(Uuid::from_bytes(id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_have_the_same_ids_each_time_and_others_in_each_run_and_in_order() {
        let (run, other) = (Uuid::now_v7(), Uuid::now_v7());
        let ids: Vec<_> = (0..300).map(|no| child_id(run, "parts", no)).collect();
        assert_eq!(ids, (0..300).map(|no| child_id(run, "parts", no)).collect::<Vec<_>>());
        assert!(ids.is_sorted());
        assert!(ids.iter().all(|id| id.0.get_version_num() == 7));
        assert_ne!(ids[0], child_id(other, "parts", 0));
        assert_ne!(ids[0], child_id(run, "wholes", 0));
        assert_ne!(batch_id(run, "parts"), batch_id(other, "parts"));
    }
}
