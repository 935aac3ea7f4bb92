//! Brings each delivery of a plain job to its end: takes it in the ledger, runs the handler, records how it ended, and
//! tells Redis.

use std::{
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use apalis_core::{
    error::{AbortError, BoxDynError, DeferredError, RetryAfterError},
    task::Task,
};
use futures::future::BoxFuture;
use serde::Serialize;
use tokio::{
    sync::RwLock,
    time::{sleep, timeout},
};
use tower::{Layer, Service};

use crate::{
    acker::{Acker, Done},
    cancels::Cancels,
    claimer::Job,
    ids::JobId,
    lease::{Lease, LeaseLost},
    ledger::{End, Failure, FailureClass, Grant, Ledger, LedgerError, NoLedger, Take, Written},
    retries::Retries,
};

/// After so many deliveries that ended in a lost lease a job runs alone in its process (PROTOCOL.md 13).
const ALONE_AFTER: u32 = 2;
/// No call to the ledger starts later than this before the lease ends (with a short lease, than a fifth of it), and none lasts
/// longer than [`CALL`].
const MARGIN: Duration = Duration::from_secs(2);
const CALL: Duration = Duration::from_secs(5);
/// How long a job is put off whose handler wants to be called again at once ([`DeferredError`]).
const DEFERRED: Duration = Duration::from_millis(100);
/// Between two calls to a ledger that can't be reached.
const PAUSE: Duration = Duration::from_millis(200);

/// A tower layer for an apalis worker over [`QueueBackend`](crate::QueueBackend), for handlers that are no sagas.
///
/// `Ok` ends the job with the response as its result. `Err` is a charged failure: the job is tried again after
/// [`Retries::wait`], or after the time in a [`RetryAfterError`], until its attempts are used up; after [`AbortError`] it
/// is not tried again. [`Snooze`] and apalis' [`DeferredError`] put the job off, uncharged. A handler whose lease is lost is dropped at once; one that outlives the job's timeout, too, which
/// is a charged failure. An outage of the ledger is waited out and charged to nobody. When a person cancels the job while it
/// runs, the handler hears of it by [`Job::cancelled`]; if it then fails, the job has ended as cancelled.
///
/// Without a ledger ([`AckLayer::new`]) the same holds, but Redis alone counts, a lost lease may mean that a job runs
/// twice, and a job that is not tried again is logged and dropped.
///
/// Add apalis' `catch_panic` *before* this layer, which puts it outside: a job that panics then comes back when its
/// lease has run out. Inside, it turns a panic into [`AbortError`], and the job is dead.
#[derive(Debug, Clone)]
pub struct AckLayer<L = NoLedger> {
    acker: Acker,
    ledger: L,
    retries: Retries,
    /// Held shared by every job, and exclusively by one that may kill the process.
    company: Arc<RwLock<()>>,
    cancels: Cancels,
}

impl AckLayer {
    /// Without a ledger. A first retry comes within `base`, and the default limit of attempts holds.
    pub fn new(acker: Acker, base: Duration) -> Self {
        Self::over(NoLedger, acker).retries(Retries { base, ..Retries::default() })
    }
}

impl<L: Ledger> AckLayer<L> {
    /// Over a ledger.
    pub fn over(ledger: L, acker: Acker) -> Self {
        let asked = ledger.clone();
        let cancels = Cancels::new(move |jobs| {
            let ledger = asked.clone();
            async move { ledger.wanted_to_end(&jobs).await }
        });
        Self { acker, ledger, retries: Retries::default(), company: Arc::default(), cancels }
    }

    /// Sets when failed jobs are tried again.
    pub fn retries(self, retries: Retries) -> Self {
        Self { retries, ..self }
    }

    /// Waits out an outage of the ledger. `call` may be made again: it must be idempotent.
    async fn patiently<T, F>(&self, lease: &Lease, call: impl Fn(Duration) -> F) -> Result<T, BoxDynError>
    where
        F: Future<Output = Result<T, LedgerError>>,
    {
        let margin = MARGIN.min(lease.duration() / 5);
        loop {
            lease.valid(margin * 2).await?;
            let within = CALL.min(lease.remaining().saturating_sub(margin));
            // Of a server that fell silent nothing may ever be heard, and the heartbeat keeps the lease all the while.
            let answer = timeout(within, call(within)).await;
            match answer.unwrap_or_else(|_| Err(LedgerError::Unavailable("no answer in time".to_owned()))) {
                Err(LedgerError::Unavailable(reason)) => {
                    tracing::debug!(id = %lease.id(), reason, "the ledger is away; trying again");
                    sleep(PAUSE).await;
                }
                answer => return Ok(answer?),
            }
        }
    }

    async fn take(&self, job: &Job) -> Result<Take, BoxDynError> {
        let ledger = &self.ledger;
        self.patiently(&job.lease, |within| ledger.take(&job.envelope, within)).await
    }

    /// Records that the job runs alone, where deliveries are counted. `false`: it is not ours any more.
    async fn alone(&self, lease: &Lease, grant: &Grant) -> Result<bool, LedgerError> {
        if L::COUNTS {
            return self.ledger.alone(lease.id(), grant).await;
        }
        self.acker.runs_alone(lease).await.map_err(|error| match error {
            error if error.is_unavailable() => LedgerError::Unavailable(error.to_string()),
            error => LedgerError::Refused(error.to_string()),
        })
    }

    /// Records the end, and returns what to tell Redis.
    async fn end(&self, lease: &Lease, grant: &Grant, end: End) -> Result<Done, BoxDynError> {
        let (id, ledger) = (lease.id(), &self.ledger);
        let written = self.patiently(lease, |_| ledger.end(id, grant, &end)).await;
        let (written, end) = match written {
            Err(error) => match error.downcast::<LedgerError>() {
                // Its result, say, is too large: the job can't end as it should, so it is dead.
                Ok(refused) => {
                    let end = End::Dead(Failure {
                        class: FailureClass::Permanent,
                        code: "refused",
                        error: refused.to_string(),
                        chain: vec![],
                    });
                    (self.patiently(lease, |_| ledger.end(id, grant, &end)).await?, end)
                }
                Err(other) => return Err(other),
            },
            Ok(written) => (written, end),
        };
        if written == Written::Refused {
            return Err(LeaseLost(id).into());
        }
        if matches!(end, End::Dead(_)) {
            lease.note_dead();
        }
        Ok(match end {
            End::Succeeded(_) | End::Dead(_) | End::Cancelled => Done::Ack,
            End::Released(_) | End::Retry(..) if written == Written::AtOnce => Done::Release(Duration::ZERO),
            End::Released(wait) => Done::Release(wait),
            End::Retry(_, wait) if L::COUNTS => Done::Release(wait),
            End::Retry(_, wait) => Done::Retry(wait),
        })
    }

    /// What a failure means for the job.
    fn failed(&self, grant: &Grant, failure: Failure, told: Option<Duration>) -> End {
        let failures = grant.attempts + 1;
        let limit = grant.max_attempts.unwrap_or(self.retries.max_attempts);
        if failure.class == FailureClass::Permanent || failures >= limit {
            return End::Dead(failure);
        }
        End::Retry(failure, told.unwrap_or_else(|| self.retries.wait(failures, rand::random())))
    }

    async fn deliver<S>(&self, mut inner: S, mut task: Task<Job>) -> Result<S::Response, BoxDynError>
    where
        S: Service<Task<Job>>,
        S::Response: Serialize,
        S::Error: Into<BoxDynError>,
    {
        let lease = task.args.lease.clone();
        let id = lease.id();
        let company = self.company.read().await;
        let mut grant = match self.take(&task.args).await? {
            Take::Granted(grant) => grant,
            gone @ (Take::Gone | Take::Dead) => {
                if gone == Take::Dead {
                    lease.note_dead();
                }
                self.acker.done(&lease, Done::Ack).await;
                return Err(NotRun(id).into());
            }
            Take::NotYet(wait) => {
                self.acker.done(&lease, Done::Release(wait)).await;
                return Err(NotRun(id).into());
            }
        };
        let (mut _shared, mut _alone) = (Some(company), None);
        let refused = if grant.lost_alone >= self.retries.delivery_limit {
            Some(End::Dead(Failure {
                class: FailureClass::Permanent,
                code: "poison",
                error: format!("its worker died {} times while it ran this job", grant.lost_alone),
                chain: vec![],
            }))
        } else {
            grant.cancelled.then_some(End::Cancelled)
        };
        if let Some(end) = refused {
            let done = self.end(&lease, &grant, end).await?;
            self.acker.done(&lease, done).await;
            return Err(NotRun(id).into());
        }
        let lost = lease.lost();
        if grant.lost >= ALONE_AFTER {
            _shared = None;
            // Everybody who comes later waits behind it, so not longer than for one lease.
            let later = lease.duration();
            let alone = tokio::select! {
                biased;
                () = lost.cancelled() => return Err(LeaseLost(id).into()),
                alone = timeout(later, self.company.write()) => alone,
            };
            let Ok(alone) = alone else {
                tracing::info!(%id, ?later, "the job has to run alone, and others don't end; it is put off");
                let done = self.end(&lease, &grant, End::Released(later)).await?;
                self.acker.done(&lease, done).await;
                return Err(NotRun(id).into());
            };
            _alone = Some(alone);
            if !self.patiently(&lease, |_| self.alone(&lease, &grant)).await? {
                return Err(LeaseLost(id).into());
            }
        }
        // The payload goes to the handler; what stays here is cheap to copy.
        let payload = std::mem::take(&mut grant.payload);
        task.args.grant = Some(Grant { payload, ..grant.clone() });
        // Here apalis adds the present one.
        let mut task = task.into_builder().attempt(grant.attempts as usize).build();
        let watched = L::COUNTS.then(|| self.cancels.watch(id, grant.fence));
        task.args.cancel = watched.as_ref().map(|watched| watched.token.clone());
        let is_cancelled = || watched.as_ref().is_some_and(|watched| watched.token.is_cancelled());
        let limit = grant.timeout;
        let inner = async {
            // Not asked again whether it is ready: of a worker that stops or pauses meanwhile apalis' own service never is.
            match limit {
                Some(limit) => timeout(limit, inner.call(task)).await.map_err(|_| TimedOut(limit)),
                None => Ok(inner.call(task).await),
            }
        };
        let run = tokio::select! {
            // A job that ends at once needs no look at its lease.
            biased;
            run = inner => run,
            () = lost.cancelled() => return Err(LeaseLost(id).into()),
        };
        let (end, result) = match run {
            Ok(Ok(response)) => match serde_json::to_value(&response) {
                Ok(value) => (End::Succeeded(value), Ok(response)),
                Err(error) => {
                    let failure = failure(FailureClass::Permanent, "result", &error);
                    (self.failed(&grant, failure, None), Err(error.into()))
                }
            },
            Ok(Err(error)) => {
                let error: BoxDynError = error.into();
                if let Some(wait) = put_off(&error).filter(|_| !is_cancelled()) {
                    let done = self.end(&lease, &grant, End::Released(wait)).await?;
                    self.acker.done(&lease, done).await;
                    return Err(error);
                }
                let (class, told) = classify(&error);
                (self.failed(&grant, failure(class, "handler", error.as_ref()), told), Err(error))
            }
            Err(late) => (
                self.failed(&grant, failure(FailureClass::Timeout, "timeout", &late), None),
                Err(late.into()),
            ),
        };
        // Not tried again, whatever it failed of.
        let end = if result.is_err() && is_cancelled() { End::Cancelled } else { end };
        let done = self.end(&lease, &grant, end).await?;
        self.acker.done(&lease, done).await;
        result
    }
}

/// The delivery ended before the handler ran: the job has ended already, is not due, is cancelled, is poison, or has to run alone
/// while others run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("job {0} was not run in this delivery")]
pub struct NotRun(pub JobId);

/// A handler's way to put its job off: returned as its error, the job goes back for so long, uncharged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("put off for {0:?}")]
pub struct Snooze(pub Duration);

#[derive(Debug, thiserror::Error)]
#[error("no end within the job's timeout of {0:?}")]
struct TimedOut(Duration);

fn failure(class: FailureClass, code: &'static str, error: &dyn std::error::Error) -> Failure {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    Failure { class, code, error: error.to_string(), chain: causes.map(ToString::to_string).collect() }
}

/// For how long the handler puts its job off, uncharged.
fn put_off(error: &BoxDynError) -> Option<Duration> {
    if error.is::<DeferredError>() {
        return Some(DEFERRED);
    }
    error.downcast_ref().map(|Snooze(time)| *time)
}

fn classify(error: &BoxDynError) -> (FailureClass, Option<Duration>) {
    if error.is::<AbortError>() {
        return (FailureClass::Permanent, None);
    }
    match error.downcast_ref::<RetryAfterError>() {
        Some(later) => (FailureClass::RateLimited, Some(later.get_duration())),
        None => (FailureClass::Transient, None),
    }
}

impl<S, L: Clone> Layer<S> for AckLayer<L> {
    type Service = AckService<S, L>;

    fn layer(&self, inner: S) -> AckService<S, L> {
        AckService { inner, layer: self.clone() }
    }
}

/// What [`AckLayer`] makes of a service.
#[derive(Debug, Clone)]
pub struct AckService<S, L = NoLedger> {
    inner: S,
    layer: AckLayer<L>,
}

impl<S, L> Service<Task<Job>> for AckService<S, L>
where
    S: Service<Task<Job>> + Clone + Send + 'static,
    S::Future: Send + 'static,
    S::Response: Serialize + Send + 'static,
    S::Error: Into<BoxDynError> + Send + 'static,
    L: Ledger,
{
    type Response = S::Response;
    type Error = BoxDynError;
    type Future = BoxFuture<'static, Result<S::Response, BoxDynError>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxDynError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, task: Task<Job>) -> Self::Future {
        // The service that was asked whether it is ready is the one to call.
        let clone = self.inner.clone();
        let inner = std::mem::replace(&mut self.inner, clone);
        let layer = self.layer.clone();
        Box::pin(async move { layer.deliver(inner, task).await })
    }
}
