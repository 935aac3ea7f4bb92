//! The enqueue client.

use std::{collections::HashMap, sync::Arc, time::Duration};

use metrics::counter;
use queue::{JobId, Pushed, Queue, QueueError, QueueName, TenantId};
use sagas::{
    StoreError,
    coalescing::{Coalescer, Limits},
    kinds,
    stores::postgres::{
        Postgres,
        accept::{Accepted, NewJob},
        control::{Change, Changed},
        inspect::JobView,
        ledger::Cancel,
        waits::Signalled,
    },
};
use serde_json::Value;
use tokio::time::Instant;
use uuid::Uuid;

use crate::{
    acceptance::{AcceptBatch, Acceptor, may_have_committed},
    admission::Admission,
    checks::{check, check_payload, check_run_at, check_signal, check_word},
    dispatch::{Dispatch, envelope, place},
    error::{EnqueueError, WaitError, refused},
    pacing::{Growing, within},
    schedules::Schedules,
    settings::ClientSettings,
};

/// What an accepted job has survived.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Durability {
    /// The job is committed in the ledger: losing all of Redis loses nothing.
    #[default]
    Durable,
    /// The job is in Redis alone until a worker claims it, and is lost with Redis' data. Uniqueness by idempotency key is
    /// best effort: the key counts only when a worker brings the job into the ledger, so that two requests with one key
    /// may both get a receipt, of which the later job is then dropped. A job on a document (which has its place in that
    /// document's order from its acceptance on), a batch's member, one whose payload is too large for Redis, and one that comes
    /// while Redis is down are accepted as [`Durable`](Self::Durable).
    Fast,
}

/// What became of jobs that were to go into Redis alone.
enum PushedFast {
    /// Each has its answer.
    Told(Vec<Result<Receipt, EnqueueError>>),
    /// None is there.
    NotThere,
    /// Redis was lost on the way: they may be there.
    Unknown,
}

/// The answer to an enqueue.
#[derive(Debug, Clone, PartialEq)]
pub struct Receipt {
    /// The job; of a duplicate, the job that was accepted before.
    pub id: JobId,
    /// The same request was accepted before.
    pub duplicate: bool,
    /// Of a duplicate, how the job that was accepted before stands: its state and, if it has ended, its result. `None` if
    /// the ledger could not be asked just now.
    pub job: Option<Box<JobView>>,
}

/// Enqueues jobs and follows them. Clones share everything, also the connections.
///
/// Every enqueue runs in a task of its own: dropping its future neither stops it nor undoes it.
#[derive(Clone)]
pub struct Client {
    shared: Arc<Shared>,
}

struct Shared {
    acceptor: Acceptor,
    admission: Admission,
    coalescer: Coalescer<AcceptBatch>,
}

/// A job for the queue of its kind, with the defaults of [`NewJob::new`]. Fails if the kind can't be a queue's name.
pub fn new_job(kind: &str, tenant: TenantId, payload: Value) -> Result<NewJob, EnqueueError> {
    let queue = QueueName::new(kinds::default_queue(kind)).map_err(|_| EnqueueError::BadRequest {
        message: format!(
            "kind is {kind:?}: 1 to 64 characters of A-Z a-z 0-9 _ . - are allowed, unless the request names a queue"
        ),
    })?;
    Ok(NewJob::new(kind, queue, tenant, payload))
}

impl Client {
    /// A client over the ledger, and over the queue unless there is none: then the relay of another process dispatches.
    /// Needs a tokio runtime, on which it starts a task that ends with the last clone.
    pub fn new(postgres: Postgres, queue: Option<Queue>, settings: ClientSettings) -> Self {
        let dispatch = Dispatch::new(queue, postgres.clone());
        let acceptor = Acceptor { postgres, dispatch, settings: Arc::new(settings) };
        let coalescer = Coalescer::spawn(AcceptBatch(acceptor.clone()), Limits::default());
        Self { shared: Arc::new(Shared { acceptor, admission: Admission::default(), coalescer }) }
    }

    /// The limits in force.
    pub fn settings(&self) -> &ClientSettings {
        &self.shared.acceptor.settings
    }

    /// The ledger.
    pub fn postgres(&self) -> &Postgres {
        &self.shared.acceptor.postgres
    }

    /// The queue, if this client has one.
    pub fn queue(&self) -> Option<&Queue> {
        self.shared.acceptor.dispatch.queue()
    }

    /// Recurring jobs.
    pub fn schedules(&self) -> Schedules {
        Schedules::new(self.postgres().clone(), Arc::clone(&self.shared.acceptor.settings))
    }

    /// Whether a payload could be enqueued as a job of this kind.
    pub fn check_payload(&self, kind: &str, payload: &Value) -> Result<(), EnqueueError> {
        check_payload(kind, payload, self.settings()).map(drop)
    }

    /// Enqueues one job. Concurrent calls share transactions. Calling again with the same id, or with the same
    /// idempotency key and the same request, accepts nothing twice.
    ///
    /// Ends within `connect_within` if the ledger is down, and within `accept_within + settle_within` in any case.
    pub async fn enqueue(&self, mut job: NewJob, durability: Durability) -> Result<Receipt, EnqueueError> {
        let settings = self.settings();
        let size = check(&mut job, settings)?;
        self.admit(&job, durability).await?;
        let this = self.clone();
        finish(tokio::spawn(async move {
            let mut pushed = PushedFast::NotThere;
            if durability == Durability::Fast && may_be_fast(&job, size, this.settings()) {
                pushed = this.push_fast(std::slice::from_ref(&job)).await;
            }
            if let PushedFast::Told(mut outcomes) = pushed {
                return outcomes.pop().unwrap_or_else(|| Err(this.unavailable()));
            }
            let id = job.id;
            let mut receipts = [this.accept_one(job).await.map_err(|error| pushed.seen_by(error, id))];
            this.see_firsts(&mut receipts).await;
            let [receipt] = receipts;
            receipt
        }))
        .await?
    }

    /// Enqueues jobs in one transaction; answers in their order, which is also the order of jobs on one document. A job
    /// that is refused doesn't keep the others out. An error of the whole means that none was accepted.
    pub async fn enqueue_many(
        &self,
        jobs: Vec<NewJob>,
        durability: Durability,
    ) -> Result<Vec<Result<Receipt, EnqueueError>>, EnqueueError> {
        let settings = self.settings();
        if jobs.len() > settings.max_batch {
            return Err(EnqueueError::BadRequest {
                message: format!(
                    "the batch has {} jobs: at most {} are allowed",
                    jobs.len(),
                    settings.max_batch
                ),
            });
        }
        let (mut outcomes, mut good, mut bytes) = (Vec::with_capacity(jobs.len()), Vec::new(), 0_usize);
        let mut fast = durability == Durability::Fast;
        for mut job in jobs {
            let checked = match check(&mut job, settings) {
                Ok(size) => self.admit(&job, durability).await.map(|()| size),
                Err(error) => Err(error),
            };
            match checked {
                Ok(size) => {
                    bytes = bytes.saturating_add(size);
                    fast &= may_be_fast(&job, size, settings);
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
        let this = self.clone();
        let accepted = finish(tokio::spawn(async move {
            let pushed = if fast { this.push_fast(&good).await } else { PushedFast::NotThere };
            if let PushedFast::Told(outcomes) = pushed {
                return Ok(outcomes);
            }
            let first = good.first().map_or_else(JobId::new, |job| job.id);
            let accepted = this.shared.acceptor.accept_all(&good).await;
            let accepted = accepted.map_err(|error| pushed.seen_by(error, first))?;
            let receive = |(job, reply): (&NewJob, Result<Accepted, EnqueueError>)| {
                receipt(job, reply.map_err(|error| pushed.seen_by(error, job.id))?)
            };
            let mut receipts: Vec<_> = good.iter().zip(accepted).map(receive).collect();
            this.see_firsts(&mut receipts).await;
            Ok(receipts)
        }))
        .await??;
        let mut accepted = accepted.into_iter();
        Ok(outcomes
            .into_iter()
            .map(|refused| refused.or_else(|| accepted.next()).unwrap_or_else(|| Err(self.unavailable())))
            .collect())
    }

    /// Waits until a job has ended, at most `timeout`. Asks the ledger with pauses that grow from 20 to 500 ms. Cancel-safe.
    pub async fn wait(&self, id: JobId, timeout: Duration) -> Result<JobView, WaitError> {
        let deadline = Instant::now() + timeout;
        let mut pauses = Growing::new(Duration::from_millis(20), Duration::from_millis(500));
        let postgres = self.postgres();
        loop {
            let seen = within(postgres.call_timeout(), postgres.job(id, None)).await;
            let late = match seen {
                Ok(Some(job)) if job.finished_at.is_some() => return Ok(job),
                Ok(Some(job)) => WaitError::Timeout { job: id, state: job.state, waited: timeout },
                Ok(None) => WaitError::Unknown(id),
                Err(error) => WaitError::Unavailable { job: id, reason: error.to_string() },
            };
            let pause = pauses.next();
            if Instant::now() + pause >= deadline {
                return Err(late);
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// A job, of `tenant` if given, also one that is `fast` and not claimed yet. `None`: nobody knows it.
    pub async fn job(&self, id: JobId, tenant: Option<&str>) -> Result<Option<JobView>, StoreError> {
        let postgres = self.postgres();
        let limit = postgres.call_timeout();
        match within(limit, postgres.job(id, tenant)).await? {
            None if self.settle_fast(id, tenant).await? => within(limit, postgres.job(id, tenant)).await,
            job => Ok(job),
        }
    }

    /// Cancels a job, of `tenant` if given (PROTOCOL.md 14).
    pub async fn cancel(&self, id: JobId, tenant: Option<&str>) -> Result<Cancel, StoreError> {
        let postgres = self.postgres();
        let limit = postgres.call_timeout() * 2;
        let mut answer = within(limit, postgres.cancel(id, tenant)).await?;
        if answer == Cancel::Unknown && self.settle_fast(id, tenant).await? {
            answer = within(limit, postgres.cancel(id, tenant)).await?;
        }
        if matches!(answer, Cancel::Cancelled | Cancel::Requested) {
            // Only for promptness: the take drops a cancelled job, and the reconciler finds one that is due.
            if let Err(error) = self.tell_queue(id, answer).await {
                tracing::debug!(%error, job = %id, "the queue was not told of a cancel");
            }
        }
        Ok(answer)
    }

    /// Takes a cancelled job out of its list; brings one forward that has effects to undo and waited for its next try.
    async fn tell_queue(&self, id: JobId, answer: Cancel) -> Result<(), StoreError> {
        let dispatch = &self.shared.acceptor.dispatch;
        let Some(queue) = dispatch.open() else { return Ok(()) };
        let postgres = self.postgres();
        let Some(job) = within(postgres.call_timeout(), postgres.job(id, None)).await? else { return Ok(()) };
        if answer == Cancel::Requested && job.state != "waiting" {
            // Its worker hears of it. If its lease was lost it waits in Redis, and must stay there to be ended.
            return Ok(());
        }
        let Ok(name) = QueueName::new(job.queue) else { return Ok(()) };
        let told = async {
            queue.forget(&[(name, id)]).await?;
            if answer == Cancel::Requested
                && let Ok(Some(envelope)) = postgres.envelope(id).await
            {
                queue.push_accepted(&[envelope]).await?;
            }
            Ok(())
        }
        .await;
        dispatch.learn(&told);
        if let Err(error) = told {
            tracing::debug!(%error, job = %id, "the queue was not told of a cancel");
        }
        Ok(())
    }

    /// The queue, unless it failed just now.
    pub(crate) fn open_queue(&self) -> Option<&Queue> {
        self.shared.acceptor.dispatch.open()
    }

    /// Remembers how a call to the queue went.
    pub(crate) fn learn<T>(&self, answer: &Result<T, QueueError>) {
        self.shared.acceptor.dispatch.learn(answer);
    }

    pub(crate) async fn admit(&self, job: &NewJob, durability: Durability) -> Result<(), EnqueueError> {
        let Acceptor { postgres, dispatch, settings } = &self.shared.acceptor;
        self.shared.admission.admit(dispatch, postgres, settings, &job.tenant, &job.queue, durability).await
    }

    async fn accept_one(&self, job: NewJob) -> Result<Receipt, EnqueueError> {
        let acceptor = &self.shared.acceptor;
        let job = Arc::new(job);
        let deadline = Instant::now() + acceptor.settings.accept_within;
        let reply = match self.shared.coalescer.call(Arc::clone(&job), deadline).await {
            Ok(Some(reply)) => reply,
            Ok(None) => return Err(self.unavailable()),
            Err(error) if !may_have_committed(&error) => {
                return Err(refused(&error, acceptor.settings.retry_after));
            }
            Err(error) => {
                tracing::info!(%error, job = %job.id, "asking the ledger what became of a job");
                let replies = acceptor.settle(std::slice::from_ref(&*job)).await?;
                replies.into_iter().next().ok_or_else(|| self.unavailable())?
            }
        };
        receipt(&job, reply)
    }

    /// Tells those whose request was accepted before how the first one's job stands. The results of a batch are given
    /// as far as they fit into the limit of a batch's payloads.
    async fn see_firsts(&self, receipts: &mut [Result<Receipt, EnqueueError>]) {
        let firsts: Vec<Uuid> =
            receipts.iter().flatten().filter(|receipt| receipt.duplicate).map(|r| r.id.0).collect();
        if firsts.is_empty() {
            return;
        }
        let postgres = self.postgres();
        let views = match within(postgres.call_timeout(), postgres.jobs_by_id(&firsts)).await {
            Ok(views) => views,
            Err(error) => {
                tracing::debug!(%error, "duplicates are told without their first job's state");
                return;
            }
        };
        let views: HashMap<Uuid, JobView> = views.into_iter().map(|view| (view.id, view)).collect();
        let mut room = self.settings().max_batch_bytes;
        for receipt in receipts.iter_mut().flatten().filter(|receipt| receipt.duplicate) {
            let Some(mut view) = views.get(&receipt.id.0).cloned() else { continue };
            let size = view.result.as_ref().map_or(0, |result| result.to_string().len());
            if size > room {
                view.result = None;
            } else {
                room -= size;
            }
            receipt.job = Some(Box::new(view));
        }
    }

    /// Sends a job a signal, of `tenant` if given: it is kept until a step waits for it, and wakes a job that does. Committed
    /// in the ledger; the relay tells Redis. The same one is sent once.
    pub async fn signal(
        &self,
        job: JobId,
        tenant: Option<&str>,
        name: &str,
        payload: &Value,
    ) -> Result<Signalled, EnqueueError> {
        check_word("the signal's name", name, 128)?;
        check_signal(payload)?;
        let (postgres, retry_after) = (self.postgres(), self.settings().retry_after);
        let limit = postgres.call_timeout() * 2;
        let send = async || match within(limit, postgres.signal(job, tenant, name, payload)).await? {
            Signalled::Unknown if self.settle_fast(job, tenant).await? => {
                within(limit, postgres.signal(job, tenant, name, payload)).await
            }
            sent => Ok(sent),
        };
        send().await.map_err(|error: StoreError| refused(&error, retry_after))
    }

    /// Changes jobs that wait, of `tenant` if given: their priority, or when they run. Committed in the ledger first; Redis is
    /// told at once if it is there, and by the relay in any case. One answer for each, in order; a running job is left.
    pub async fn change(
        &self,
        ids: &[JobId],
        tenant: Option<&str>,
        change: Change,
    ) -> Result<Vec<Changed>, EnqueueError> {
        if let Some(at) = &change.run_at {
            check_run_at(at)?;
        }
        let (postgres, retry_after) = (self.postgres(), self.settings().retry_after);
        let limit = postgres.call_timeout() * 2;
        let try_to = async || {
            let mut changed = within(limit, postgres.change_jobs(ids, tenant, change)).await?;
            for (id, changed) in ids.iter().zip(&mut changed) {
                if *changed == Changed::Unknown && self.settle_fast(*id, tenant).await? {
                    let again = within(limit, postgres.change_jobs(&[*id], tenant, change)).await?;
                    *changed = again.first().copied().unwrap_or(Changed::Unknown);
                }
            }
            Ok(changed)
        };
        let changed = try_to().await.map_err(|error: StoreError| refused(&error, retry_after))?;
        let done: Vec<JobId> =
            ids.iter().zip(&changed).filter(|(_, c)| **c == Changed::Done).map(|(id, _)| *id).collect();
        let dispatch = &self.shared.acceptor.dispatch;
        if !done.is_empty()
            && let Some(queue) = dispatch.open()
        {
            let told = match within(limit, postgres.waiting_envelopes(&done)).await {
                Ok(envelopes) => place(queue, &envelopes).await.map(drop),
                Err(error) => {
                    tracing::debug!(%error, "changed jobs are left to the relay");
                    return Ok(changed);
                }
            };
            dispatch.learn(&told);
            if let Err(error) = told {
                tracing::debug!(%error, jobs = done.len(), "changed jobs are left to the relay");
            }
        }
        Ok(changed)
    }

    /// Puts jobs into Redis alone. Those that are not told may go to the ledger instead, under the same ids.
    async fn push_fast(&self, jobs: &[NewJob]) -> PushedFast {
        let dispatch = &self.shared.acceptor.dispatch;
        let Some(queue) = dispatch.open() else { return PushedFast::NotThere };
        let full = || EnqueueError::QueueFull { retry_after: self.settings().full_retry_after };
        let record = |job: &NewJob| {
            let sealed = self.postgres().seal_job(job).ok()?;
            Some(queue::Envelope { fast: Some(serde_json::to_value(sealed).ok()?), ..envelope(job) })
        };
        let Some(envelopes) = jobs.iter().map(record).collect::<Option<Vec<_>>>() else {
            return PushedFast::NotThere;
        };
        let answer = queue.push(&envelopes).await;
        dispatch.learn(&answer);
        match answer {
            Ok(pushed) => PushedFast::Told(
                jobs.iter()
                    .zip(pushed)
                    .map(|(job, pushed)| match pushed {
                        Pushed::Full | Pushed::QueueFull => Err(full()),
                        Pushed::TenantFull => {
                            Err(EnqueueError::TenantFull { retry_after: self.settings().full_retry_after })
                        }
                        Pushed::Draining => Err(EnqueueError::Draining { queue: job.queue.clone() }),
                        Pushed::Queued | Pushed::Present => receipt(job, Accepted::New(job.id)),
                    })
                    .collect(),
            ),
            Err(QueueError::Full) => PushedFast::Told(jobs.iter().map(|_| Err(full())).collect()),
            Err(error) => {
                tracing::warn!(%error, jobs = jobs.len(), "fast jobs go to the ledger");
                PushedFast::Unknown
            }
        }
    }

    pub(crate) fn unavailable(&self) -> EnqueueError {
        self.shared.acceptor.unavailable()
    }
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("settings", self.settings()).finish_non_exhaustive()
    }
}

impl PushedFast {
    /// What the ledger's refusal means for a job: one that Redis may have is not certainly refused.
    fn seen_by(&self, error: EnqueueError, job: JobId) -> EnqueueError {
        match (self, error) {
            (Self::Unknown, EnqueueError::Unavailable { retry_after }) => {
                EnqueueError::OutcomeUnknown { job, retry_after }
            }
            (_, error) => error,
        }
    }
}

/// Whether Redis alone may accept a job. A document's order and a batch's count begin at acceptance, which only the ledger can do
/// (PROTOCOL.md 8).
fn may_be_fast(job: &NewJob, size: usize, settings: &ClientSettings) -> bool {
    size <= settings.max_fast_payload && job.document.is_none() && job.batch.is_none()
}

pub(crate) fn receipt(job: &NewJob, reply: Accepted) -> Result<Receipt, EnqueueError> {
    match reply {
        Accepted::New(id) => {
            counter!("jobs_accepted_total", "kind" => known_kind(&job.kind)).increment(1);
            Ok(Receipt { id, duplicate: false, job: None })
        }
        Accepted::Duplicate(id) => Ok(Receipt { id, duplicate: true, job: None }),
        Accepted::Conflict(job) => Err(EnqueueError::Conflict { job }),
        Accepted::UnknownTenant => Err(EnqueueError::UnknownTenant),
        Accepted::UnknownBatch(batch) => Err(EnqueueError::UnknownBatch { batch }),
        Accepted::BatchSealed(batch) => Err(EnqueueError::BatchSealed { batch }),
    }
}

/// Kinds are free text; as a label they must not be endless.
fn known_kind(kind: &str) -> &'static str {
    match kind {
        "ingest" => "ingest",
        "embed" => "embed",
        "delete" => "delete",
        "import" => "import",
        _ => "other",
    }
}

/// The answer of a spawned acceptance.
async fn finish<T>(task: tokio::task::JoinHandle<T>) -> Result<T, EnqueueError> {
    task.await.map_err(|error| EnqueueError::Ledger { message: format!("the acceptance ended: {error}") })
}
