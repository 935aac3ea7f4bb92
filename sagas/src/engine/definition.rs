//! How a saga is defined: an ordered list of steps over typed data.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use queue::retries::back_off;
use serde::{Serialize, de::DeserializeOwned};

use super::StepContext;
use crate::{
    error::{Dependency, StepError},
    stores::postgres::take::TakenJob,
};

/// Tries of one step within one delivery of its job.
#[derive(Debug, Clone, Copy)]
pub struct RetryPolicy {
    /// Tries at most, the first included.
    pub tries: usize,
    /// Limit of the wait after the first failure; it doubles with each. The wait is random between zero and the limit.
    pub base: Duration,
    /// Where the limit stops doubling.
    pub cap: Duration,
}

impl RetryPolicy {
    /// A step's forward tries: quick, because the job itself has further attempts.
    pub const FORWARD: Self =
        Self { tries: 3, base: Duration::from_millis(200), cap: Duration::from_secs(2) };
    /// A compensation's tries: patient, because after them a person is needed.
    pub const PATIENT: Self =
        Self { tries: 20, base: Duration::from_millis(200), cap: Duration::from_secs(30) };

    /// The waits between tries.
    pub fn waits(self) -> impl Iterator<Item = Duration> {
        let doublings = 0..u32::try_from(self.tries.saturating_sub(1)).unwrap_or(u32::MAX);
        doublings.map(move |n| back_off(self.base, self.cap, n, rand::random()))
    }
}

/// Attempts of the jobs of one kind: after a failure a job is charged, waits, and is tried again as a new run. The wait is
/// random between zero and a limit that doubles with each attempt (full jitter, as in "Exponential Backoff And Jitter", AWS
/// 2015), and never shorter than what the error asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct JobRetry {
    /// Charged failures after which a job is dead, if that is fewer than the job itself allows. `None`: as the job says.
    pub max_attempts: Option<i32>,
    /// Limit of the wait before the second attempt. `None`: `FLOTILLA_RETRY_BASE_MS`.
    pub base: Option<Duration>,
    /// Where the limit stops doubling. `None`: `FLOTILLA_RETRY_CAP_MS`.
    pub cap: Option<Duration>,
}

/// What a step commits to the saga's log together with its own effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Commits {
    /// Nothing: the step is idempotent with known ids and needs no write before it.
    Nothing,
    /// The engine commits the data once the step has succeeded, under the fence: what the step learnt is there for the
    /// compensation and for later steps whatever dies, and the step is not executed again.
    Data,
    /// The saga's first row. Only the first step can.
    Begin,
    /// The job's success, so that no further forward step follows in this run. The pivot of ingest does.
    End,
}

/// One step of a saga over data `D`. Both directions are idempotent: a delivery after a crash runs them again.
#[async_trait]
pub trait Step<D>: Send + Sync {
    /// The name in log, metrics and traces.
    fn name(&self) -> &'static str;

    /// Does the step's work; may add to the data what later steps and the compensation need.
    async fn execute(&self, ctx: &StepContext, data: &mut D) -> Result<(), StepError>;

    /// Undoes whatever `execute` may have done, also when it did nothing or only half. Never called for the pivot and
    /// what follows it.
    async fn compensate(&self, ctx: &StepContext, data: &D) -> Result<(), StepError>;

    /// Longest time of one try, not counting time spent waiting for a dependency to come back.
    fn timeout(&self) -> Duration {
        Duration::from_secs(60)
    }

    /// Tries within one delivery.
    fn retry(&self) -> RetryPolicy {
        RetryPolicy::FORWARD
    }

    /// What the step itself writes to the log.
    fn commits(&self) -> Commits {
        Commits::Nothing
    }

    /// What is done at once instead of `execute` and `compensate`; see [`Group`]. Usually nothing.
    fn branches(&self) -> &[Arc<dyn AnyBranch<D>>] {
        &[]
    }
}

/// A part of a step that does several things at once; see [`Group`]. As it shares the data with the others, it reads it and
/// returns an output, which is put into the data when the whole group has ended.
#[async_trait]
pub trait Branch<D>: Send + Sync + 'static {
    /// What it brings.
    type Output: Send + 'static;

    /// The name in log, metrics and traces; no step and no other branch of the saga has it.
    fn name(&self) -> &'static str;

    /// Does the branch's work. Idempotent, as a step's.
    async fn execute(&self, ctx: &StepContext, data: &D) -> Result<Self::Output, StepError>;

    /// Puts the output where later steps and the compensation find it.
    fn keep(&self, output: Self::Output, data: &mut D);

    /// Undoes whatever `execute` may have done, also when it did nothing or only half.
    async fn compensate(&self, ctx: &StepContext, data: &D) -> Result<(), StepError>;

    /// Longest time of one try.
    fn timeout(&self) -> Duration {
        Duration::from_secs(60)
    }

    /// Tries within one delivery.
    fn retry(&self) -> RetryPolicy {
        RetryPolicy::FORWARD
    }
}

/// Puts a branch's output into the data.
pub type Keep<D> = Box<dyn FnOnce(&mut D) + Send>;

/// A [`Branch`] without its output's type, as the engine has it.
#[async_trait]
pub trait AnyBranch<D>: Send + Sync {
    /// As the branch's.
    fn name(&self) -> &'static str;
    /// As the branch's.
    fn timeout(&self) -> Duration;
    /// As the branch's.
    fn retry(&self) -> RetryPolicy;
    /// As the branch's, with the output on its way into the data.
    async fn execute(&self, ctx: &StepContext, data: &D) -> Result<Keep<D>, StepError>;
    /// As the branch's.
    async fn compensate(&self, ctx: &StepContext, data: &D) -> Result<(), StepError>;
}

struct Held<B>(Arc<B>);

#[async_trait]
impl<D: Send + Sync + 'static, B: Branch<D>> AnyBranch<D> for Held<B> {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn timeout(&self) -> Duration {
        self.0.timeout()
    }

    fn retry(&self) -> RetryPolicy {
        self.0.retry()
    }

    async fn execute(&self, ctx: &StepContext, data: &D) -> Result<Keep<D>, StepError> {
        let output = self.0.execute(ctx, data).await?;
        let branch = Arc::clone(&self.0);
        Ok(Box::new(move |data| branch.keep(output, data)))
    }

    async fn compensate(&self, ctx: &StepContext, data: &D) -> Result<(), StepError> {
        self.0.compensate(ctx, data).await
    }
}

/// A step whose branches run at once (fan-out), and which has succeeded when all have (fan-in).
///
/// Each branch is tried as its own policy says. Once one has failed for good, no other begins another try or waits for a
/// dependency any longer; a try under way is waited for, because what it does can't be called back, and
/// [`StepContext::is_cancelled`] tells it to hurry. Then all are undone, at once. A group can't be the pivot.
pub struct Group<D> {
    name: &'static str,
    branches: Vec<Arc<dyn AnyBranch<D>>>,
}

impl<D: Send + Sync + 'static> Group<D> {
    /// A group without branches.
    pub fn new(name: &'static str) -> Self {
        Self { name, branches: vec![] }
    }

    /// Adds a branch.
    #[must_use]
    pub fn with(mut self, branch: impl Branch<D>) -> Self {
        self.branches.push(Arc::new(Held(Arc::new(branch))));
        self
    }
}

#[async_trait]
impl<D: Send + Sync + 'static> Step<D> for Group<D> {
    fn name(&self) -> &'static str {
        self.name
    }

    /// One after the other; the engine runs the branches itself.
    async fn execute(&self, ctx: &StepContext, data: &mut D) -> Result<(), StepError> {
        for branch in &self.branches {
            branch.execute(ctx, data).await?(data);
        }
        Ok(())
    }

    async fn compensate(&self, ctx: &StepContext, data: &D) -> Result<(), StepError> {
        for branch in self.branches.iter().rev() {
            branch.compensate(ctx, data).await?;
        }
        Ok(())
    }

    fn branches(&self) -> &[Arc<dyn AnyBranch<D>>] {
        &self.branches
    }
}

/// A saga: how one kind of job is done. One file and one line in the registry define a new one.
pub trait Saga: Send + Sync + 'static {
    /// What is carried from step to step and kept in the log.
    type Data: Serialize + DeserializeOwned + Clone + Send + Sync + 'static;

    /// The job kind it serves.
    fn kind(&self) -> &'static str;

    /// Grows whenever the steps or the data change; a run is only ever continued by the version that began it. Register the
    /// older definition beside the newer one as long as it has runs.
    fn version(&self) -> i32;

    /// The steps in order.
    fn steps(&self) -> &[Arc<dyn Step<Self::Data>>];

    /// Index of the step after which the saga only goes forward. The number of the steps, if all can be undone.
    ///
    /// A pivot that doesn't commit to the log itself is announced there before it begins. From then on an error that may pass
    /// says nothing of whether it took effect: it is executed again until it succeeds, or says for good that it did not and
    /// will not.
    fn pivot(&self) -> usize;

    /// What must answer for jobs of this kind to be claimed.
    fn needs(&self) -> &[Dependency];

    /// Reads the job's request. An error is the job's own fault and makes it dead.
    fn prepare(&self, job: &TakenJob) -> Result<Self::Data, StepError>;

    /// Whether [`prepare`](Self::prepare) gives the same data, or the same error, whenever and wherever this version is asked
    /// for the same job: no new ids, no clocks, no look at anything else. Then the log needs no data until there is more
    /// than that, and a job's first run begins with its take, which saves a commit.
    fn repeatable(&self) -> bool {
        false
    }

    /// How often, and how far apart, jobs of this kind are tried.
    fn attempts(&self) -> JobRetry {
        JobRetry::default()
    }

    /// The job's result, for sagas that do not end with their pivot. At most `FLOTILLA_MAX_RESULT` bytes of JSON. Asked
    /// before the pivot, too, with the data so far: a result that is too large by then turns the run back; one that
    /// grows too large later parks it, because its effects stand.
    fn result(&self, _data: &Self::Data) -> serde_json::Value {
        serde_json::Value::Null
    }
}
