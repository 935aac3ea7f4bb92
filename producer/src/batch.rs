//! Batches from a program: jobs that are counted together, with a job that is enqueued once they have ended.

use queue::{JobId, TenantId};
use sagas::{
    StoreError, kinds,
    stores::postgres::{
        accept::NewJob,
        batches::{BatchId, BatchView, Callback, CallbackOn, Changed, Created, NewBatch},
    },
};
use tokio::time::Instant;
use uuid::Uuid;

use crate::{
    acceptance::may_have_committed,
    checks::{check, check_word},
    client::{Client, Durability, Receipt, receipt},
    collector::cancel_page,
    error::{EnqueueError, refused},
    pacing::{Growing, within},
};

/// Pages of members that a cancel goes through itself before it leaves the rest to the collector.
const PAGES: usize = 10;

/// What became of a batch and the jobs that came with it.
#[derive(Debug, Clone)]
pub struct BatchReceipt {
    /// The batch.
    pub id: BatchId,
    /// The id that the callback's job will have; of a batch that was there before, that of its own callback.
    pub callback: Option<JobId>,
    /// What became of each job, in their order.
    pub jobs: Vec<Result<Receipt, EnqueueError>>,
}

/// Describes a batch; [`open`](Self::open) or [`seal`](Self::seal) make it.
///
/// ```no_run
/// # async fn example(client: producer::Client, pages: Vec<producer::NewJob>, report: producer::NewJob)
/// # -> Result<(), producer::EnqueueError> {
/// let tenant = queue::TenantId::new("acme").expect("a name");
/// let batch = client.batch(tenant, "import of May").add(pages).on_success(report).seal().await?;
/// println!("{}; then job {:?} runs", batch.id, batch.callback);
/// # Ok(()) }
/// ```
#[must_use]
#[derive(Debug, Clone)]
pub struct BatchBuilder {
    client: Client,
    batch: NewBatch,
    jobs: Vec<NewJob>,
}

/// A batch that takes members. Dropping the handle changes nothing: the batch stays open until it is sealed.
#[derive(Debug, Clone)]
pub struct OpenBatch {
    client: Client,
    /// The batch.
    pub id: BatchId,
    /// The id that the callback's job will have.
    pub callback: Option<JobId>,
    /// What became of the jobs that came with it.
    pub jobs: Vec<Result<Receipt, EnqueueError>>,
}

impl BatchBuilder {
    pub(crate) fn new(client: Client, tenant: TenantId, name: String) -> Self {
        let batch = NewBatch { id: BatchId::new(), tenant, name, parent: None, callback: None };
        Self { client, batch, jobs: vec![] }
    }

    /// Gives the batch an id of the caller's own, so that a call that is made again makes the same batch.
    pub fn id(mut self, id: BatchId) -> Self {
        self.batch.id = id;
        self
    }

    /// The unfinished job whose work this is. If it is a member of a batch, this batch counts there as one more member.
    pub fn parent(mut self, job: JobId) -> Self {
        self.batch.parent = Some(job);
        self
    }

    /// Adds jobs of the batch's tenant.
    #[allow(clippy::should_implement_trait)] // it takes jobs, not another builder
    pub fn add(mut self, jobs: impl IntoIterator<Item = NewJob>) -> Self {
        self.jobs.extend(jobs);
        self
    }

    /// The job to enqueue, once, when all members have ended, however they did.
    pub fn on_complete(self, job: NewJob) -> Self {
        self.callback(CallbackOn::Complete, job)
    }

    /// The job to enqueue, once, when all members have succeeded.
    pub fn on_success(self, job: NewJob) -> Self {
        self.callback(CallbackOn::Success, job)
    }

    /// The job to enqueue, and when. A later call replaces an earlier one: a batch has one callback.
    pub fn callback(mut self, on: CallbackOn, job: NewJob) -> Self {
        self.batch.callback = Some(Callback { on, job });
        self
    }

    /// Makes the batch with the jobs so far, at most as many as one batch of jobs may have, and keeps it open.
    pub async fn open(self) -> Result<OpenBatch, EnqueueError> {
        let client = self.client.clone();
        let made = client.make_batch(self.batch, self.jobs, false).await?;
        Ok(OpenBatch { client, id: made.id, callback: made.callback, jobs: made.jobs })
    }

    /// Makes the batch and seals it. With up to as many jobs as one call may bring, this is one transaction; more are
    /// added page by page, and the batch is sealed after the last.
    pub async fn seal(mut self) -> Result<BatchReceipt, EnqueueError> {
        let most = self.client.settings().max_batch;
        if self.jobs.len() <= most {
            return self.client.make_batch(self.batch, self.jobs, true).await;
        }
        let rest = self.jobs.split_off(most);
        let mut open = self.open().await?;
        for page in rest.chunks(most) {
            let more = open.add(page.to_vec()).await?;
            open.jobs.extend(more);
        }
        open.seal().await?;
        Ok(BatchReceipt { id: open.id, callback: open.callback, jobs: open.jobs })
    }
}

impl OpenBatch {
    /// Adds jobs; answers in their order.
    pub async fn add(&self, jobs: Vec<NewJob>) -> Result<Vec<Result<Receipt, EnqueueError>>, EnqueueError> {
        let jobs = jobs.into_iter().map(|job| NewJob { batch: Some(self.id), ..job }).collect();
        self.client.enqueue_many(jobs, Durability::Durable).await
    }

    /// Seals the batch: it takes no more jobs, and completes once all have ended.
    pub async fn seal(&self) -> Result<(), EnqueueError> {
        match self.client.seal_batch(self.id, None).await {
            Ok(Changed::Done | Changed::Finished) => Ok(()),
            Ok(Changed::Unknown) => Err(EnqueueError::UnknownBatch { batch: self.id }),
            Err(error) => Err(refused(&error, self.client.settings().retry_after)),
        }
    }
}

impl Client {
    /// Begins to describe a batch.
    pub fn batch(&self, tenant: TenantId, name: impl Into<String>) -> BatchBuilder {
        BatchBuilder::new(self.clone(), tenant, name.into())
    }

    /// Seals a batch, of `tenant` if given.
    pub async fn seal_batch(&self, id: BatchId, tenant: Option<&str>) -> Result<Changed, StoreError> {
        let postgres = self.postgres();
        within(postgres.call_timeout() * 2, postgres.seal_batch(id, tenant)).await
    }

    /// A batch with its counts, of `tenant` if given.
    pub async fn batch_state(
        &self,
        id: BatchId,
        tenant: Option<&str>,
    ) -> Result<Option<BatchView>, StoreError> {
        let postgres = self.postgres();
        within(postgres.call_timeout(), postgres.batch(id, tenant)).await
    }

    /// Cancels a batch, of `tenant` if given: from the answer on it takes no more members, and each unfinished one is
    /// cancelled as a single job would be (PROTOCOL.md 14). Members beyond the first 2,000 are left to the collector.
    pub async fn cancel_batch(&self, id: BatchId, tenant: Option<&str>) -> Result<Changed, StoreError> {
        let postgres = self.postgres();
        let changed = within(postgres.call_timeout() * 2, postgres.cancel_batch(id, tenant)).await?;
        if changed == Changed::Done {
            let mut after = Uuid::nil();
            for _ in 0..PAGES {
                // Committed above: whatever fails here is done by the collector.
                match cancel_page(postgres, self.open_queue(), id, after).await {
                    Ok(page) => match page.last {
                        Some(last) => after = last,
                        None => break,
                    },
                    Err(error) => {
                        tracing::warn!(%error, batch = %id, "the collector goes on with this cancel");
                        break;
                    }
                }
            }
        }
        Ok(changed)
    }

    /// Checks and makes a batch in one transaction.
    pub(crate) async fn make_batch(
        &self,
        mut batch: NewBatch,
        jobs: Vec<NewJob>,
        seal: bool,
    ) -> Result<BatchReceipt, EnqueueError> {
        let settings = self.settings();
        check_word("name", &batch.name, 256)?;
        if jobs.len() > settings.max_batch {
            return bad(format!(
                "the batch has {} jobs: at most {} are allowed",
                jobs.len(),
                settings.max_batch
            ));
        }
        if let Some(callback) = &mut batch.callback {
            check(&mut callback.job, settings)?;
            if callback.job.tenant != batch.tenant {
                return bad("callback: is a job of another tenant".to_owned());
            }
            if matches!(
                callback.job.kind.as_str(),
                kinds::ingest::KIND | kinds::embed::KIND | kinds::delete::KIND
            ) {
                return bad(
                    "callback: its payload gets a field `batch`, which ingest, embed and delete don't take; use a kind of your own"
                        .to_owned(),
                );
            }
        }
        let (mut outcomes, mut good, mut bytes) = (Vec::with_capacity(jobs.len()), vec![], 0_usize);
        for mut job in jobs {
            let checked = match check(&mut job, settings) {
                Ok(_) if job.tenant != batch.tenant => {
                    bad("the job is another tenant's than its batch".to_owned())
                }
                Ok(size) => self.admit(&job, Durability::Durable).await.map(|()| size),
                Err(error) => Err(error),
            };
            match checked {
                Ok(size) => {
                    bytes = bytes.saturating_add(size);
                    outcomes.push(None);
                    good.push(job);
                }
                Err(error @ EnqueueError::Unavailable { .. }) => return Err(error),
                Err(error) => outcomes.push(Some(Err(error))),
            }
        }
        if bytes > settings.max_batch_bytes {
            return Err(EnqueueError::TooLarge { size: bytes, limit: settings.max_batch_bytes });
        }
        let id = batch.id;
        let this = self.clone();
        let task = tokio::spawn(async move { this.settle_batch(batch, good, seal).await });
        let (accepted, callback) = task
            .await
            .map_err(|error| EnqueueError::Ledger { message: format!("the acceptance ended: {error}") })??;
        let mut accepted = accepted.into_iter();
        let jobs = outcomes
            .into_iter()
            .map(|refused| refused.or_else(|| accepted.next()).unwrap_or_else(|| Err(self.unavailable())))
            .collect();
        Ok(BatchReceipt { id, callback, jobs })
    }

    /// Asks again, with the same ids, until the ledger says what became of the batch (PROTOCOL.md 20): of its jobs, and which
    /// callback it has.
    async fn settle_batch(
        &self,
        batch: NewBatch,
        jobs: Vec<NewJob>,
        seal: bool,
    ) -> Result<(Vec<Result<Receipt, EnqueueError>>, Option<JobId>), EnqueueError> {
        let (settings, postgres) = (self.settings(), self.postgres());
        let deadline = Instant::now() + settings.settle_within;
        let mut pauses =
            Growing::new(std::time::Duration::from_millis(20), std::time::Duration::from_millis(500));
        loop {
            // Left to the relay: it dispatches many jobs at once as well as this process would.
            let made =
                within(settings.accept_within, postgres.create_batch(&batch, &jobs, seal, false)).await;
            match made {
                Ok(Created::Batch { jobs: replies, callback }) => {
                    let receipts = jobs.iter().zip(replies).map(|(job, reply)| receipt(job, reply));
                    return Ok((receipts.collect(), callback));
                }
                Ok(Created::UnknownTenant) => return Err(EnqueueError::UnknownTenant),
                Ok(Created::Taken) => return Err(EnqueueError::UnknownBatch { batch: batch.id }),
                Ok(Created::NoParent(job)) => {
                    return bad(format!("parent: {job} is no unfinished job of this tenant"));
                }
                Err(error) if !may_have_committed(&error) => {
                    return Err(refused(&error, settings.retry_after));
                }
                Err(error) => {
                    let pause = pauses.next();
                    if Instant::now() + pause >= deadline {
                        tracing::warn!(%error, batch = %batch.id, "it is not known whether the batch was made");
                        return Err(self.unavailable());
                    }
                    tokio::time::sleep(pause).await;
                }
            }
        }
    }
}

fn bad<T>(message: String) -> Result<T, EnqueueError> {
    Err(EnqueueError::BadRequest { message })
}
