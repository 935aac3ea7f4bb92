//! `mark`: a saga as a user would write it, whose steps do nothing but leave rows in a table that is only ever added to. It
//! shows whether each job's effects count exactly once.

use std::sync::Arc;

use async_trait::async_trait;
use sagas::{
    Dependency, StepError,
    engine::{Saga, Step, StepContext},
    stores::postgres::{Postgres, take::TakenJob},
};
use serde::{Deserialize, Serialize};

/// The job kind, and its queue.
pub const KIND: &str = "mark";
/// The steps, in order; the last is the pivot.
pub const STEPS: [&str; 3] = ["first", "second", "third"];

/// `change` is 1 for an effect, -1 for its undoing, 0 for a try that found its work done.
pub const TABLE: &str = "CREATE TABLE public.marks (
    seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, job uuid NOT NULL, step text NOT NULL, key text NOT NULL,
    fence bigint NOT NULL, change integer NOT NULL)";

/// The payload, carried through the steps.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// The last step refuses for good, once the others have had their effects.
    #[serde(default)]
    pub fail: bool,
    /// Time that each step takes, in milliseconds, so that faults find it under way.
    #[serde(default)]
    pub takes_ms: u64,
}

pub struct Mark(Vec<Arc<dyn Step<Request>>>);

impl Mark {
    pub fn new(postgres: &Postgres) -> Self {
        Self(
            STEPS
                .map(|name| Arc::new(Leave { name, postgres: postgres.clone() }) as Arc<dyn Step<Request>>)
                .into(),
        )
    }
}

impl Saga for Mark {
    type Data = Request;

    fn kind(&self) -> &'static str {
        KIND
    }

    fn version(&self) -> i32 {
        1
    }

    fn steps(&self) -> &[Arc<dyn Step<Request>>] {
        &self.0
    }

    fn pivot(&self) -> usize {
        STEPS.len() - 1
    }

    fn needs(&self) -> &[Dependency] {
        &[Dependency::Postgres]
    }

    fn prepare(&self, job: &TakenJob) -> Result<Request, StepError> {
        Request::deserialize(&job.payload)
            .map_err(|error| StepError::permanent("bad_payload", format!("payload: {error}")))
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
            .call(Dependency::Postgres, |_| async {
                let Some(mut fenced) = self.postgres.fenced(ctx.job.id, ctx.fence()).await? else {
                    return Ok(false);
                };
                sqlx::query(
                    "INSERT INTO public.marks (job, step, key, fence, change)
                     SELECT $1, $2, $3, $4, CASE WHEN $5 THEN -net ELSE 1 - net END
                     FROM (SELECT coalesce(sum(change), 0)::integer AS net FROM public.marks WHERE key = $3) AS before",
                )
                .bind(ctx.job.id.0)
                .bind(self.name)
                .bind(&key)
                .bind(ctx.fence().0)
                .bind(undo)
                .execute(fenced.connection())
                .await?;
                fenced.commit().await?;
                Ok(true)
            })
            .await?;
        if done { Ok(()) } else { Err(StepError::LeaseLost) }
    }
}

#[async_trait]
impl Step<Request> for Leave {
    fn name(&self) -> &'static str {
        self.name
    }

    async fn execute(&self, ctx: &StepContext, request: &mut Request) -> Result<(), StepError> {
        ctx.pause(std::time::Duration::from_millis(request.takes_ms)).await?;
        if request.fail && self.name == STEPS[STEPS.len() - 1] {
            return Err(StepError::permanent("asked_to_fail", "the payload asks for a failure"));
        }
        self.leave(ctx, false).await
    }

    async fn compensate(&self, ctx: &StepContext, _: &Request) -> Result<(), StepError> {
        self.leave(ctx, true).await
    }
}
