//! What a step gets: its job, its fence, and the guarded way to call a dependency.

use std::{
    future::Future,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use queue::{Lease, WorkerId};
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{
    breaker::{Breakers, State},
    reporter::Reporter,
};
use crate::{
    error::{Class, Dependency, StepError, StoreError},
    stores::postgres::{
        Fence, Postgres,
        ending::Run,
        progress::Progress,
        take::{StepRecord, TakenJob},
    },
};

/// A job that alone gets `unavailable` so often while probes succeed is charged like any other failure (PROTOCOL.md 16).
const LONE_OUTAGES: u32 = 5;

/// Time that a run and its current step may use, not counting what is spent waiting for a dependency or the lease.
#[derive(Debug)]
struct Budget(Mutex<Times>);

#[derive(Debug)]
struct Times {
    job_until: Instant,
    step_until: Instant,
    /// Waits under way. A step may make several calls at once, and drop some of them.
    waits: u32,
    /// When the first of them stopped the clocks, which the last one starts again.
    stopped_at: Instant,
}

impl Times {
    /// When the job's time is used up, if the clocks start again now.
    fn job_until(&self) -> Instant {
        let stopped = if self.waits > 0 { self.stopped_at.elapsed() } else { Duration::ZERO };
        self.job_until + stopped
    }
}

/// How often a step's time is looked at while the clocks stand.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

impl Budget {
    fn new(job_until: Instant) -> Self {
        let stopped_at = Instant::now();
        Self(Mutex::new(Times { job_until, step_until: job_until, waits: 0, stopped_at }))
    }

    fn times(&self) -> std::sync::MutexGuard<'_, Times> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `work` with the clocks stopped. Cancel-safe, and waits may overlap: what they share counts once.
    async fn wait<T>(&self, work: impl Future<Output = T>) -> T {
        let _stopped = Stopped::new(self);
        work.await
    }

    /// Drives `work` until the step's time is used up: `None`.
    async fn limited<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        let mut work = std::pin::pin!(work);
        loop {
            let until = self.look_at();
            if let Ok(done) = timeout_at(until, &mut work).await {
                return Some(done);
            }
            if self.is_used_up(until) {
                return None;
            }
        }
    }

    /// When the step's time can be used up at the earliest, or has to be looked at again.
    fn look_at(&self) -> Instant {
        let times = self.times();
        if times.waits > 0 { Instant::now() + LOOK_AGAIN } else { times.step_until }
    }

    /// Whether the step's time has ended by `until`, which is over.
    fn is_used_up(&self, until: Instant) -> bool {
        let times = self.times();
        times.waits == 0 && times.step_until <= until
    }
}

/// The clocks stand as long as one of these is there: also a wait that is dropped starts them again.
struct Stopped<'a>(&'a Budget);

impl<'a> Stopped<'a> {
    fn new(budget: &'a Budget) -> Self {
        let mut times = budget.times();
        if times.waits == 0 {
            times.stopped_at = Instant::now();
        }
        times.waits += 1;
        drop(times);
        Self(budget)
    }
}

impl Drop for Stopped<'_> {
    fn drop(&mut self) {
        let mut times = self.0.times();
        times.waits -= 1;
        if times.waits == 0 {
            let stopped = times.stopped_at.elapsed();
            times.job_until += stopped;
            times.step_until += stopped;
        }
    }
}

/// Limits of calls to dependencies.
#[derive(Debug, Clone, Copy)]
pub struct CallLimits {
    /// No answer within this time is a time-out.
    pub call_timeout: Duration,
    /// Calls with effects end this long before the lease does, so that nothing of ours arrives after it.
    pub lease_margin: Duration,
}

/// Tells work that goes on beside a step that its run has to end. Clones tell the same.
#[derive(Debug, Clone)]
pub struct RunToken {
    lost: CancellationToken,
    stop: CancellationToken,
    cancel: Option<CancellationToken>,
    /// Another branch of the group has failed.
    group: CancellationToken,
}

impl RunToken {
    /// Whether the run has to end. Costs a few atomic reads: ask in loops.
    pub fn is_cancelled(&self) -> bool {
        self.lost.is_cancelled()
            || self.stop.is_cancelled()
            || self.group.is_cancelled()
            || self.cancel.as_ref().is_some_and(CancellationToken::is_cancelled)
    }

    /// Waits until the run has to end. Cancel-safe.
    pub async fn cancelled(&self) {
        let cancel = async {
            match &self.cancel {
                Some(cancel) => cancel.cancelled().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = self.lost.cancelled() => {}
            () = self.stop.cancelled() => {}
            () = self.group.cancelled() => {}
            () = cancel => {}
        }
    }
}

/// What one delivery of one job knows. Steps use it for every call that leaves the process.
pub struct StepContext {
    /// The job, as taken.
    pub job: Arc<TakenJob>,
    /// The saga's run.
    pub saga_id: Uuid,
    /// Whether an earlier delivery began this run, so that effects of it may be there.
    pub resumed: bool,
    /// Who runs it.
    pub worker: WorkerId,
    /// When this delivery began.
    pub started_at: chrono::DateTime<chrono::Utc>,
    pub(super) lease: Lease,
    /// The lease is lost.
    lost: CancellationToken,
    pub(super) postgres: Postgres,
    pub(super) breakers: Breakers,
    pub(super) limits: CallLimits,
    reporter: Reporter,
    /// A person wants the job to end.
    pub(super) cancel: CancellationToken,
    /// Not while compensating, and not from the pivot on.
    heeds_cancel: AtomicBool,
    /// This process wants to end.
    pub(super) stop: CancellationToken,
    /// Another branch of the group has failed for good.
    pub(super) group: CancellationToken,
    pub(super) compensating: bool,
    /// Whether a try of a step is under way, which ends when the run has to end, and every call with it.
    trying: AtomicBool,
    steps: Arc<Mutex<Vec<StepRecord>>>,
    budget: Budget,
    /// Calls so far, there and back.
    #[cfg(feature = "faults")]
    calls: (std::sync::atomic::AtomicU32, std::sync::atomic::AtomicU32),
}

impl StepContext {
    #[allow(clippy::too_many_arguments)] // one caller, and every part has another owner
    pub(super) fn new(
        job: Arc<TakenJob>,
        saga_id: Uuid,
        resumed: bool,
        worker: WorkerId,
        lease: Lease,
        postgres: Postgres,
        breakers: Breakers,
        limits: CallLimits,
        reporter: Reporter,
        cancel: CancellationToken,
        stop: CancellationToken,
    ) -> Self {
        let budget = Budget::new(Instant::now() + job.timeout);
        Self {
            job,
            saga_id,
            resumed,
            worker,
            started_at: chrono::Utc::now(),
            lost: lease.lost(),
            lease,
            postgres,
            breakers,
            limits,
            reporter,
            cancel,
            heeds_cancel: AtomicBool::new(true),
            stop,
            group: CancellationToken::new(),
            compensating: false,
            trying: AtomicBool::new(false),
            steps: Arc::default(),
            budget,
            #[cfg(feature = "faults")]
            calls: Default::default(),
        }
    }

    /// A branch's own: its clocks run apart from the other branches'. `failed` tells it of their failure.
    pub(super) fn branch(&self, failed: CancellationToken) -> Self {
        let job_until = self.budget.times().job_until();
        Self {
            job: Arc::clone(&self.job),
            saga_id: self.saga_id,
            resumed: self.resumed,
            worker: self.worker.clone(),
            started_at: self.started_at,
            lease: self.lease.clone(),
            lost: self.lost.clone(),
            postgres: self.postgres.clone(),
            breakers: self.breakers.clone(),
            limits: self.limits,
            reporter: self.reporter.clone(),
            cancel: self.cancel.clone(),
            heeds_cancel: AtomicBool::new(self.heeds_cancel()),
            stop: self.stop.clone(),
            group: failed,
            compensating: self.compensating,
            trying: AtomicBool::new(false),
            steps: Arc::clone(&self.steps),
            budget: Budget::new(job_until),
            #[cfg(feature = "faults")]
            calls: Default::default(),
        }
    }

    /// What a branch waited for dependencies is not the job's time, either.
    pub(super) fn join(&self, branch: &Self) {
        let until = branch.budget.times().job_until();
        let mut times = self.budget.times();
        times.job_until = times.job_until.max(until);
    }

    /// From here on a request to cancel changes nothing.
    pub(super) fn ignore_cancel(&self) {
        self.heeds_cancel.store(false, Ordering::Release);
    }

    fn heeds_cancel(&self) -> bool {
        !self.compensating && self.heeds_cancel.load(Ordering::Acquire)
    }

    /// The number that every write of this run carries. A store that can check it is safe from zombies.
    pub fn fence(&self) -> Fence {
        self.job.fence
    }

    /// The same for every delivery of this run's step, and for no other. A store that can check neither this nor the
    /// fence sees the step's effect at least once.
    pub fn idempotency_key(&self, step: &str) -> String {
        format!("{}/{step}", self.saga_id)
    }

    /// Says how far the job is, for people: 0 to 100 (more counts as 100) and a message of at most 500 characters. Costs
    /// next to nothing: it is written in the background, at most every 500 ms, the last word wins, and under the fence.
    /// Each delivery starts anew.
    pub fn progress(&self, percent: u8, message: impl AsRef<str>) {
        self.reporter.report(Progress::new(self.job.id, self.job.fence, percent, message.as_ref()));
    }

    /// Whether the run has to end: a person wants it, the lease is lost, or the process stops.
    pub fn is_cancelled(&self) -> bool {
        self.token().is_cancelled()
    }

    /// Waits until the run has to end. Cancel-safe.
    pub async fn cancelled(&self) {
        self.token().cancelled().await;
    }

    /// The same for work that the engine can't drop: threads, spawned tasks. A step that only awaits needs none of it,
    /// because the engine drops its future.
    pub fn token(&self) -> RunToken {
        RunToken {
            lost: self.lost.clone(),
            stop: self.stop.clone(),
            cancel: self.heeds_cancel().then(|| self.cancel.clone()),
            group: self.group.clone(),
        }
    }

    /// Who ends this run, for the log.
    pub fn run(&self) -> Run {
        Run {
            job_id: self.job.id,
            fence: self.job.fence,
            saga_id: Some(self.saga_id),
            worker: self.worker.clone(),
            started_at: self.started_at,
        }
    }

    /// The steps of this delivery so far.
    pub fn steps_so_far(&self) -> Vec<StepRecord> {
        self.steps.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn record(&self, step: StepRecord) {
        self.steps.lock().unwrap_or_else(PoisonError::into_inner).push(step);
    }

    /// Calls a dependency. Waits, uncharged, while its circuit breaker is open and while the lease waits to be renewed;
    /// gives the call a deadline before the lease's end; tells an outage from a slow answer by a probe. `call` gets the
    /// deadline and may be made again: it must be idempotent.
    ///
    /// Errors: [`StepError::LeaseLost`] as soon as the lease is known to be somebody else's, [`StepError::Cancelled`] and
    /// [`StepError::Stopping`] on request, else the store's own. Cancel-safe as far as `call` is.
    pub async fn call<T, F, C>(&self, dependency: Dependency, call: F) -> Result<T, StepError>
    where
        F: Fn(Instant) -> C,
        C: Future<Output = Result<T, StoreError>>,
    {
        let mut lone = 0;
        #[cfg(feature = "faults")]
        let point = self.next_point(dependency);
        loop {
            self.ready(dependency).await?;
            let deadline = self.deadline(dependency)?;
            // Boxed: it is moved into one future after the other here.
            let call = Box::pin(async {
                crate::fault_point!(&format!("{point}.before"), &self.job.payload);
                let done = begin(dependency, deadline, &call).await?;
                crate::fault_point!(&format!("{point}.after"), &self.job.payload);
                Ok::<T, StoreError>(done)
            });
            let answer = timeout_at(deadline, call);
            let answer = if self.trying.load(Ordering::Relaxed) {
                answer.await
            } else {
                self.unless_ended(async { Ok(answer.await) }).await?
            };
            let error = match answer {
                Ok(Ok(value)) => return Ok(value),
                Ok(Err(error)) if !matches!(error.class, Class::Unavailable | Class::Timeout) => {
                    return Err(error.into());
                }
                Ok(Err(error)) => error,
                Err(_) => StoreError::new(dependency, Class::Timeout, "no answer in time"),
            };
            let asking =
                self.unless_ended(async { Ok(self.breakers.confirm_outage(dependency, &error).await) });
            let outage = Box::pin(self.budget.wait(asking)).await?;
            if outage {
                continue;
            }
            lone += 1;
            if error.class == Class::Timeout || lone >= LONE_OUTAGES {
                return Err(StoreError {
                    class: if lone >= LONE_OUTAGES { Class::Transient } else { error.class },
                    ..error
                }
                .into());
            }
            self.pause(Duration::from_millis(50) * 2u32.pow(lone)).await?;
        }
    }

    /// The name of the fault points around the next call of this delivery: `ingest.call2.vectors`, on the way back
    /// `ingest.undo1.postgres`.
    #[cfg(feature = "faults")]
    fn next_point(&self, dependency: Dependency) -> String {
        use std::sync::atomic::Ordering;
        let (way, count) = if self.compensating { ("undo", &self.calls.1) } else { ("call", &self.calls.0) };
        let no = count.fetch_add(1, Ordering::Relaxed) + 1;
        format!("{}.{way}{no}.{}", self.job.kind, dependency.name())
    }

    /// Sleeps, unless the run has to end.
    pub async fn pause(&self, time: Duration) -> Result<(), StepError> {
        let rest = self.unless_ended(async {
            tokio::time::sleep(time).await;
            Ok(())
        });
        self.unless_group_failed(rest).await
    }

    /// Waits for the breaker to close and the lease to be long enough; neither counts against the job's time.
    async fn ready(&self, dependency: Dependency) -> Result<(), StepError> {
        let margin = self.limits.lease_margin * 2;
        if self.breakers.state(dependency) == State::Closed && self.lease.lasts(margin) {
            return Ok(());
        }
        let ready = self.unless_ended(async {
            self.breakers.closed(dependency).await;
            self.lease.valid(margin).await.map_err(|_| StepError::LeaseLost)
        });
        Box::pin(self.budget.wait(self.unless_group_failed(ready))).await
    }

    /// Ends a wait when another branch has failed. Never a call: what it does can't be called back.
    async fn unless_group_failed<T>(
        &self,
        wait: impl Future<Output = Result<T, StepError>>,
    ) -> Result<T, StepError> {
        tokio::select! {
            biased;
            done = wait => done,
            () = self.group.cancelled() => Err(StepError::transient("group_failed", "another branch of the group has failed")),
        }
    }

    /// Runs one try of a step within its time-out, and only as long as the run may go on: a step that is busy with something
    /// of its own is dropped, too, when the lease is lost or a person or this process wants the end. Waiting for a dependency
    /// does not count, so an outage of any length does not time a step out.
    pub(super) async fn within<T>(
        &self,
        timeout: Duration,
        work: impl Future<Output = Result<T, StepError>>,
    ) -> Result<T, StepError> {
        let timeout = crate::fault::step_timeout(timeout);
        let until = Instant::now() + timeout;
        {
            let mut times = self.budget.times();
            // The job's own time is a hard cap (PROTOCOL.md 5), also for a step that calls nothing and never ends.
            times.step_until = if self.compensating { until } else { until.min(times.job_until()) };
        }
        self.trying.store(true, Ordering::Relaxed);
        let done = self.until_timeout(timeout, work).await;
        self.trying.store(false, Ordering::Relaxed);
        done
    }

    async fn until_timeout<T>(
        &self,
        timeout: Duration,
        work: impl Future<Output = Result<T, StepError>>,
    ) -> Result<T, StepError> {
        // Pinned here: what it is given to holds no copy of it.
        let work = std::pin::pin!(work);
        match self.budget.limited(self.unless_ended(work)).await {
            Some(done) => done,
            None if !self.compensating && self.budget.times().job_until() <= Instant::now() => {
                Err(self.job_timeout())
            }
            None => Err(StepError::Failed {
                class: Class::Timeout,
                code: "step_timeout",
                message: format!("no end within {timeout:?}"),
                retry_after: None,
            }),
        }
    }

    fn job_timeout(&self) -> StepError {
        StepError::Failed {
            class: Class::Timeout,
            code: "job_timeout",
            message: format!("the job's time of {:?} is used up", self.job.timeout),
            retry_after: None,
        }
    }

    fn deadline(&self, dependency: Dependency) -> Result<Instant, StepError> {
        let now = Instant::now();
        let mut deadline = if dependency == Dependency::Embedder {
            // Has no effect anywhere, and may well be longer than one call to a store: its step's time-out bounds it.
            now + self.job.timeout
        } else {
            now + self
                .limits
                .call_timeout
                .min(self.lease.remaining().saturating_sub(self.limits.lease_margin))
        };
        if !self.compensating {
            let budget = self.budget.times().job_until();
            if budget <= now {
                return Err(self.job_timeout());
            }
            deadline = deadline.min(budget);
        }
        Ok(deadline)
    }

    async fn unless_ended<T>(
        &self,
        work: impl Future<Output = Result<T, StepError>>,
    ) -> Result<T, StepError> {
        tokio::select! {
            biased;
            () = self.lost.cancelled() => Err(StepError::LeaseLost),
            () = self.stop.cancelled() => Err(StepError::Stopping),
            () = self.cancel.cancelled(), if self.heeds_cancel() => Err(StepError::Cancelled),
            done = work => done,
        }
    }
}

/// Begins a call, unless its time is over: in a process that was paused until now the time-out may not have been heard of yet,
/// and a command that is handed to a connection may be on its way when it is.
async fn begin<T, C>(
    dependency: Dependency,
    deadline: Instant,
    call: impl Fn(Instant) -> C,
) -> Result<T, StoreError>
where
    C: Future<Output = Result<T, StoreError>>,
{
    if Instant::now() >= deadline {
        return Err(StoreError::new(dependency, Class::Timeout, "its time was over before it began"));
    }
    call(deadline).await
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::future::pending;

    use tokio::time::{sleep, timeout};

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// How long a step with a time of 10 s lasts that does this and then hangs, to the second.
    async fn lasts(budget: &Budget, work: impl Future<Output = ()>) -> u64 {
        let begun = Instant::now();
        let hangs = async {
            work.await;
            pending::<()>().await;
        };
        let ended = timeout(SECOND * 3600, budget.limited(hangs)).await;
        assert_eq!(ended.expect("the step has no end"), None);
        begun.elapsed().as_secs()
    }

    fn ten_seconds() -> Budget {
        Budget::new(Instant::now() + SECOND * 10)
    }

    #[tokio::test(start_paused = true)]
    async fn protocol_6_a_call_whose_time_is_over_is_not_begun_though_its_time_out_was_not_heard_of() {
        let deadline = Instant::now() + SECOND;
        let begun = AtomicBool::new(false);
        let call = |_| async {
            begun.store(true, Ordering::Relaxed);
            Ok::<_, StoreError>(())
        };
        // As `timeout_at` does: the call is looked at before the clock.
        timeout_at(deadline, begin(Dependency::Cache, deadline, call)).await.unwrap().unwrap();
        assert!(begun.swap(false, Ordering::Relaxed), "a call in time is begun");
        tokio::time::advance(SECOND).await;
        let late = timeout_at(deadline, begin(Dependency::Cache, deadline, call)).await;
        let error = late.expect("the call is looked at before the clock").unwrap_err();
        assert_eq!(error.class, Class::Timeout);
        assert!(!begun.load(Ordering::Relaxed), "a call was begun after its time");
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_counts_for_nothing_and_one_that_was_dropped_starts_the_clocks_again() {
        let budget = ten_seconds();
        assert_eq!(lasts(&budget, budget.wait(sleep(SECOND * 60))).await, 70);
        let budget = ten_seconds();
        let dropped = async {
            assert!(timeout(SECOND * 60, budget.wait(pending::<()>())).await.is_err());
        };
        assert_eq!(lasts(&budget, dropped).await, 70);
        let times = budget.times();
        assert_eq!(times.job_until(), times.step_until);
    }

    #[tokio::test(start_paused = true)]
    async fn the_clocks_stand_until_the_last_of_several_waits_and_what_they_share_counts_once() {
        let budget = ten_seconds();
        let waits = async {
            let late = async {
                sleep(SECOND * 30).await;
                budget.wait(sleep(SECOND * 60)).await;
            };
            // From 0 to 60, to 20, and from 30 to 90.
            tokio::join!(budget.wait(sleep(SECOND * 60)), budget.wait(sleep(SECOND * 20)), late);
        };
        assert_eq!(lasts(&budget, waits).await, 100);
    }
}
