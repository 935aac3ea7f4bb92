//! `probe`: a saga as a user would write it, whose steps do nothing but leave rows in a table that is only ever added to; `nap`,
//! the same with a step whose data the log keeps and one that sleeps; `revocable`, which has no pivot; and `gather`, whose first two
//! effects come at once, and whose third waits for a signal. In builds for tests only, where they show that each job's effects
//! count exactly once.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::{
    engine::{Branch, Commits, Group, Saga, Step, StepContext},
    error::{Dependency, StepError},
    stores::postgres::{Postgres, take::TakenJob},
};

/// The job kind.
pub const KIND: &str = "probe";
/// The kind that keeps and sleeps.
pub const NAP: &str = "nap";
/// The kind of which all can be undone. Nothing is announced, so that the log's first word of a run that succeeds is its end.
pub const REVOCABLE: &str = "revocable";
/// The kind that does two things at once, and then waits for a signal that doesn't come. All of it can be undone.
pub const GATHER: &str = "gather";
/// Long enough to be put back, and to be delivered again.
const NAP_LASTS: Duration = Duration::from_millis(50);

/// What a step does before it leaves its row.
#[derive(Clone, Copy)]
enum First {
    Nothing,
    Sleep,
    AwaitSignal,
}

/// Nothing is carried from step to step.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Nothing {}

pub(super) struct Probe {
    kind: &'static str,
    steps: Vec<Arc<dyn Step<Nothing>>>,
}

impl Probe {
    pub fn new(postgres: &Postgres) -> Self {
        Self::of(KIND, ["first", "second", "third"].map(|name| Leave::step(postgres, name)).into())
    }

    pub fn napping(postgres: &Postgres) -> Self {
        let first = Leave { keeps: true, ..Leave::new(postgres, "first") };
        let second = Leave { first: First::Sleep, ..Leave::new(postgres, "second") };
        Self::of(NAP, vec![Arc::new(first), Arc::new(second), Leave::step(postgres, "third")])
    }

    pub fn revocable(postgres: &Postgres) -> Self {
        Self { kind: REVOCABLE, ..Self::new(postgres) }
    }

    pub fn gathering(postgres: &Postgres) -> Self {
        let both = ["first", "second"].map(|name| Leave::new(postgres, name));
        let both = both.into_iter().fold(Group::new("both"), Group::with);
        let third = Leave { first: First::AwaitSignal, ..Leave::new(postgres, "third") };
        Self::of(GATHER, vec![Arc::new(both), Arc::new(third)])
    }

    fn of(kind: &'static str, steps: Vec<Arc<dyn Step<Nothing>>>) -> Self {
        Self { kind, steps }
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
        if matches!(self.kind, REVOCABLE | GATHER) { self.steps.len() } else { 2 }
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
    first: First,
    postgres: Postgres,
}

impl Leave {
    fn new(postgres: &Postgres, name: &'static str) -> Self {
        Self { name, keeps: false, first: First::Nothing, postgres: postgres.clone() }
    }

    fn step(postgres: &Postgres, name: &'static str) -> Arc<dyn Step<Nothing>> {
        Arc::new(Self::new(postgres, name))
    }

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
        match self.first {
            First::Nothing => {}
            First::Sleep => ctx.sleep("nap", NAP_LASTS).await?,
            // Nobody sends it.
            First::AwaitSignal => _ = ctx.signal::<serde_json::Value>("go", NAP_LASTS).await?,
        }
        self.leave(ctx, false).await
    }

    async fn compensate(&self, ctx: &StepContext, _: &Nothing) -> Result<(), StepError> {
        self.leave(ctx, true).await
    }
}

#[async_trait]
impl Branch<Nothing> for Leave {
    type Output = ();

    fn name(&self) -> &'static str {
        self.name
    }

    async fn execute(&self, ctx: &StepContext, _: &Nothing) -> Result<(), StepError> {
        self.leave(ctx, false).await
    }

    fn keep(&self, (): (), _: &mut Nothing) {}

    async fn compensate(&self, ctx: &StepContext, _: &Nothing) -> Result<(), StepError> {
        self.leave(ctx, true).await
    }
}
