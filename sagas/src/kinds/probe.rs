//! `probe`: a saga as a user would write it, whose steps do nothing but leave rows in a table that is only ever added to; `nap`,
//! the same with a step whose data the log keeps and one that sleeps; and `revocable`, which has no pivot. In builds for tests
//! only, where they show that each job's effects count exactly once.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::{
    engine::{Commits, Saga, Step, StepContext},
    error::{Dependency, StepError},
    stores::postgres::{Postgres, take::TakenJob},
};

/// The job kind.
pub const KIND: &str = "probe";
/// The kind that keeps and sleeps.
pub const NAP: &str = "nap";
/// The kind of which all can be undone. Nothing is announced, so that the log's first word of a run that succeeds is its end.
pub const REVOCABLE: &str = "revocable";
/// Long enough to be put back, and to be delivered again.
const NAP_LASTS: Duration = Duration::from_millis(50);

/// Nothing is carried from step to step.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Nothing {}

pub(super) struct Probe {
    kind: &'static str,
    steps: Vec<Arc<dyn Step<Nothing>>>,
}

impl Probe {
    pub fn new(postgres: &Postgres) -> Self {
        Self::of(KIND, postgres)
    }

    pub fn napping(postgres: &Postgres) -> Self {
        Self::of(NAP, postgres)
    }

    pub fn revocable(postgres: &Postgres) -> Self {
        Self::of(REVOCABLE, postgres)
    }

    fn of(kind: &'static str, postgres: &Postgres) -> Self {
        let naps = kind == NAP;
        let steps = [("first", naps, false), ("second", false, naps), ("third", false, false)];
        let step = |(name, keeps, sleeps)| {
            Arc::new(Leave { name, keeps, sleeps, postgres: postgres.clone() }) as Arc<dyn Step<Nothing>>
        };
        Self { kind, steps: steps.map(step).into() }
    }
}

impl Saga for Probe {
    type Data = Nothing;

    fn kind(&self) -> &'static str {
        self.kind
    }

    fn version(&self) -> i32 {
        1
    }

    fn steps(&self) -> &[Arc<dyn Step<Nothing>>] {
        &self.steps
    }

    fn pivot(&self) -> usize {
        if self.kind == REVOCABLE { self.steps.len() } else { 2 }
    }

    fn needs(&self) -> &[Dependency] {
        &[Dependency::Postgres]
    }

    fn prepare(&self, _: &TakenJob) -> Result<Nothing, StepError> {
        Ok(Nothing {})
    }

    /// So that both ways to begin are there to be tried: with the take, and by a write of its own.
    fn repeatable(&self) -> bool {
        self.kind != NAP
    }
}

struct Leave {
    name: &'static str,
    keeps: bool,
    sleeps: bool,
    postgres: Postgres,
}

impl Leave {
    async fn leave(&self, ctx: &StepContext, undo: bool) -> Result<(), StepError> {
        let key = ctx.idempotency_key(self.name);
        let done = ctx
            .call(Dependency::Postgres, |_| {
                self.postgres.effect(ctx.job.id, ctx.fence(), self.name, &key, undo)
            })
            .await?;
        if done { Ok(()) } else { Err(StepError::LeaseLost) }
    }
}

#[async_trait]
impl Step<Nothing> for Leave {
    fn name(&self) -> &'static str {
        self.name
    }

    fn commits(&self) -> Commits {
        if self.keeps { Commits::Data } else { Commits::Nothing }
    }

    async fn execute(&self, ctx: &StepContext, _: &mut Nothing) -> Result<(), StepError> {
        if self.sleeps {
            ctx.sleep("nap", NAP_LASTS).await?;
        }
        self.leave(ctx, false).await
    }

    async fn compensate(&self, ctx: &StepContext, _: &Nothing) -> Result<(), StepError> {
        self.leave(ctx, true).await
    }
}
