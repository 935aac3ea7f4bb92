//! What people and tools look at: jobs, sagas, counts.

use chrono::{DateTime, Utc};
use queue::JobId;
use serde::Serialize;
use serde_json::Value;
use sqlx::FromRow;
use uuid::Uuid;

use super::Postgres;
use crate::{
    error::StoreError,
    state::{JobState, RunState},
};

/// A job as people see it.
#[derive(Debug, Clone, PartialEq, Serialize, FromRow)]
pub struct JobView {
    /// The job.
    pub id: Uuid,
    /// What it does.
    pub kind: String,
    /// Where it waits or waited.
    pub queue: String,
    /// 0 to 9.
    pub priority: i16,
    /// Owner.
    pub tenant: String,
    /// How it stands.
    #[sqlx(try_from = "String")]
    pub state: JobState,
    /// More on how it ended.
    pub outcome: Option<String>,
    /// What it returned. A sealed one is shown for single jobs only, and where its key is.
    pub result: Option<Value>,
    /// The key that the result is sealed with.
    pub result_key_id: Option<String>,
    /// The caller's name of its document.
    pub document: Option<String>,
    /// Its place among that document's jobs.
    pub doc_order: Option<i64>,
    /// Takes.
    pub deliveries: i32,
    /// Takes that ended in a lost lease.
    pub lost_deliveries: i32,
    /// Charged failures.
    pub attempts: i32,
    /// Charged failures at which it is dead.
    pub max_attempts: i32,
    /// Not before.
    pub run_at: DateTime<Utc>,
    /// Who runs it, or ran it last.
    pub worker: Option<String>,
    /// The last charged error.
    pub last_error: Option<String>,
    /// The job that enqueued it.
    pub parent: Option<Uuid>,
    /// The dead job that it replays.
    pub replay_of: Option<Uuid>,
    /// The batch it is a member of.
    pub batch_id: Option<Uuid>,
    /// How far this delivery says it is, 0 to 100; of an ended job, how far it was.
    pub progress: Option<i16>,
    /// What it says about it.
    pub progress_message: Option<String>,
    /// W3C trace context.
    pub traceparent: Option<String>,
    /// When a person asked for its end.
    pub cancel_requested_at: Option<DateTime<Utc>>,
    /// When it was accepted.
    pub created_at: DateTime<Utc>,
    /// When it was last taken.
    pub taken_at: Option<DateTime<Utc>>,
    /// When it ended.
    pub finished_at: Option<DateTime<Utc>>,
}

/// Times beyond those that Rust knows ('infinity') are brought within.
const JOB: &str = "SELECT j.id, j.kind, j.queue, j.priority, j.tenant, j.state, j.outcome, j.result, j.result_key_id, d.key AS document, j.doc_order,
       j.deliveries, j.lost_deliveries, j.attempts, j.max_attempts,
       greatest(least(j.run_at, '9999-12-31 23:59Z'), 'epoch') AS run_at, j.worker, j.last_error, j.parent, j.replay_of,
       j.batch_id, p.percent AS progress, p.message AS progress_message, j.traceparent, j.cancel_requested_at, j.created_at,
       j.taken_at, j.finished_at
  FROM jobs j LEFT JOIN documents d ON d.id = j.document_id LEFT JOIN job_progress p ON p.job_id = j.id AND p.fence = j.fence";

/// Which jobs to list; newest first.
#[derive(Debug, Clone, Default)]
pub struct JobFilter {
    /// Only of this tenant.
    pub tenant: Option<String>,
    /// Only in this state.
    pub state: Option<JobState>,
    /// Only of this queue.
    pub queue: Option<String>,
    /// Only of this kind.
    pub kind: Option<String>,
    /// Only older ids: the last id of the page before.
    pub before: Option<Uuid>,
    /// Page length.
    pub limit: i64,
}

/// One charged failure.
#[derive(Debug, Clone, Serialize, FromRow)]
pub struct AttemptView {
    /// Counts from 1.
    pub attempt: i32,
    /// Who ran it.
    pub worker: String,
    /// When it was taken.
    pub started_at: DateTime<Utc>,
    /// When it failed.
    pub ended_at: DateTime<Utc>,
    /// `transient`, `timeout`, …
    pub class: String,
    /// What happened.
    pub error: String,
}

/// A saga run as people see it.
#[derive(Debug, Clone, Serialize, FromRow)]
pub struct SagaView {
    /// The run.
    pub id: Uuid,
    /// Its job.
    pub job_id: Uuid,
    /// Kind.
    pub kind: String,
    /// Version of its definition.
    pub definition_version: i32,
    /// Owner.
    pub tenant: String,
    /// How it stands.
    #[sqlx(try_from = "String")]
    pub state: RunState,
    /// First step not known to be done.
    pub next_step: i16,
    /// How the job ends after compensation.
    pub verdict: Option<Value>,
    /// What turned it backward.
    pub error: Option<String>,
    /// When it began.
    pub created_at: DateTime<Utc>,
    /// When it ended.
    pub finished_at: Option<DateTime<Utc>>,
    /// When a person closed it, being parked.
    pub resolved_at: Option<DateTime<Utc>>,
    /// Who.
    pub resolved_by: Option<String>,
    /// Why.
    pub resolution: Option<String>,
}

const SAGA: &str = "SELECT id, job_id, kind, definition_version, tenant, state, next_step, verdict, error, created_at, finished_at,
       resolved_at, resolved_by, resolution FROM saga_runs";

/// Which saga runs to list; newest first, where the first run of a job may be as old as the job.
#[derive(Debug, Clone, Default)]
pub struct SagaFilter {
    /// Only in this state.
    pub state: Option<RunState>,
    /// Only of this tenant.
    pub tenant: Option<String>,
    /// Only of this kind.
    pub kind: Option<String>,
    /// Only begun then or later.
    pub since: Option<DateTime<Utc>>,
    /// Only begun before.
    pub until: Option<DateTime<Utc>>,
    /// Only older ids: the last id of the page before.
    pub before: Option<Uuid>,
    /// Page length.
    pub limit: i64,
}

/// A step of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, FromRow)]
pub struct StepView {
    /// The delivery it belongs to.
    pub fence: i64,
    /// Place in that delivery.
    pub seq: i32,
    /// Its name.
    pub step_name: String,
    /// `execute` or `compensate`.
    pub direction: String,
    /// `succeeded` or `failed`.
    pub state: String,
    /// Tries.
    pub attempts: i32,
    /// First try began.
    pub started_at: DateTime<Utc>,
    /// Last try ended.
    pub ended_at: DateTime<Utc>,
    /// The last error.
    pub error: Option<String>,
}

/// How many jobs are in which state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, FromRow)]
pub struct JobCounts {
    /// Waiting, scheduled ones included.
    pub waiting: i64,
    /// Taken.
    pub running: i64,
    /// Ended well.
    pub succeeded: i64,
    /// Ended by a person.
    pub cancelled: i64,
    /// Ended as dead letters.
    pub dead: i64,
    /// Waiting for a person with effects standing.
    pub parked: i64,
    /// Jobs with more than one delivery.
    pub redelivered: i64,
}

impl Postgres {
    /// One job.
    pub async fn job(&self, id: JobId, tenant: Option<&str>) -> Result<Option<JobView>, StoreError> {
        let sql = format!("{JOB} WHERE j.id = $1 AND ($2::text IS NULL OR j.tenant = $2)");
        let job: Option<JobView> = sqlx::query_as(sqlx::AssertSqlSafe(sql))
            .bind(id.0)
            .bind(tenant)
            .fetch_optional(&self.pool)
            .await?;
        Ok(job.map(|job| self.open_result(job)))
    }

    /// These jobs, in no order; those that are gone are absent.
    pub async fn jobs_by_id(&self, ids: &[Uuid]) -> Result<Vec<JobView>, StoreError> {
        let sql = format!("{JOB} WHERE j.id = ANY($1)");
        Ok(sqlx::query_as(sqlx::AssertSqlSafe(sql)).bind(ids).fetch_all(&self.pool).await?)
    }

    /// A page of jobs, newest first.
    pub async fn jobs(&self, filter: &JobFilter) -> Result<Vec<JobView>, StoreError> {
        let sql = format!(
            "{JOB} WHERE ($1::text IS NULL OR j.tenant = $1) AND ($2::text IS NULL OR j.state = $2)
               AND ($3::text IS NULL OR j.queue = $3) AND ($4::text IS NULL OR j.kind = $4)
               AND ($5::uuid IS NULL OR j.id < $5) ORDER BY j.id DESC LIMIT $6"
        );
        let mut jobs: Vec<JobView> = sqlx::query_as(sqlx::AssertSqlSafe(sql))
            .bind(&filter.tenant)
            .bind(filter.state.map(JobState::as_str))
            .bind(&filter.queue)
            .bind(&filter.kind)
            .bind(filter.before)
            .bind(filter.limit)
            .fetch_all(&self.pool)
            .await?;
        for job in jobs.iter_mut().filter(|job| job.result_key_id.is_some()) {
            job.result = None;
        }
        Ok(jobs)
    }

    /// The states of these jobs, for waiting on many at once.
    pub async fn job_states(&self, ids: &[Uuid]) -> Result<Vec<(Uuid, String)>, StoreError> {
        Ok(sqlx::query_as("SELECT id, state FROM jobs WHERE id = ANY($1)")
            .bind(ids)
            .fetch_all(&self.pool)
            .await?)
    }

    /// The charged failures of a job.
    pub async fn attempts(&self, job: JobId) -> Result<Vec<AttemptView>, StoreError> {
        Ok(sqlx::query_as(
            "SELECT attempt, worker, started_at, ended_at, class, error FROM job_attempts WHERE job_id = $1 ORDER BY attempt",
        )
        .bind(job.0)
        .fetch_all(&self.pool)
        .await?)
    }

    /// The saga runs of a job, oldest first.
    pub async fn sagas_of(&self, job: JobId) -> Result<Vec<SagaView>, StoreError> {
        Ok(sqlx::query_as(sqlx::AssertSqlSafe(format!("{SAGA} WHERE job_id = $1 ORDER BY created_at")))
            .bind(job.0)
            .fetch_all(&self.pool)
            .await?)
    }

    /// One saga run.
    pub async fn saga(&self, id: Uuid) -> Result<Option<SagaView>, StoreError> {
        Ok(sqlx::query_as(sqlx::AssertSqlSafe(format!("{SAGA} WHERE id = $1")))
            .bind(id)
            .fetch_optional(&self.pool)
            .await?)
    }

    /// A page of saga runs, newest first.
    pub async fn sagas(&self, filter: &SagaFilter) -> Result<Vec<SagaView>, StoreError> {
        let sql = format!(
            "{SAGA} WHERE ($1::text IS NULL OR state = $1) AND ($2::text IS NULL OR tenant = $2)
               AND ($3::text IS NULL OR kind = $3) AND ($4::timestamptz IS NULL OR created_at >= $4)
               AND ($5::timestamptz IS NULL OR created_at < $5) AND ($6::uuid IS NULL OR id < $6)
             ORDER BY id DESC LIMIT $7"
        );
        Ok(sqlx::query_as(sqlx::AssertSqlSafe(sql))
            .bind(filter.state.map(RunState::as_str))
            .bind(&filter.tenant)
            .bind(&filter.kind)
            .bind(filter.since)
            .bind(filter.until)
            .bind(filter.before)
            .bind(filter.limit)
            .fetch_all(&self.pool)
            .await?)
    }

    /// The steps of a run in the order they happened.
    pub async fn steps(&self, saga: Uuid) -> Result<Vec<StepView>, StoreError> {
        Ok(sqlx::query_as(
            "SELECT fence, seq, step_name, direction, state, attempts, started_at, ended_at, error
             FROM saga_timeline WHERE saga_id = $1 ORDER BY fence, seq",
        )
        .bind(saga)
        .fetch_all(&self.pool)
        .await?)
    }

    /// In how many deliveries a step of a run could not be compensated since a person had the run go on, if one had.
    pub async fn failed_compensations(&self, saga: Uuid, step: &str) -> Result<usize, StoreError> {
        let failed: i64 = sqlx::query_scalar(
            "SELECT count(*) FROM saga_timeline t JOIN sagas s ON s.id = t.saga_id
             WHERE t.saga_id = $1 AND t.step_name = $2 AND t.direction = 'compensate' AND t.state = 'failed'
               AND t.fence > s.retried_fence",
        )
        .bind(saga)
        .bind(step)
        .fetch_one(&self.pool)
        .await?;
        Ok(usize::try_from(failed).unwrap_or(usize::MAX))
    }

    /// Counts of all jobs of the ledger, or of those accepted since. Reads them all, however long that takes.
    pub async fn job_counts(&self, since: Option<DateTime<Utc>>) -> Result<JobCounts, StoreError> {
        let mut tx = self.snapshot().await?;
        Ok(sqlx::query_as(
            "SELECT count(*) FILTER (WHERE state = 'waiting') AS waiting, count(*) FILTER (WHERE state = 'running') AS running,
                    count(*) FILTER (WHERE state = 'succeeded') AS succeeded, count(*) FILTER (WHERE state = 'cancelled') AS cancelled,
                    count(*) FILTER (WHERE state = 'dead') AS dead, count(*) FILTER (WHERE state = 'parked') AS parked,
                    count(*) FILTER (WHERE lost_deliveries > 0) AS redelivered
             FROM jobs WHERE $1::timestamptz IS NULL OR created_at >= $1",
        )
        .bind(since)
        .fetch_one(&mut *tx)
        .await?)
    }

    /// Open dead letters by kind and class, for the gauge.
    pub async fn dead_letter_counts(&self) -> Result<Vec<(String, String, i64)>, StoreError> {
        Ok(sqlx::query_as(
            "SELECT kind, class, count(*) FROM dead_letters WHERE state = 'open' GROUP BY 1, 2",
        )
        .fetch_all(&self.pool)
        .await?)
    }

    /// Parked sagas, for the gauge and its alert.
    pub async fn parked_count(&self) -> Result<i64, StoreError> {
        Ok(sqlx::query_scalar("SELECT count(*) FROM sagas WHERE state = 'parked'")
            .fetch_one(&self.pool)
            .await?)
    }
}
