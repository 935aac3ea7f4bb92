//! One delivery of one job: forward from where the log says, or backward.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use chrono::Utc;
use metrics::{counter, gauge, histogram};
use tracing::Instrument;
use uuid::Uuid;

use super::{
    AnySaga, Commits, Delivery, Ended, Engine, LONGEST_WAIT, RetryPolicy, Saga, Step, StepContext, encode,
    failure,
};
use crate::{
    error::{Class, Dependency, StepError, StoreError},
    results::fits,
    stores::postgres::{
        ending::{Completion, Failure, Run, Verdict},
        stage::NewSaga,
        take::{OpenSaga, StepRecord},
    },
};

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
            points.extend(["before", "after"].map(|at| format!("{kind}.{}.{at}", step.name())));
            if i < pivot {
                points
                    .extend(["before", "after"].map(|at| format!("{kind}.{}.compensate.{at}", step.name())));
            }
        }
        points
    }

    async fn drive(&self, engine: &Engine, delivery: Delivery) -> Result<Ended, StoreError> {
        let kind = self.0.kind();
        gauge!("saga_active_count", "saga" => kind).increment(1.0);
        let ended = Drive::new(&self.0, engine, delivery).run().await;
        gauge!("saga_active_count", "saga" => kind).decrement(1.0);
        ended
    }
}

struct Drive<'a, S: Saga> {
    saga: &'a S,
    engine: &'a Engine,
    open: Option<OpenSaga>,
    ctx: StepContext,
}

impl<'a, S: Saga> Drive<'a, S> {
    fn new(saga: &'a S, engine: &'a Engine, delivery: Delivery) -> Self {
        let open = delivery.job.saga.clone();
        let saga_id = open.as_ref().map_or_else(Uuid::now_v7, |open| open.id);
        let ctx = StepContext::new(
            delivery.job,
            saga_id,
            open.is_some(),
            engine.worker.clone(),
            delivery.lease,
            engine.breakers.clone(),
            engine.settings.calls,
            engine.reporter.clone(),
            delivery.cancel,
            delivery.stop,
        );
        Self { saga, engine, open, ctx }
    }

    async fn run(mut self) -> Result<Ended, StoreError> {
        let Some(open) = self.open.take() else { return self.first_delivery().await };
        if open.definition_version != self.saga.version() {
            return self.other_version(&open).await;
        }
        let data: S::Data = match serde_json::from_value(open.data.clone()) {
            Ok(data) => data,
            Err(error) => return self.park(None, &format!("the saga's data can't be read: {error}")).await,
        };
        let past_pivot = usize::try_from(open.next_step).is_ok_and(|next| next > self.saga.pivot());
        if open.compensating {
            let verdict = open.verdict.clone().and_then(|v| serde_json::from_value(v).ok());
            let Some(verdict) = verdict else {
                return self.park(None, "the saga's verdict can't be read").await;
            };
            if open.lost_compensating >= self.engine.settings.delivery_limit {
                return self.park(Some(&verdict), "its compensation kills its workers").await;
            }
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
        self.forward(data, open.next_step.unsigned_abs().into()).await
    }

    async fn first_delivery(self) -> Result<Ended, StoreError> {
        let verdict = if self.is_poison() {
            Verdict::Dead { failure: self.poison() }
        } else if self.ctx.job.cancel_requested {
            Verdict::Cancelled
        } else {
            match self.saga.prepare(&self.ctx.job) {
                Ok(data) => {
                    if self.saga.steps().first().is_none_or(|step| step.commits() != Commits::Begin)
                        && let Err(error) = self.begin(&data).await
                    {
                        return self.failed(&data, 0, error).await;
                    }
                    return self.forward(data, 0).await;
                }
                Err(error) => Verdict::Dead { failure: failure(&error) },
            }
        };
        self.finish(&Run { saga_id: None, ..self.ctx.run() }, &verdict).await
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

    async fn forward(self, mut data: S::Data, from: usize) -> Result<Ended, StoreError> {
        let steps = self.saga.steps().to_vec();
        for (i, step) in steps.iter().enumerate().skip(from) {
            // Now it can still be undone.
            if i == self.saga.pivot()
                && let Err(error) = fits(&self.saga.result(&data), self.engine.settings.max_result)
            {
                return self.failed(&data, i, error).await;
            }
            if let Err(error) = self.execute(step.as_ref(), &mut data).await {
                return self.failed(&data, i, error).await;
            }
            if step.commits() == Commits::End {
                self.count("succeeded");
                return Ok(Ended::Ack);
            }
        }
        let result = self.saga.result(&data);
        if let Err(error) = fits(&result, self.engine.settings.max_result) {
            return self.failed(&data, steps.len(), error).await;
        }
        let run = self.ctx.run();
        let completion = Arc::new(Completion {
            job_id: run.job_id,
            fence: run.fence,
            saga_id: run.saga_id,
            result,
            steps: self.ctx.steps_so_far(),
        });
        let done = self
            .ctx
            .call(Dependency::Postgres, |deadline| {
                self.engine.complete.call(Arc::clone(&completion), deadline)
            })
            .await;
        match done {
            Ok(true) => {
                self.count("succeeded");
                Ok(Ended::Ack)
            }
            Ok(false) => self.refused().await,
            Err(error) => self.failed(&data, steps.len(), error).await,
        }
    }

    /// One step, tried as its policy says.
    async fn execute(&self, step: &dyn Step<S::Data>, data: &mut S::Data) -> Result<(), StepError> {
        let span = tracing::info_span!("step", step = step.name(), saga = self.saga.kind());
        let (started_at, clock) = (Utc::now(), Instant::now());
        let mut waits = step.retry().waits();
        let mut attempts = 0;
        let outcome = loop {
            attempts += 1;
            let tried = self.ctx.within(step.timeout(), self.once(step, data)).instrument(span.clone()).await;
            let error = match tried {
                Ok(()) => break Ok(()),
                Err(error) => error,
            };
            let Some(wait) = error.class().filter(|class| class.is_retryable()).and_then(|_| waits.next())
            else {
                break Err(error);
            };
            // A step waits for no longer than its own policy says; the job can.
            let wish = error.retry_after().unwrap_or_default();
            if wish > step.retry().cap {
                break Err(error);
            }
            let wait = wait.max(wish);
            tracing::debug!(step = step.name(), attempts, %error, "step failed; trying again");
            if let Err(ended) = self.ctx.pause(wait).await {
                break Err(ended);
            }
        };
        histogram!("saga_step_duration_seconds", "saga" => self.saga.kind(), "step_name" => step.name())
            .record(clock.elapsed().as_secs_f64());
        self.ctx.record(StepRecord {
            step: step.name().to_owned(),
            compensation: false,
            attempts,
            started_at,
            ended_at: Utc::now(),
            error: outcome.as_ref().err().map(ToString::to_string),
        });
        outcome
    }

    async fn once(&self, step: &dyn Step<S::Data>, data: &mut S::Data) -> Result<(), StepError> {
        crate::fault_point!(&format!("{}.{}.before", self.saga.kind(), step.name()), &self.ctx.job.payload);
        step.execute(&self.ctx, data).await?;
        crate::fault_point!(&format!("{}.{}.after", self.saga.kind(), step.name()), &self.ctx.job.payload);
        Ok(())
    }

    /// What follows a step that did not succeed.
    async fn failed(self, data: &S::Data, step: usize, error: StepError) -> Result<Ended, StoreError> {
        let past_pivot = step > self.saga.pivot();
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
            error if past_pivot => self.park(None, &error.to_string()).await,
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

    /// Commits the decision to compensate, then compensates.
    async fn turn_back(mut self, data: &S::Data, verdict: Verdict) -> Result<Ended, StoreError> {
        self.ctx.compensating = true;
        let reason = match &verdict {
            Verdict::Retry { failure, .. } | Verdict::Dead { failure } => failure.error.clone(),
            Verdict::Cancelled => "cancelled on request".to_owned(),
            Verdict::Superseded => "superseded by a later job".to_owned(),
        };
        let run = self.ctx.run();
        let begun = self
            .ctx
            .call(Dependency::Postgres, |_| self.engine.postgres.begin_compensation(&run, &verdict, &reason))
            .await;
        match begun {
            Ok(true) => self.backward(data, verdict).await,
            Ok(false) | Err(StepError::LeaseLost) => self.refused().await,
            // The decision is not committed, so the run still stands where it did.
            Err(_) => self.give_back(Duration::ZERO, None).await,
        }
    }

    /// Undoes every step before the pivot, last first. Forward steps are not logged one by one, so each may have run.
    async fn backward(mut self, data: &S::Data, verdict: Verdict) -> Result<Ended, StoreError> {
        self.ctx.compensating = true;
        let steps = self.saga.steps().to_vec();
        for step in steps[..self.saga.pivot().min(steps.len())].iter().rev() {
            match self.compensate(step.as_ref(), data).await {
                Ok(()) => {}
                Err(StepError::LeaseLost) => return self.refused().await,
                Err(StepError::Stopping) => return self.give_back(Duration::ZERO, None).await,
                Err(StepError::Snooze(wait)) => return self.give_back(wait.min(LONGEST_WAIT), None).await,
                Err(error) => {
                    let text = format!("compensation of {} failed: {error}", step.name());
                    return self.park(Some(&verdict), &text).await;
                }
            }
        }
        self.finish(&self.ctx.run(), &verdict).await
    }

    async fn compensate(&self, step: &dyn Step<S::Data>, data: &S::Data) -> Result<(), StepError> {
        let span = tracing::info_span!("compensate", step = step.name(), saga = self.saga.kind());
        let started_at = Utc::now();
        let mut waits = RetryPolicy::PATIENT.waits();
        let mut attempts = 0;
        let outcome = loop {
            attempts += 1;
            let tried =
                self.ctx.within(step.timeout(), self.undo_once(step, data)).instrument(span.clone()).await;
            let Err(error) = tried else { break Ok(()) };
            let Some(wait) = error.class().filter(|class| class.is_retryable()).and_then(|_| waits.next())
            else {
                break Err(error);
            };
            tracing::warn!(step = step.name(), attempts, %error, "compensation failed; trying again");
            if let Err(ended) = self.ctx.pause(wait).await {
                break Err(ended);
            }
        };
        let status = if outcome.is_ok() { "succeeded" } else { "failed" };
        counter!("saga_compensation_total", "step_name" => step.name(), "status" => status).increment(1);
        self.ctx.record(StepRecord {
            step: step.name().to_owned(),
            compensation: true,
            attempts,
            started_at,
            ended_at: Utc::now(),
            error: outcome.as_ref().err().map(ToString::to_string),
        });
        outcome
    }

    async fn undo_once(&self, step: &dyn Step<S::Data>, data: &S::Data) -> Result<(), StepError> {
        crate::fault_point!(
            &format!("{}.{}.compensate.before", self.saga.kind(), step.name()),
            &self.ctx.job.payload
        );
        step.compensate(&self.ctx, data).await?;
        crate::fault_point!(
            &format!("{}.{}.compensate.after", self.saga.kind(), step.name()),
            &self.ctx.job.payload
        );
        Ok(())
    }

    /// Ends the job as the verdict says.
    async fn finish(&self, run: &Run, verdict: &Verdict) -> Result<Ended, StoreError> {
        let records = self.ctx.steps_so_far();
        let done = self
            .ctx
            .call(Dependency::Postgres, |_| self.engine.postgres.finish(run, verdict, &records))
            .await;
        match done {
            Ok(true) => {
                self.count(verdict.status());
                Ok(match verdict {
                    Verdict::Retry { retry_in_ms, .. } => Ended::Release(Duration::from_millis(*retry_in_ms)),
                    _ => Ended::Ack,
                })
            }
            Ok(false) | Err(StepError::LeaseLost) => self.refused().await,
            Err(StepError::Store(error)) => Err(error),
            Err(_) => self.give_back(Duration::ZERO, None::<(i16, &S::Data)>).await,
        }
    }

    /// Gives the job back, uncharged; the next delivery goes on from the log.
    async fn give_back(
        &self,
        wait: Duration,
        progress: Option<(i16, &S::Data)>,
    ) -> Result<Ended, StoreError> {
        let progress = match progress {
            Some((next, data)) => Some((next, encode(data)?)),
            None => None,
        };
        let progress = progress.as_ref().map(|(next, data)| (*next, data));
        let kept = self.engine.postgres.release(&self.ctx.run(), wait, progress, false).await?;
        if kept { Ok(Ended::Release(wait)) } else { self.refused().await }
    }

    /// Needs a person: effects stand that could neither be finished nor undone.
    async fn park(&self, verdict: Option<&Verdict>, error: &str) -> Result<Ended, StoreError> {
        tracing::error!(saga = %self.ctx.saga_id, job = %self.ctx.job.id, error, "saga parked: it needs a person");
        let (run, records) = (self.ctx.run(), self.ctx.steps_so_far());
        if self.engine.postgres.park(&run, verdict, error, &records).await? {
            self.count("parked");
            Ok(Ended::Ack)
        } else {
            self.refused().await
        }
    }

    /// The fence refused. Either the job is somebody else's, or an earlier answer was lost and it has ended
    /// (PROTOCOL.md 20): the ledger knows.
    async fn refused(&self) -> Result<Ended, StoreError> {
        let standing = self.engine.postgres.standing(self.ctx.job.id).await?;
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

    /// A run begun by other steps than these is left to a worker that has them.
    async fn other_version(&self, open: &OpenSaga) -> Result<Ended, StoreError> {
        tracing::error!(
            saga = %open.id, kind = self.saga.kind(), begun_by = open.definition_version, here = self.saga.version(),
            "this worker's definition is another version than the one that began the run; released for one that has it"
        );
        self.give_back(Duration::from_secs(10), None).await
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
