//! How a saga is defined: an ordered list of steps over typed data.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use backon::{BackoffBuilder, ExponentialBuilder};
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
    /// Wait after the first failure; doubles with each, with full jitter.
    pub base: Duration,
    /// Longest wait.
    pub cap: Duration,
}

impl RetryPolicy {
    /// A step's forward tries: quick, because the job itself has further attempts.
    pub const FORWARD: Self =
        Self { tries: 3, base: Duration::from_millis(100), cap: Duration::from_secs(2) };
    /// A compensation's tries: patient, because after them a person is needed.
    pub const PATIENT: Self =
        Self { tries: 12, base: Duration::from_millis(200), cap: Duration::from_secs(30) };

    /// The waits between tries.
    pub fn waits(self) -> impl Iterator<Item = Duration> {
        ExponentialBuilder::default()
            .with_min_delay(self.base)
            .with_max_delay(self.cap)
            .with_factor(2.0)
            .with_jitter()
            .with_max_times(self.tries.saturating_sub(1))
            .build()
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
}

/// A saga: how one kind of job is done. One file and one line in the registry define a new one.
pub trait Saga: Send + Sync + 'static {
    /// What is carried from step to step and kept in the log.
    type Data: Serialize + DeserializeOwned + Clone + Send + Sync;

    /// The job kind it serves.
    fn kind(&self) -> &'static str;

    /// Grows whenever the steps or the data change; a run is only ever continued by the version that began it.
    fn version(&self) -> i32;

    /// The steps in order.
    fn steps(&self) -> &[Arc<dyn Step<Self::Data>>];

    /// Index of the step after which the saga only goes forward.
    fn pivot(&self) -> usize;

    /// What must answer for jobs of this kind to be claimed.
    fn needs(&self) -> &[Dependency];

    /// Reads the job's request. An error is the job's own fault and makes it dead.
    fn prepare(&self, job: &TakenJob) -> Result<Self::Data, StepError>;

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
