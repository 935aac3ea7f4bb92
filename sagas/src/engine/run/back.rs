//! The way back: the decision to compensate is committed first, then every step before the pivot is undone, last first.

use std::{sync::Arc, time::Duration};

use chrono::Utc;
use futures::future::join_all;
use metrics::counter;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use super::{Drive, REFUSED_FOR, unless_panicked};
use crate::{
    engine::{AnyBranch, Ended, LONGEST_WAIT, RetryPolicy, Saga, Step, StepContext},
    error::{Dependency, StepError, StoreError, storable},
    fault::without,
    stores::postgres::{
        compensation::{Turn, Turning},
        ending::Verdict,
        take::StepRecord,
    },
};

/// What is undone: a step, or a branch of one.
enum Undo<'w, D> {
    Step(&'w dyn Step<D>),
    Branch(&'w dyn AnyBranch<D>),
}

impl<D> Undo<'_, D> {
    fn name(&self) -> &'static str {
        match self {
            Self::Step(step) => step.name(),
            Self::Branch(branch) => branch.name(),
        }
    }

    fn timeout(&self) -> Duration {
        match self {
            Self::Step(step) => step.timeout(),
            Self::Branch(branch) => branch.timeout(),
        }
    }
}

impl<S: Saga> Drive<'_, S> {
    /// Commits the decision to compensate, then compensates.
    pub(super) async fn turn_back(mut self, data: &S::Data, verdict: Verdict) -> Result<Ended, StoreError> {
        self.ctx.compensating = true;
        let reason = match &verdict {
            Verdict::Retry { failure, .. } | Verdict::Dead { failure } => failure.error.clone(),
            Verdict::Cancelled => "cancelled on request".to_owned(),
            Verdict::Superseded => "superseded by a later job".to_owned(),
        };
        let turning = Arc::new(Turning {
            run: self.ctx.run(),
            verdict,
            error: reason,
            data: self.for_log(data),
            pivot: i16::try_from(self.saga.pivot()).unwrap_or(i16::MAX),
            definition_version: self.saga.version(),
        });
        let begun = match self.turn(Arc::clone(&turning)).await {
            // Compensations have to do with what the log has in any case: a worker may die before it can turn its run.
            Err(StepError::Store(error)) if !error.class.is_retryable() && turning.data.is_some() => {
                self.warn_unlogged(&error);
                self.turn(Arc::new(Turning { data: None, ..Turning::clone(&turning) })).await
            }
            begun => begun,
        };
        match begun {
            Ok(Turn::Back) => self.backward(data, turning.verdict.clone()).await,
            Ok(Turn::LeaseLost) | Err(StepError::LeaseLost) => self.refused().await,
            Err(StepError::Store(error)) if !error.class.is_retryable() => {
                tracing::error!(job = %self.ctx.job.id, %error, "the log refuses that the run turns back");
                self.give_back(REFUSED_FOR, None).await
            }
            // The pivot had committed and only its answer failed, or the decision is not committed: the next delivery goes on
            // from the log.
            Ok(Turn::TooLate) | Err(_) => self.give_back(Duration::ZERO, None).await,
        }
    }

    async fn turn(&self, turning: Arc<Turning>) -> Result<Turn, StepError> {
        self.ctx
            .call(Dependency::Postgres, |deadline| {
                let call = self.engine.turn.call(Arc::clone(&turning), deadline);
                async { if without("engine.turn") { Ok(Turn::Back) } else { call.await } }
            })
            .await
    }

    /// Undoes every step before the pivot, last first. Forward steps are not logged one by one, so each may have run.
    pub(super) async fn backward(mut self, data: &S::Data, verdict: Verdict) -> Result<Ended, StoreError> {
        self.ctx.compensating = true;
        let steps = self.saga.steps().to_vec();
        for step in steps[..self.saga.pivot().min(steps.len())].iter().rev() {
            let undone = if step.branches().is_empty() {
                self.compensate(&self.ctx, &Undo::Step(step.as_ref()), data).await
            } else {
                self.undo_group(step.branches(), data).await
            };
            match undone {
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
        self.finish(self.ctx.run(), verdict).await
    }

    /// Undoes all branches of a group at once, and waits for all of them.
    async fn undo_group(
        &self,
        branches: &[Arc<dyn AnyBranch<S::Data>>],
        data: &S::Data,
    ) -> Result<(), StepError> {
        let undone = join_all(branches.iter().map(|branch| {
            let ctx = self.ctx.branch(CancellationToken::new());
            async move { self.compensate(&ctx, &Undo::Branch(branch.as_ref()), data).await }
        }))
        .await;
        // What can't be undone needs a person, but only once nothing else stands in the way of telling it.
        let rank = |error: &StepError| match error {
            StepError::LeaseLost => (0, Duration::ZERO),
            StepError::Stopping => (1, Duration::ZERO),
            StepError::Snooze(wait) => (2, *wait),
            _ => (3, Duration::ZERO),
        };
        undone.into_iter().filter_map(Result::err).min_by_key(rank).map_or(Ok(()), Err)
    }

    async fn compensate(
        &self,
        ctx: &StepContext,
        undo: &Undo<'_, S::Data>,
        data: &S::Data,
    ) -> Result<(), StepError> {
        let span = tracing::info_span!("compensate", step = undo.name(), saga = self.saga.kind());
        let started_at = Utc::now();
        let mut waits = RetryPolicy::PATIENT.waits();
        let (mut attempts, mut put_off) = (0, None);
        let outcome = loop {
            attempts += 1;
            let tried =
                ctx.within(undo.timeout(), self.undo_once(ctx, undo, data)).instrument(span.clone()).await;
            let Err(error) = tried else { break Ok(()) };
            let Some(wait) = error.class().filter(|class| class.is_retryable()).and_then(|_| waits.next())
            else {
                break Err(error);
            };
            tracing::warn!(step = undo.name(), attempts, %error, "compensation failed; trying again");
            // For longer than a try waits here the job waits without its slot, but not for ever.
            let wish = error.retry_after().unwrap_or_default();
            if wish > RetryPolicy::PATIENT.cap {
                put_off = self.may_put_off(undo.name()).await.then_some(wish);
                break Err(error);
            }
            if let Err(ended) = ctx.pause(wait.max(wish)).await {
                break Err(ended);
            }
        };
        // What is put off or cut short has neither succeeded nor failed.
        if matches!(outcome, Err(StepError::Snooze(_) | StepError::Stopping | StepError::LeaseLost)) {
            return outcome;
        }
        let status = if outcome.is_ok() { "succeeded" } else { "failed" };
        counter!("saga_compensation_total", "step_name" => undo.name(), "status" => status).increment(1);
        ctx.record(StepRecord {
            step: undo.name().into(),
            compensation: true,
            attempts,
            started_at,
            ended_at: Utc::now(),
            error: outcome.as_ref().err().map(|error| storable(error.to_string())),
        });
        put_off.map_or(outcome, |wish| Err(StepError::Snooze(wish)))
    }

    /// Whether a compensation that a store asks to come again later may: in as many deliveries as it has tries in one.
    async fn may_put_off(&self, step: &str) -> bool {
        let postgres = &self.engine.postgres;
        match postgres.in_time(postgres.failed_compensations(self.ctx.saga_id, step)).await {
            Ok(failed) => failed + 1 < RetryPolicy::PATIENT.tries,
            // Nothing can be parked now, either.
            Err(error) => {
                tracing::warn!(%error, step, "the log can't be read; the compensation comes again later");
                true
            }
        }
    }

    async fn undo_once(
        &self,
        ctx: &StepContext,
        undo: &Undo<'_, S::Data>,
        data: &S::Data,
    ) -> Result<(), StepError> {
        crate::fault_point!(
            &format!("{}.{}.compensate.before", self.saga.kind(), undo.name()),
            &self.ctx.job.payload
        );
        match undo {
            Undo::Step(step) => unless_panicked(step.compensate(ctx, data)).await?,
            Undo::Branch(branch) => unless_panicked(branch.compensate(ctx, data)).await?,
        }
        crate::fault_point!(
            &format!("{}.{}.compensate.after", self.saga.kind(), undo.name()),
            &self.ctx.job.payload
        );
        Ok(())
    }
}
