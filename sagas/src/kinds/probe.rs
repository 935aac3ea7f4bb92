//! `probe`: a saga as a user would write it, whose steps do nothing but leave rows in a table that is only ever added to. In
//! builds for tests only, where it shows that each job's effects count exactly once.

use std::sync::Arc;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::{
    engine::{Saga, Step, StepContext},
    error::{Dependency, StepError},
    stores::postgres::{Postgres, take::TakenJob},
};

/// The job kind.
pub const KIND: &str = "probe";

/// Nothing is carried from step to step.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Nothing {}

pub(super) struct Probe(Vec<Arc<dyn Step<Nothing>>>);

impl Probe {
    pub fn new(postgres: &Postgres) -> Self {
        Self(
            ["first", "second", "third"]
                .map(|name| Arc::new(Leave { name, postgres: postgres.clone() }) as Arc<dyn Step<Nothing>>)
                .into(),
        )
    }
}

impl Saga for Probe {
    type Data = Nothing;

    fn kind(&self) -> &'static str {
        KIND
    }

    fn version(&self) -> i32 {
        1
    }

    fn steps(&self) -> &[Arc<dyn Step<Nothing>>] {
        &self.0
    }

    fn pivot(&self) -> usize {
        2
    }

    fn needs(&self) -> &[Dependency] {
        &[Dependency::Postgres]
    }

    fn prepare(&self, _: &TakenJob) -> Result<Nothing, StepError> {
        Ok(Nothing {})
    }
}

struct Leave {
    name: &'static str,
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

    async fn execute(&self, ctx: &StepContext, _: &mut Nothing) -> Result<(), StepError> {
        self.leave(ctx, false).await
    }

    async fn compensate(&self, ctx: &StepContext, _: &Nothing) -> Result<(), StepError> {
        self.leave(ctx, true).await
    }
}
