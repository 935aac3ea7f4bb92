//! One delivery of one job: forward from where the log says, or [backward](back).

mod back;

use std::{
    any::Any,
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use chrono::Utc;
use futures::{FutureExt, future::join_all};
use metrics::{counter, gauge, histogram};
use queue::ledger::Written;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;
use uuid::Uuid;

use super::{
    AnyBranch, AnySaga, Commits, Delivery, Ended, Engine, Keep, LONGEST_WAIT, RetryPolicy, Saga, Step,
    StepContext, encode, failure,
};
use crate::{
    error::{Class, Dependency, StepError, StoreError, storable},
    results::fits,
    stores::postgres::{
        ending::{Completed, Completion, Ending, Failure, Parking, Run, Verdict},
        forward::Advance,
        stage::NewSaga,
        take::{OpenSaga, StepRecord},
    },
};

/// How long a run waits at least that the log has refused: another delivery soon would only fail like this one.
const REFUSED_FOR: Duration = Duration::from_secs(10);

pub(super) struct Registered<S>(pub S);

#[async_trait]
impl<S: Saga> AnySaga for Registered<S> {
    fn needs(&self) -> &[Dependency] {
        self.0.needs()
    }

    fn points(&self) -> Vec<String> {
        let (kind, pivot) = (self.0.kind(), self.0.pivot());
        let mut points = vec![];
        for (i, step) in self.0.steps().iter().enumerate() {
            let branches: Vec<_> = step.branches().iter().map(|branch| branch.name()).collect();
            for name in if branches.is_empty() { vec![step.name()] } else { branches } {
                points.extend(["before", "after"].map(|at| format!("{kind}.{name}.{at}")));
                if i < pivot {
                    points.extend(["before", "after"].map(|at| format!("{kind}.{name}.compensate.{at}")));
                }
            }
        }
        points
    }

    fn begins_with_take(&self) -> bool {
        // Those that write the run's row themselves, with its first step or its last, count on it or on nothing.
        let themselves =
            |step: &Arc<dyn Step<S::Data>>| matches!(step.commits(), Commits::Begin | Commits::End);
        self.0.repeatable() && !self.0.steps().iter().any(themselves)
    }

    async fn drive(&self, engine: &Engine, delivery: Delivery) -> Result<Ended, StoreError> {
        let _active = Active::begin(self.0.kind());
        Drive::new(&self.0, engine, delivery).run().await
    }
}

/// Counts a run as active for as long as it is there.
struct Active(&'static str);

impl Active {
    fn begin(kind: &'static str) -> Self {
        gauge!("saga_active_count", "saga" => kind).increment(1.0);
        Self(kind)
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        gauge!("saga_active_count", "saga" => self.0).decrement(1.0);
    }
}

/// What is not of every run, and large because it has statements or calls of its own, is boxed where it is awaited: otherwise each
/// run would have the memory for all of it, and its future would be copied with it.
struct Drive<'a, S: Saga> {
    saga: &'a S,
    engine: &'a Engine,
    open: Option<OpenSaga>,
    ctx: StepContext,
    /// Branches of the step that is under way, a group, that are done.
    done: Vec<String>,
    /// Whether the log says that the pivot may have begun.
    pivot_begun: bool,
}

/// What is tried: a step, or a branch of one.
enum Work<'w, D> {
    Step(&'w dyn Step<D>, &'w mut D),
    Branch(&'w dyn AnyBranch<D>, &'w D),
}

impl<D> Work<'_, D> {
    fn name(&self) -> &'static str {
        match self {
            Self::Step(step, _) => step.name(),
            Self::Branch(branch, _) => branch.name(),
        }
    }

    fn timeout(&self) -> Duration {
        match self {
            Self::Step(step, _) => step.timeout(),
            Self::Branch(branch, _) => branch.timeout(),
        }
    }

    fn retry(&self) -> RetryPolicy {
        match self {
            Self::Step(step, _) => step.retry(),
            Self::Branch(branch, _) => branch.retry(),
        }
    }
}

impl<'a, S: Saga> Drive<'a, S> {
    fn new(saga: &'a S, engine: &'a Engine, delivery: Delivery) -> Self {
        let open = delivery.job.saga.clone();
        let saga_id = open.as_ref().map_or_else(Uuid::now_v7, |open| open.id);
        let ctx = StepContext::new(
            delivery.job,
            saga_id,
            open.as_ref().is_some_and(|open| !open.fresh),
            engine.worker.clone(),
            delivery.lease,
            engine.postgres.clone(),
            engine.breakers.clone(),
            engine.settings.calls,
            engine.reporter.clone(),
            delivery.cancel,
            delivery.stop,
        );
        Self { saga, engine, open, ctx, done: vec![], pivot_begun: false }
    }

    async fn run(mut self) -> Result<Ended, StoreError> {
        let open = match self.open.take() {
            Some(open) if !open.fresh => open,
            open => return self.first_delivery(open.is_some()).await,
        };
        Box::pin(self.resume(open)).await
    }

    /// A run that another delivery began.
    async fn resume(mut self, open: OpenSaga) -> Result<Ended, StoreError> {
        let next: usize = open.next_step.unsigned_abs().into();
        let past_pivot = next > self.saga.pivot() || open.pivot_begun;
        let limit = self.engine.settings.delivery_limit;
        let mut turned = None;
        if open.compensating {
            let Some(verdict) = open.verdict.and_then(|v| serde_json::from_value(v).ok()) else {
                return self.park(None, "the saga's verdict can't be read").await;
            };
            if open.lost_compensating >= limit {
                return self.park(Some(&verdict), "its compensation kills its workers").await;
            }
            turned = Some(verdict);
        }
        let data: S::Data = match open.unreadable.map(Err).or(open.data.map(decode)) {
            Some(data) => match data {
                Ok(data) => data,
                Err(error) => {
                    let error = format!("the saga's data can't be read: {error}");
                    let parking = Parking { verdict: None, error: &error, past_pivot, progress: None };
                    return self.park_at(&parking).await;
                }
            },
            // As many more deliveries as make it poison were to turn it back, and died before they could.
            None if turned.is_none() && self.ctx.job.lost_alone >= limit.saturating_mul(2) => {
                let error = "preparing its data kills its workers";
                return self.park_at(&Parking { verdict: None, error, past_pivot, progress: None }).await;
            }
            None => match self.prepare() {
                Ok(data) => data,
                // It failed so before, and no step has run.
                Err(error) => {
                    return self.finish(self.ctx.run(), Verdict::Dead { failure: failure(&error) }).await;
                }
            },
        };
        (self.done, self.pivot_begun) = (open.done, open.pivot_begun);
        if let Some(verdict) = turned {
            return self.backward(&data, verdict).await;
        }
        if self.is_poison() {
            let poison = self.poison();
            if past_pivot {
                return self.park(None, &poison.error).await;
            }
            return self.turn_back(&data, Verdict::Dead { failure: poison }).await;
        }
        if self.ctx.job.cancel_requested && !past_pivot {
            return self.turn_back(&data, Verdict::Cancelled).await;
        }
        if past_pivot {
            self.ctx.ignore_cancel();
        }
        self.forward(data, next).await
    }

    /// A run of which no step can have run: either its job's take has begun it, or nothing has yet.
    async fn first_delivery(self, begun: bool) -> Result<Ended, StoreError> {
        let verdict = if self.is_poison() {
            Verdict::Dead { failure: self.poison() }
        } else if self.ctx.job.cancel_requested {
            Verdict::Cancelled
        } else {
            match self.prepare() {
                Ok(data) => {
                    if !begun
                        && self.saga.steps().first().is_none_or(|step| step.commits() != Commits::Begin)
                        && let Err(error) = Box::pin(self.begin(&data)).await
                    {
                        return Box::pin(self.failed(&data, 0, error)).await;
                    }
                    return self.forward(data, 0).await;
                }
                Err(error) => Verdict::Dead { failure: failure(&error) },
            }
        };
        Box::pin(self.end_before_first_step(begun, verdict)).await
    }

    fn prepare(&self) -> Result<S::Data, StepError> {
        unless_it_panics(|| self.saga.prepare(&self.ctx.job)).and_then(|prepared| prepared)
    }

    /// The job's result, if it is allowed.
    fn result(&self, data: &S::Data) -> Result<Value, StepError> {
        let result = unless_it_panics(|| self.saga.result(data))?;
        fits(&result, self.engine.settings.max_result)?;
        Ok(result)
    }

    async fn end_before_first_step(self, begun: bool, verdict: Verdict) -> Result<Ended, StoreError> {
        let run = self.ctx.run();
        if begun {
            let postgres = &self.engine.postgres;
            postgres.in_time(postgres.log_run(&run)).await?;
        }
        self.finish(Run { saga_id: run.saga_id.filter(|_| begun), ..run }, verdict).await
    }

    /// The saga's first row, for sagas whose first step doesn't write it.
    async fn begin(&self, data: &S::Data) -> Result<(), StepError> {
        let saga = Arc::new(NewSaga {
            id: self.ctx.saga_id,
            job_id: self.ctx.job.id,
            fence: self.ctx.fence(),
            kind: self.saga.kind().to_owned(),
            definition_version: self.saga.version(),
            tenant: self.ctx.job.tenant.clone(),
            next_step: 0,
            data: encode(data)?,
        });
        let begun = self
            .ctx
            .call(Dependency::Postgres, |deadline| self.engine.begin.call(Arc::clone(&saga), deadline))
            .await?;
        if begun { Ok(()) } else { Err(StepError::LeaseLost) }
    }

    async fn forward(mut self, mut data: S::Data, from: usize) -> Result<Ended, StoreError> {
        let steps = self.saga.steps().to_vec();
        for (i, step) in steps.iter().enumerate().skip(from) {
            if i == self.saga.pivot()
                && let Err(error) = Box::pin(self.before_pivot(step.as_ref(), i, &data)).await
            {
                return Box::pin(self.failed(&data, i, error)).await;
            }
            let outcome = if step.branches().is_empty() {
                self.tries(&self.ctx, Work::Step(step.as_ref(), &mut data)).await.map(drop)
            } else {
                let mut done = std::mem::take(&mut self.done);
                let outcome = Box::pin(self.group(step.branches(), &mut data, &mut done)).await;
                if outcome.is_err() {
                    self.done = done;
                }
                outcome
            };
            if let Err(error) = outcome {
                return Box::pin(self.failed(&data, i, error)).await;
            }
            if step.commits() == Commits::End {
                self.count("succeeded");
                return Ok(Ended::Ack);
            }
            if i == self.saga.pivot() {
                self.ctx.ignore_cancel();
            }
            if step.commits() == Commits::Data
                && let Err(error) = Box::pin(self.keep(i + 1, &data)).await
            {
                // The step is done; only the log doesn't know it.
                return Box::pin(self.failed(&data, i + 1, error)).await;
            }
        }
        let result = match self.result(&data) {
            Ok(result) => result,
            Err(error) => return Box::pin(self.failed(&data, steps.len(), error)).await,
        };
        let run = self.ctx.run();
        let completion = Arc::new(Completion {
            job_id: run.job_id,
            fence: run.fence,
            saga: Some((self.ctx.saga_id, self.saga.version())),
            result,
            steps: self.ctx.steps_so_far(),
            revocable: self.saga.pivot() >= steps.len(),
        });
        let done = self
            .ctx
            .call(Dependency::Postgres, |deadline| {
                self.engine.complete.call(Arc::clone(&completion), deadline)
            })
            .await;
        match done {
            Ok(Completed::Done) => {
                self.count("succeeded");
                Ok(Ended::Ack)
            }
            Ok(Completed::Cancelled) => Box::pin(self.failed(&data, steps.len(), StepError::Cancelled)).await,
            Ok(Completed::Refused) => Box::pin(self.refused()).await,
            Err(error) => Box::pin(self.failed(&data, steps.len(), error)).await,
        }
    }

    /// The last moment at which everything can still be undone. A pivot that doesn't commit itself is announced in the log,
    /// because afterwards only the log can say that it may have taken effect.
    async fn before_pivot(
        &mut self,
        pivot: &dyn Step<S::Data>,
        i: usize,
        data: &S::Data,
    ) -> Result<(), StepError> {
        if self.pivot_begun {
            return Ok(());
        }
        self.result(data)?;
        if matches!(pivot.commits(), Commits::Begin | Commits::End) {
            return Ok(());
        }
        let advance = self.advance(i, data)?;
        let pivot = &self.engine.pivot;
        let begun = self
            .ctx
            .call(Dependency::Postgres, |deadline| pivot.call(Arc::clone(&advance), deadline))
            .await?;
        match begun {
            Some(true) => {
                self.pivot_begun = true;
                self.ctx.ignore_cancel();
                Ok(())
            }
            Some(false) => Err(StepError::Cancelled),
            None => Err(StepError::LeaseLost),
        }
    }

    /// Commits the data and that the steps before `next` are done.
    async fn keep(&self, next: usize, data: &S::Data) -> Result<(), StepError> {
        let advance = self.advance(next, data)?;
        let kept = self
            .ctx
            .call(Dependency::Postgres, |deadline| self.engine.keep.call(Arc::clone(&advance), deadline))
            .await?;
        if kept { Ok(()) } else { Err(StepError::LeaseLost) }
    }

    /// How far the run is, for the log.
    fn advance(&self, next: usize, data: &S::Data) -> Result<Arc<Advance>, StoreError> {
        let next_step = i16::try_from(next).unwrap_or(i16::MAX);
        Ok(Arc::new(Advance { run: self.ctx.run(), next_step, data: encode(data)? }))
    }

    /// Runs the branches that are not done at once. The outputs of those that succeed go into the data, whatever becomes of
    /// the others.
    async fn group(
        &self,
        branches: &[std::sync::Arc<dyn AnyBranch<S::Data>>],
        data: &mut S::Data,
        done: &mut Vec<String>,
    ) -> Result<(), StepError> {
        let failed = CancellationToken::new();
        let first: Mutex<Option<StepError>> = Mutex::default();
        let before = &*data;
        let left = branches.iter().filter(|branch| done.iter().all(|name| name != branch.name()));
        let ended = join_all(left.map(|branch| {
            let (ctx, first, failed) = (self.ctx.branch(failed.clone()), &first, &failed);
            async move {
                let outcome = self.tries(&ctx, Work::Branch(branch.as_ref(), before)).await;
                self.ctx.join(&ctx);
                // A branch that is put off has not failed: the others go on.
                if let Err(error) = &outcome
                    && !matches!(error, StepError::Snooze(_))
                {
                    first.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(|| error.clone());
                    failed.cancel();
                }
                (branch.name(), outcome)
            }
        }))
        .await;
        let mut first = first.into_inner().unwrap_or_else(PoisonError::into_inner);
        let mut put_off: Option<Duration> = None;
        let (mut lost, mut stopping) = (false, false);
        for (name, outcome) in ended {
            match outcome {
                Ok(keep) => match unless_it_panics(|| keep.map(|keep| keep(data))) {
                    Ok(_) => done.push(name.to_owned()),
                    Err(error) => _ = first.get_or_insert(error),
                },
                Err(StepError::LeaseLost) => lost = true,
                Err(StepError::Stopping) => stopping = true,
                Err(StepError::Snooze(wait)) => put_off = Some(put_off.map_or(wait, |w| w.min(wait))),
                Err(_) => {}
            }
        }
        match (lost, first, put_off) {
            (true, ..) => Err(StepError::LeaseLost),
            (_, Some(error), _) => Err(if stopping { StepError::Stopping } else { error }),
            (_, None, Some(wait)) => Err(StepError::Snooze(wait)),
            (_, None, None) => Ok(()),
        }
    }

    /// One step or branch, tried as its policy says.
    async fn tries(
        &self,
        ctx: &StepContext,
        mut work: Work<'_, S::Data>,
    ) -> Result<Option<Keep<S::Data>>, StepError> {
        let (name, timeout, retry) = (work.name(), work.timeout(), work.retry());
        let span = tracing::info_span!("step", step = name, saga = self.saga.kind());
        let (started_at, clock) = (Utc::now(), Instant::now());
        let mut waits = retry.waits();
        let mut attempts = 0;
        let outcome = loop {
            attempts += 1;
            let tried = ctx.within(timeout, self.once(ctx, &mut work)).instrument(span.clone()).await;
            let error = match tried {
                Ok(keep) => break Ok(keep),
                Err(error) => error,
            };
            if ctx.group.is_cancelled() {
                break Err(error);
            }
            let Some(wait) = error.class().filter(|class| class.is_retryable()).and_then(|_| waits.next())
            else {
                break Err(error);
            };
            // A step waits for no longer than its own policy says; the job can.
            let wish = error.retry_after().unwrap_or_default();
            if wish > retry.cap {
                break Err(error);
            }
            let wait = wait.max(wish);
            tracing::debug!(step = name, attempts, %error, "step failed; trying again");
            if let Err(ended) = ctx.pause(wait).await {
                // What the branch itself failed of says more than that another one failed, too.
                break Err(if ctx.group.is_cancelled() { error } else { ended });
            }
        };
        histogram!("saga_step_duration_seconds", "saga" => self.saga.kind(), "step_name" => name)
            .record(clock.elapsed().as_secs_f64());
        // A step that waits has neither succeeded nor failed; the log has the wait.
        if !matches!(outcome, Err(StepError::Snooze(_))) {
            ctx.record(StepRecord {
                step: name.into(),
                compensation: false,
                attempts,
                started_at,
                ended_at: Utc::now(),
                error: outcome.as_ref().err().map(|error| storable(error.to_string())),
            });
        }
        outcome
    }

    async fn once(
        &self,
        ctx: &StepContext,
        work: &mut Work<'_, S::Data>,
    ) -> Result<Option<Keep<S::Data>>, StepError> {
        crate::fault_point!(&format!("{}.{}.before", self.saga.kind(), work.name()), &self.ctx.job.payload);
        let keep = match work {
            Work::Step(step, data) => unless_panicked(step.execute(ctx, data)).await.map(|()| None)?,
            Work::Branch(branch, data) => Some(unless_panicked(branch.execute(ctx, data)).await?),
        };
        crate::fault_point!(&format!("{}.{}.after", self.saga.kind(), work.name()), &self.ctx.job.payload);
        Ok(keep)
    }

    /// What follows a step that did not succeed.
    async fn failed(self, data: &S::Data, step: usize, error: StepError) -> Result<Ended, StoreError> {
        // Of a pivot that was announced, an error that may pass doesn't say whether it took effect; one that can't pass does.
        let unsure =
            self.pivot_begun && step == self.saga.pivot() && error.class().is_some_and(Class::is_retryable);
        let past_pivot = step > self.saga.pivot() || unsure;
        match error {
            StepError::LeaseLost => self.refused().await,
            StepError::Stopping => {
                let next = i16::try_from(step).unwrap_or(i16::MAX);
                self.give_back(Duration::ZERO, Some((next, data))).await
            }
            StepError::Snooze(wait) => {
                self.count("snoozed");
                let next = i16::try_from(step).unwrap_or(i16::MAX);
                self.give_back(wait.min(LONGEST_WAIT), Some((next, data))).await
            }
            // From the pivot on there is no way back: again and again, uncharged, or a person.
            ref error if past_pivot && error.class().is_none_or(Class::is_retryable) => {
                let next = i16::try_from(step).unwrap_or(i16::MAX);
                let wait = self.engine.retry_in(self.saga.attempts(), self.ctx.job.deliveries, error);
                self.give_back(wait, Some((next, data))).await
            }
            error if past_pivot => {
                // Where it stands comes along: before the pivot's place in the log it would be undone by a retry.
                let (next, data) = (i16::try_from(step).unwrap_or(i16::MAX), self.for_log(data));
                let error = error.to_string();
                let progress = data.as_ref().map(|data| (next, data));
                self.park_at(&Parking { verdict: None, error: &error, past_pivot, progress }).await
            }
            StepError::Cancelled => self.turn_back(data, Verdict::Cancelled).await,
            StepError::Superseded => self.turn_back(data, Verdict::Superseded).await,
            error => {
                let job = &self.ctx.job;
                let retryable = error.class().is_some_and(Class::is_retryable);
                let failure = failure(&error);
                let policy = self.saga.attempts();
                let allowed = policy.max_attempts.unwrap_or(i32::MAX).min(job.max_attempts);
                let verdict = if retryable && job.attempts + 1 < allowed {
                    let wait = self.engine.retry_in(policy, job.attempts, &error);
                    Verdict::Retry {
                        failure,
                        retry_in_ms: u64::try_from(wait.as_millis()).unwrap_or(u64::MAX),
                    }
                } else {
                    Verdict::Dead { failure }
                };
                self.turn_back(data, verdict).await
            }
        }
    }

    /// Ends the job as the verdict says.
    async fn finish(&self, run: Run, verdict: Verdict) -> Result<Ended, StoreError> {
        let ending = Arc::new(Ending { run, verdict, steps: self.ctx.steps_so_far() });
        let done = self
            .ctx
            .call(Dependency::Postgres, |deadline| self.engine.finish.call(Arc::clone(&ending), deadline))
            .await;
        let verdict = &ending.verdict;
        match done {
            Ok(written @ (Written::Kept | Written::AtOnce)) => {
                self.count(verdict.status());
                if matches!(verdict, Verdict::Dead { .. }) {
                    self.ctx.lease.note_dead();
                }
                Ok(match verdict {
                    Verdict::Retry { .. } if written == Written::AtOnce => Ended::Release(Duration::ZERO),
                    Verdict::Retry { retry_in_ms, .. } => Ended::Release(Duration::from_millis(*retry_in_ms)),
                    _ => Ended::Ack,
                })
            }
            Ok(Written::Refused) | Err(StepError::LeaseLost) => self.refused().await,
            Err(StepError::Store(error)) => Err(error),
            Err(_) => self.give_back(Duration::ZERO, None::<(i16, &S::Data)>).await,
        }
    }

    /// The data for the log. `None`, which leaves it the data that it has: they can't be encoded.
    fn for_log(&self, data: &S::Data) -> Option<Value> {
        encode(data).inspect_err(|error| self.warn_unlogged(error)).ok()
    }

    fn warn_unlogged(&self, error: &StoreError) {
        tracing::warn!(job = %self.ctx.job.id, saga = %self.ctx.saga_id, %error, "the run's data can't be logged: the log keeps those that it has");
    }

    /// Gives the job back, uncharged; the next delivery goes on from the log.
    async fn give_back(
        &self,
        wait: Duration,
        progress: Option<(i16, &S::Data)>,
    ) -> Result<Ended, StoreError> {
        let progress = progress.and_then(|(next, data)| Some((next, self.for_log(data)?)));
        let progress = progress.as_ref().map(|(next, data)| (*next, data, self.done.as_slice()));
        let (run, records) = (self.ctx.run(), self.ctx.steps_so_far());
        let postgres = &self.engine.postgres;
        let suspended = match postgres.in_time(postgres.suspend(&run, wait, progress, &records)).await {
            // The next delivery does again what the log doesn't know of, as after a crash.
            Err(error) if !error.class.is_retryable() && progress.is_some() => {
                self.warn_unlogged(&error);
                let wait = wait.max(REFUSED_FOR);
                Box::pin(postgres.in_time(postgres.suspend(&run, wait, None, &records))).await
            }
            suspended => suspended,
        };
        match suspended? {
            Some(wait) => Ok(Ended::Release(wait)),
            None => self.refused().await,
        }
    }

    /// Needs a person: effects stand that could neither be finished nor undone.
    async fn park(&self, verdict: Option<&Verdict>, error: &str) -> Result<Ended, StoreError> {
        self.park_at(&Parking { verdict, error, past_pivot: true, progress: None }).await
    }

    async fn park_at(&self, parking: &Parking<'_>) -> Result<Ended, StoreError> {
        let Parking { verdict, error, past_pivot, progress } = *parking;
        let error = storable(error.to_owned());
        tracing::error!(saga = %self.ctx.saga_id, job = %self.ctx.job.id, error, "saga parked: it needs a person");
        let parking = Parking { verdict, error: &error, past_pivot, progress };
        let (run, records) = (self.ctx.run(), self.ctx.steps_so_far());
        let postgres = &self.engine.postgres;
        let parked = match postgres.in_time(postgres.park(&run, &parking, &records)).await {
            // A retry goes on from where the log has the run, which knows that its pivot has begun.
            Err(error) if !error.class.is_retryable() && progress.is_some() => {
                self.warn_unlogged(&error);
                let parking = Parking { progress: None, ..parking };
                Box::pin(postgres.in_time(postgres.park(&run, &parking, &records))).await
            }
            parked => parked,
        };
        if parked? {
            self.count("parked");
            self.ctx.lease.note_dead();
            Ok(Ended::Ack)
        } else {
            self.refused().await
        }
    }

    /// The fence refused. Either the job is somebody else's, or an earlier answer was lost and it has ended
    /// (PROTOCOL.md 20): the ledger knows.
    async fn refused(&self) -> Result<Ended, StoreError> {
        let postgres = &self.engine.postgres;
        let standing = postgres.in_time(postgres.standing(self.ctx.job.id)).await?;
        Ok(match standing {
            Some((state, fence)) if fence == self.ctx.fence() && state != "running" => {
                if state == "waiting" {
                    Ended::Release(Duration::ZERO)
                } else {
                    Ended::Ack
                }
            }
            _ => Ended::Abandoned,
        })
    }

    fn is_poison(&self) -> bool {
        self.ctx.job.lost_alone >= self.engine.settings.delivery_limit
    }

    fn poison(&self) -> Failure {
        failure(&StepError::permanent(
            "poison",
            format!(
                "its worker died {} times while it ran this job alone ({} deliveries, {} lost)",
                self.ctx.job.lost_alone, self.ctx.job.deliveries, self.ctx.job.lost_deliveries
            ),
        ))
    }

    fn count(&self, status: &'static str) {
        counter!("saga_executions_total", "saga" => self.saga.kind(), "status" => status).increment(1);
    }
}

/// A panic of the user's code is a failure that may pass, as any other of its kind: left to the task, the job would come back after
/// each lease for ever, uncharged.
async fn unless_panicked<T>(work: impl Future<Output = Result<T, StepError>>) -> Result<T, StepError> {
    AssertUnwindSafe(work).catch_unwind().await.unwrap_or_else(|panic| Err(panicked(panic.as_ref())))
}

/// The same for what is no future.
pub(super) fn unless_it_panics<T>(work: impl FnOnce() -> T) -> Result<T, StepError> {
    std::panic::catch_unwind(AssertUnwindSafe(work)).map_err(|panic| panicked(panic.as_ref()))
}

fn panicked(panic: &(dyn Any + Send)) -> StepError {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message");
    StepError::transient("panicked", format!("panicked: {text}"))
}

/// A run's data from the log, or why they can't be read.
fn decode<D: DeserializeOwned>(data: Value) -> Result<D, String> {
    let decoded = unless_it_panics(|| serde_json::from_value(data)).map_err(|panic| panic.to_string());
    decoded.and_then(|decoded| decoded.map_err(|error| error.to_string()))
}
