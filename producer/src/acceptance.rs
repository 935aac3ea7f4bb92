//! Bringing jobs into the ledger: shared transactions, and what to do when a commit's reply is lost (PROTOCOL.md 20).

use std::sync::Arc;

use async_trait::async_trait;
use queue::JobId;
use sagas::{
    Class, Dependency, StoreError,
    coalescing::Batch,
    stores::postgres::{
        Postgres,
        accept::{Accepted, NewJob},
    },
};
use tokio::time::Instant;

use crate::{
    dispatch::Dispatch,
    error::{EnqueueError, refused},
    pacing::Growing,
    settings::ClientSettings,
};

/// How one attempt failed.
#[derive(Debug, Clone)]
pub(crate) enum Failure {
    /// No connection was had: nothing was accepted.
    NotBegun,
    /// The transaction failed somewhere; unless the error says so, it may have been committed.
    Begun(StoreError),
}

/// Accepts jobs and dispatches them. Clones share everything.
#[derive(Clone)]
pub(crate) struct Acceptor {
    pub postgres: Postgres,
    pub dispatch: Dispatch,
    pub settings: Arc<ClientSettings>,
}

impl Acceptor {
    /// One transaction for all jobs, then one push. With `push`, Redis gets them at once if it is there.
    async fn attempt(&self, jobs: &[NewJob]) -> Result<Vec<Accepted>, Failure> {
        // What fails here has begun nothing, so that callers get a prompt and certain answer while the ledger is down.
        let reached = tokio::time::timeout(self.settings.connect_within, self.postgres.reach()).await;
        let connection = match reached {
            Ok(Ok(connection)) => connection,
            Ok(Err(error)) => {
                tracing::warn!(%error, "the ledger can't be reached");
                return Err(Failure::NotBegun);
            }
            Err(_) => {
                tracing::warn!(within = ?self.settings.connect_within, "no connection to the ledger in time");
                return Err(Failure::NotBegun);
            }
        };
        let queue = self.dispatch.open();
        let accepted =
            self.postgres.accept_on(connection, jobs, queue.is_some()).await.map_err(Failure::Begun)?;
        if let Some(queue) = queue {
            self.dispatch.dispatch(queue, &new_ones(jobs, &accepted)).await;
        }
        Ok(accepted)
    }

    /// Accepts jobs in one transaction. If only one job's data is refused, the others are accepted all the same.
    pub async fn accept_all(
        &self,
        jobs: &[NewJob],
    ) -> Result<Vec<Result<Accepted, EnqueueError>>, EnqueueError> {
        let mut outcomes = Vec::with_capacity(jobs.len());
        // The later half goes below the earlier one: jobs on one document keep their order.
        let mut work = vec![jobs];
        while let Some(part) = work.pop() {
            let accepted = match tokio::time::timeout(self.settings.accept_within, self.attempt(part)).await {
                Ok(Err(Failure::NotBegun)) if outcomes.is_empty() => return Err(self.unavailable()),
                Ok(Err(Failure::NotBegun)) => Err(self.unavailable()),
                Ok(Err(Failure::Begun(error))) if !may_have_committed(&error) => {
                    if error.class == Class::Data && part.len() > 1 {
                        let (first, second) = part.split_at(part.len() / 2);
                        work.extend([second, first]);
                        continue;
                    }
                    Err(refused(&error, self.settings.retry_after))
                }
                Ok(Ok(accepted)) => Ok(accepted),
                Ok(Err(Failure::Begun(_))) | Err(_) => self.settle(part).await,
            };
            match accepted {
                Ok(accepted) => outcomes.extend(accepted.into_iter().map(Ok)),
                Err(error) => outcomes.extend(part.iter().map(|_| Err(error.clone()))),
            }
        }
        Ok(outcomes)
    }

    /// Asks again, with the same ids, until the ledger says what became of the jobs: acceptance is idempotent by id.
    pub async fn settle(&self, jobs: &[NewJob]) -> Result<Vec<Accepted>, EnqueueError> {
        let deadline = Instant::now() + self.settings.settle_within;
        let first = jobs.first().map_or_else(JobId::new, |job| job.id);
        let unknown = || EnqueueError::OutcomeUnknown { job: first, retry_after: self.settings.retry_after };
        let mut pauses =
            Growing::new(std::time::Duration::from_millis(20), std::time::Duration::from_millis(500));
        let mut refusals = 0;
        loop {
            match tokio::time::timeout_at(deadline, self.attempt(jobs)).await {
                Ok(Ok(accepted)) => {
                    // The lost transaction may have promised a push that never came.
                    if self.dispatch.open().is_none() {
                        let new: Vec<JobId> = new_ones(jobs, &accepted).iter().map(|job| job.id).collect();
                        self.dispatch.leave_to_relay(&new).await;
                    }
                    return Ok(accepted);
                }
                // The lost transaction may still have been on its way when this one looked, and have won the race for
                // the ids; the next look sees it.
                Ok(Err(Failure::Begun(error))) if !may_have_committed(&error) => {
                    refusals += 1;
                    if refusals > 2 {
                        return Err(refused(&error, self.settings.retry_after));
                    }
                }
                Ok(Err(_)) => {}
                Err(_) => return Err(unknown()),
            }
            let pause = pauses.next();
            if Instant::now() + pause >= deadline {
                return Err(unknown());
            }
            tokio::time::sleep(pause).await;
        }
    }

    pub fn unavailable(&self) -> EnqueueError {
        EnqueueError::Unavailable { retry_after: self.settings.retry_after }
    }
}

fn new_ones<'a>(jobs: &'a [NewJob], accepted: &[Accepted]) -> Vec<&'a NewJob> {
    jobs.iter()
        .zip(accepted)
        .filter(|(job, reply)| **reply == Accepted::New(job.id))
        .map(|(job, _)| job)
        .collect()
}

/// Whether a transaction that failed with this error may be in the ledger. A server that answers with an error has
/// rolled back.
pub(crate) fn may_have_committed(error: &StoreError) -> bool {
    !matches!(error.class, Class::Data | Class::Permanent)
}

/// Joins concurrent single enqueues into one transaction.
pub(crate) struct AcceptBatch(pub Acceptor);

#[async_trait]
impl Batch for AcceptBatch {
    type Item = Arc<NewJob>;
    /// `None`: nothing was begun, because the ledger can't be reached.
    type Reply = Option<Accepted>;
    const OP: &'static str = "accept";
    const DEPENDENCY: Dependency = Dependency::Postgres;
    /// Callers ask the ledger themselves what became of their job: a second flush that finds no connection would say that
    /// nothing was begun.
    const AGAIN: bool = false;

    async fn flush(&self, items: &[Self::Item]) -> Result<Vec<Self::Reply>, StoreError> {
        let jobs: Vec<NewJob> = items.iter().map(|job| NewJob::clone(job)).collect();
        match self.0.attempt(&jobs).await {
            Ok(accepted) => Ok(accepted.into_iter().map(Some).collect()),
            Err(Failure::NotBegun) => Ok(vec![None; items.len()]),
            Err(Failure::Begun(error)) => Err(error),
        }
    }
}
