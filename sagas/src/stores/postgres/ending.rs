//! How a run ends when not by its pivot: completed, released, retried, cancelled, superseded, dead or parked.
//! A job becomes dead here and nowhere else (PROTOCOL.md 12).

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use chrono::{DateTime, Utc};
use queue::{JobId, WorkerId, ledger::Written};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sqlx::{PgConnection, PgExecutor, types::Json};
use uuid::Uuid;

use super::{Fence, Postgres, lock_alive, take::StepRecord};
use crate::{
    coalescing::Batch,
    error::{Class, Dependency, StoreError},
    state::JobState,
};

/// Why a job failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What can be done about it.
    pub class: Class,
    /// The reason as a word: `empty_document`, `unknown_kind`, `poison`, …
    pub code: String,
    /// The reason as a sentence.
    pub error: String,
    /// The causes, outermost first.
    pub chain: Vec<String>,
}

/// How a job ends once its saga's effects are undone. Committed before the first compensating call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "end", rename_all = "snake_case")]
pub enum Verdict {
    /// Another attempt, as a new run, after `retry_in_ms`. Charged.
    Retry {
        /// Why.
        failure: Failure,
        /// Milliseconds until the next attempt.
        retry_in_ms: u64,
    },
    /// No attempt without a person: a dead letter.
    Dead {
        /// Why.
        failure: Failure,
    },
    /// As a person asked.
    Cancelled,
    /// A later job settled the document: succeeded, with nothing left to do.
    Superseded,
}

impl Verdict {
    /// The value of the label `status` of `saga_executions_total`.
    pub fn status(&self) -> &'static str {
        match self {
            Self::Retry { .. } => "retried",
            Self::Dead { .. } => "dead",
            Self::Cancelled => "cancelled",
            Self::Superseded => "superseded",
        }
    }

    /// The job's state afterwards.
    pub(super) fn state(&self) -> JobState {
        match self {
            Self::Retry { .. } => JobState::Waiting,
            Self::Dead { .. } => JobState::Dead,
            Self::Cancelled => JobState::Cancelled,
            Self::Superseded => JobState::Succeeded,
        }
    }

    /// How the job ended beyond its state.
    fn outcome(&self) -> Option<&'static str> {
        matches!(self, Self::Superseded).then_some("superseded")
    }

    /// What is charged.
    fn failure(&self) -> Option<&Failure> {
        match self {
            Self::Retry { failure, .. } | Self::Dead { failure } => Some(failure),
            Self::Cancelled | Self::Superseded => None,
        }
    }
}

/// Who ends what.
#[derive(Debug, Clone)]
pub struct Run {
    /// The job.
    pub job_id: JobId,
    /// Under this fence.
    pub fence: Fence,
    /// The saga's run, if one began.
    pub saga_id: Option<Uuid>,
    /// Who ran it.
    pub worker: WorkerId,
    /// When this delivery began.
    pub started_at: DateTime<Utc>,
}

impl Run {
    /// Whether the take under this fence began the run, so that the log may have no row of it.
    fn began_with_take(&self) -> bool {
        self.fence == Fence(1) && self.saga_id == Some(self.job_id.0)
    }
}

/// The end of a run whose effects are undone, or that has none.
#[derive(Debug, Clone)]
pub struct Ending {
    /// The run.
    pub run: Run,
    /// How its job ends.
    pub verdict: Verdict,
    /// The run's steps in this delivery.
    pub steps: Vec<StepRecord>,
}

/// The coalesced end by a verdict.
#[derive(Debug, Clone)]
pub struct FinishBatch(pub Postgres);

#[async_trait]
impl Batch for FinishBatch {
    type Item = Arc<Ending>;
    type Reply = Written;
    const OP: &'static str = "finish";
    const DEPENDENCY: Dependency = Dependency::Postgres;

    async fn flush(&self, items: &[Self::Item]) -> Result<Vec<Written>, StoreError> {
        self.0.finish_all(&items.iter().map(AsRef::as_ref).collect::<Vec<_>>()).await
    }
}

/// Why and where a run is parked.
#[derive(Debug, Clone, Copy)]
pub struct Parking<'a> {
    /// How the job was to end, if the run was on its way back.
    pub verdict: Option<&'a Verdict>,
    /// What a person has to know.
    pub error: &'a str,
    /// Of a run on its way forward: whether its effect is seen by readers.
    pub past_pivot: bool,
    /// Of a run on its way forward: the first step not known to be done, and the data; `None`: as the log has them.
    pub progress: Option<(i16, &'a Value)>,
}

/// Why a job is given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GivenBack {
    /// For so long by now no worker could run it; that clock runs on. A wait for a worker ends when a person wants the job's end, unless
    /// a run of it has begun, which only a worker that can run it can undo.
    Unroutable(Duration),
    /// Its handler asks for a wait, which ends when a person wants the job's end.
    Asked,
    /// It can't go on here for now, nor be ended: it waits as long as is said, whatever a person wants.
    Later,
}

/// The success of one job, and of its saga if it has one.
#[derive(Debug, Clone)]
pub struct Completion {
    /// The job.
    pub job_id: JobId,
    /// Under this fence.
    pub fence: Fence,
    /// The saga's run, and the version of the definition that ran it, for a run that has no row yet.
    pub saga: Option<(Uuid, i32)>,
    /// The job's result; null is none.
    pub result: Value,
    /// The run's steps in this delivery.
    pub steps: Vec<StepRecord>,
    /// Whether the run can still be undone, so that a person who wants the job's end gets it.
    pub revocable: bool,
}

/// What became of a success.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Completed {
    /// It is committed.
    Done,
    /// A person wants the job's end, and the run can still be undone.
    Cancelled,
    /// The fence refused, or the run has turned back: a success that was given up may come late.
    Refused,
}

/// The coalesced success.
#[derive(Debug, Clone)]
pub struct CompleteBatch(pub Postgres);

#[async_trait]
impl Batch for CompleteBatch {
    type Item = Arc<Completion>;
    type Reply = Completed;
    const OP: &'static str = "complete";
    const DEPENDENCY: Dependency = Dependency::Postgres;

    async fn flush(&self, items: &[Self::Item]) -> Result<Vec<Completed>, StoreError> {
        self.0.complete_all(items).await
    }
}

/// A step as the row of its run has it (`migrations/0026_steps_with_their_run.up.sql`). The last delivery of a run that is completed
/// has no compensation.
fn in_its_run(step: &StepRecord) -> (&str, i32, i64, i64, Option<&str>) {
    let began = step.started_at.timestamp_micros();
    (&step.step, step.attempts, began, step.ended_at.timestamp_micros() - began, step.error.as_deref())
}

/// Writes the steps of a run's delivery as rows of their own. The caller holds the fences.
pub(super) async fn insert_steps(
    connection: &mut PgConnection,
    runs: &[(Uuid, Fence, &[StepRecord])],
) -> Result<(), sqlx::Error> {
    let rows: Vec<(Uuid, Fence, i32, &StepRecord)> = runs
        .iter()
        .flat_map(|&(saga, fence, steps)| (0..).zip(steps).map(move |(seq, step)| (saga, fence, seq, step)))
        .collect();
    if rows.is_empty() {
        return Ok(());
    }
    sqlx::query(
        "INSERT INTO saga_steps (saga_id, fence, seq, step_name, direction, state, attempts, started_at, ended_at, error)
         SELECT saga_id, fence, seq, step, CASE WHEN compensation THEN 'compensate' ELSE 'execute' END,
                CASE WHEN error IS NULL THEN 'succeeded' ELSE 'failed' END, attempts, started_at, ended_at, error
         FROM unnest((SELECT $1::uuid[]), $2::bigint[], $3::integer[], $4::text[], $5::boolean[], $6::integer[],
                     $7::timestamptz[], $8::timestamptz[], $9::text[])
              AS s (saga_id, fence, seq, step, compensation, attempts, started_at, ended_at, error)
         ON CONFLICT (saga_id, fence, seq) DO NOTHING",
    )
    .bind(rows.iter().map(|(saga, ..)| *saga).collect::<Vec<_>>())
    .bind(rows.iter().map(|(_, fence, ..)| fence.0).collect::<Vec<_>>())
    .bind(rows.iter().map(|(_, _, seq, _)| *seq).collect::<Vec<_>>())
    .bind(rows.iter().map(|(.., step)| &*step.step).collect::<Vec<_>>())
    .bind(rows.iter().map(|(.., step)| step.compensation).collect::<Vec<_>>())
    .bind(rows.iter().map(|(.., step)| step.attempts).collect::<Vec<_>>())
    .bind(rows.iter().map(|(.., step)| step.started_at).collect::<Vec<_>>())
    .bind(rows.iter().map(|(.., step)| step.ended_at).collect::<Vec<_>>())
    .bind(rows.iter().map(|(.., step)| step.error.as_deref()).collect::<Vec<_>>())
    .execute(connection)
    .await?;
    Ok(())
}

/// [`log_runs`] for one.
pub(super) async fn log_run(executor: impl PgExecutor<'_>, run: &Run) -> Result<(), sqlx::Error> {
    log_runs(executor, &[run]).await
}

/// Writes the first rows of those runs that their jobs' takes began, where the log has none: whatever the log is to say of such a
/// run follows this. Nothing happens to other runs, and none where the fence refuses.
pub(super) async fn log_runs(executor: impl PgExecutor<'_>, runs: &[&Run]) -> Result<(), sqlx::Error> {
    let runs: Vec<&Run> = runs.iter().filter(|run| run.began_with_take()).copied().collect();
    if runs.is_empty() {
        return Ok(());
    }
    sqlx::query(crate::fenced_sql!(
        "WITH alive AS (
            SELECT j.* FROM (
                SELECT * FROM unnest((SELECT $1::uuid[]), $2::bigint[]) AS held (id, fence) ORDER BY id
            ) AS held
            CROSS JOIN LATERAL (
                SELECT * FROM jobs j
                WHERE j.id = held.id AND j.fence = held.fence AND j.state = 'running' FOR NO KEY UPDATE
            ) AS j
         )
         INSERT INTO sagas (id, job_id, kind, definition_version, tenant, state, fence, created_at)
         SELECT id, id, kind, begun_version, tenant, 'running', fence, taken_at FROM alive WHERE begun_version IS NOT NULL
         ON CONFLICT DO NOTHING",
        "j.fence = held.fence AND j.state = 'running'"
    ))
    .bind(runs.iter().map(|run| run.job_id.0).collect::<Vec<_>>())
    .bind(runs.iter().map(|run| run.fence.0).collect::<Vec<_>>())
    .execute(executor)
    .await?;
    Ok(())
}

impl Postgres {
    /// Has the log know a run that its job's take began, before it is told that it ended without a step.
    pub async fn log_run(&self, run: &Run) -> Result<(), StoreError> {
        Ok(log_run(&self.pool, run).await?)
    }

    /// Ends a forward run, of the first version of its definition, whose pivot did not end the job itself. `false`: the fence
    /// refused, or the run has turned back.
    pub async fn complete(
        &self,
        run: &Run,
        result: &Value,
        steps: &[StepRecord],
    ) -> Result<bool, StoreError> {
        let one = Completion {
            job_id: run.job_id,
            fence: run.fence,
            saga: run.saga_id.map(|saga| (saga, 1)),
            result: result.clone(),
            steps: steps.to_vec(),
            revocable: false,
        };
        Ok(self.complete_all(&[one]).await? == [Completed::Done])
    }

    /// [`complete`](Self::complete) for many, in one statement; answers in their order. No step of these deliveries is in the
    /// log yet: whatever else writes steps ends the delivery or turns it back. A run that its take began has no row either, if all
    /// went well: it gets its only one here.
    async fn complete_all<C: std::borrow::Borrow<Completion>>(
        &self,
        items: &[C],
    ) -> Result<Vec<Completed>, StoreError> {
        let items: Vec<&Completion> = items.iter().map(std::borrow::Borrow::borrow).collect();
        let given: Vec<(JobId, &Value)> = items.iter().map(|item| (item.job_id, &item.result)).collect();
        let (results, keys): (Vec<Value>, Vec<Option<String>>) =
            self.seal_results(&given).await?.into_iter().unzip();
        let ended: Vec<(Uuid, bool)> = sqlx::query_as(crate::fenced_sql!(
            "WITH alive AS (
                SELECT held.*, j.kind, j.tenant, j.taken_at, held.revocable AND j.cancel_wanted AS cancelled
                FROM (
                    SELECT * FROM unnest((SELECT $1::uuid[]), $2::bigint[], $3::uuid[], $4::integer[], $5::jsonb[], $6::jsonb[], $7::text[], $8::boolean[])
                         AS held (id, fence, saga, version, steps, result, key_id, revocable)
                    ORDER BY id
                ) AS held
                CROSS JOIN LATERAL (
                    SELECT j.kind, j.tenant, j.taken_at, j.cancel_requested_at IS NOT NULL AS cancel_wanted FROM jobs j
                    WHERE j.id = held.id AND j.fence = held.fence AND j.state = 'running' FOR NO KEY UPDATE
                ) AS j
             ), ended AS (
                -- Whichever plan is kept, it looks each run up in the index.
                INSERT INTO sagas (id, job_id, kind, definition_version, tenant, state, fence, created_at, finished_at, steps)
                SELECT saga, id, kind, version, tenant, 'completed', fence, taken_at, now(), steps FROM alive
                WHERE saga IS NOT NULL AND NOT cancelled
                ON CONFLICT (id) DO UPDATE
                    SET state = 'completed', finished_at = now(), updated_at = now(), fence = excluded.fence, steps = excluded.steps
                    WHERE sagas.state = 'running'
                RETURNING id
             ), done AS (
                UPDATE jobs j SET state = 'succeeded', result = nullif(alive.result, 'null'), result_key_id = alive.key_id,
                       finished_at = now(), last_error = NULL
                FROM alive
                -- Not a join: it would look at each run for each job.
                WHERE j.id = alive.id AND NOT alive.cancelled
                  AND (alive.saga IS NULL OR alive.saga = ANY (ARRAY(SELECT id FROM ended)))
                RETURNING j.id
             )
             SELECT id, false FROM done UNION ALL SELECT id, true FROM alive WHERE cancelled",
            "j.fence = held.fence AND j.state = 'running'"
        ))
        .bind(items.iter().map(|item| item.job_id.0).collect::<Vec<_>>())
        .bind(items.iter().map(|item| item.fence.0).collect::<Vec<_>>())
        .bind(items.iter().map(|item| item.saga.map(|(saga, _)| saga)).collect::<Vec<_>>())
        .bind(items.iter().map(|item| item.saga.map(|(_, version)| version)).collect::<Vec<_>>())
        .bind(items.iter().map(|item| Json(item.steps.iter().map(in_its_run).collect())).collect::<Vec<Json<Vec<_>>>>())
        .bind(results)
        .bind(keys)
        .bind(items.iter().map(|item| item.revocable).collect::<Vec<_>>())
        .fetch_all(&self.pool)
        .await?;
        crate::fault_point!("engine.complete.inside");
        let ended: HashMap<Uuid, bool> = ended.into_iter().collect();
        Ok(items
            .iter()
            .map(|item| match ended.get(&item.job_id.0) {
                Some(false) => Completed::Done,
                Some(true) => Completed::Cancelled,
                None => Completed::Refused,
            })
            .collect())
    }

    /// Ends a run as its verdict says; its effects are undone by now. `false`: the fence refused.
    pub async fn finish(
        &self,
        run: &Run,
        verdict: &Verdict,
        steps: &[StepRecord],
    ) -> Result<bool, StoreError> {
        let one = Ending { run: run.clone(), verdict: verdict.clone(), steps: steps.to_vec() };
        Ok(self.finish_all(&[&one]).await? != [Written::Refused])
    }

    /// [`finish`](Self::finish) for many, in one transaction; answers in their order. A retry of a job whose end a person wants
    /// does not wait: its next take ends it.
    pub(super) async fn finish_all(&self, items: &[&Ending]) -> Result<Vec<Written>, StoreError> {
        let mut tx = self.begin().await?;
        let held: Vec<_> = items.iter().map(|item| (item.run.job_id, item.run.fence)).collect();
        let alive = lock_alive(&mut tx, &held).await?;
        let live: Vec<&Ending> =
            items.iter().filter(|item| alive.contains_key(&item.run.job_id)).copied().collect();
        if !live.is_empty() {
            let logged = end_compensated(&mut tx, &live).await?;
            settle(&mut tx, &live, &logged).await?;
        }
        crate::fault_point!("engine.finish.inside");
        tx.commit().await?;
        Ok(items
            .iter()
            .map(|item| match alive.get(&item.run.job_id) {
                Some(alive) if alive.cancel_requested => Written::AtOnce,
                Some(_) => Written::Kept,
                None => Written::Refused,
            })
            .collect())
    }

    /// Parks a run whose effects can't be undone, or finished past the pivot, without a person, or whose kind nobody knows. `false`: the fence refused.
    pub async fn park(
        &self,
        run: &Run,
        parking: &Parking<'_>,
        steps: &[StepRecord],
    ) -> Result<bool, StoreError> {
        let Parking { verdict, error, past_pivot, progress } = *parking;
        crate::fault_point!("engine.park.before");
        let mut tx = self.begin().await?;
        if lock_alive(&mut tx, &[(run.job_id, run.fence)]).await?.is_empty() {
            return Ok(false);
        }
        log_run(&mut *tx, run).await?;
        if let Some(saga) = run.saga_id {
            let parked = sqlx::query(
                "UPDATE sagas SET state = 'parked', verdict = coalesce($2, verdict, jsonb_build_object('past_pivot', $5::boolean)),
                        error = $3, next_step = coalesce($6, next_step), data = coalesce($7, data), updated_at = now(), fence = $4
                 WHERE id = $1",
            )
            .bind(saga)
            .bind(verdict.map(|v| json!(v)))
            .bind(error)
            .bind(run.fence.0)
            .bind(past_pivot)
            .bind(progress.map(|(next_step, _)| next_step))
            .bind(progress.map(|(_, data)| data))
            .execute(&mut *tx)
            .await?;
            if parked.rows_affected() == 1 {
                insert_steps(&mut tx, &[(saga, run.fence, steps)]).await?;
            }
        }
        sqlx::query("UPDATE jobs SET state = 'parked', finished_at = now(), last_error = $2 WHERE id = $1")
            .bind(run.job_id.0)
            .bind(error)
            .execute(&mut *tx)
            .await?;
        crate::fault_point!("engine.park.inside");
        tx.commit().await?;
        crate::fault_point!("engine.park.after");
        Ok(true)
    }

    /// Gives a job back, uncharged: nobody here can run it. No step of it has run under this fence, so that a run which this
    /// take began, and nothing has been said of, is none: the next take may begin another, of another version. A run that has
    /// come further is given back by [`suspend`](Self::suspend). Returns the wait, which is none if a person wants the job's end and
    /// whoever takes it next can end it. `None`: the fence refused.
    pub async fn release(
        &self,
        run: &Run,
        delay: Duration,
        why: GivenBack,
    ) -> Result<Option<Duration>, StoreError> {
        crate::fault_point!("engine.release.before");
        let mut tx = self.begin().await?;
        let alive = lock_alive(&mut tx, &[(run.job_id, run.fence)]).await?;
        let Some(alive) = alive.get(&run.job_id) else { return Ok(None) };
        let (unroutable, can_be_ended) = match why {
            GivenBack::Unroutable(time) => (Some(time), run.saga_id.is_none()),
            GivenBack::Asked => (None, true),
            GivenBack::Later => (None, false),
        };
        let wait = if alive.cancel_requested && can_be_ended { Duration::ZERO } else { delay };
        sqlx::query(
            "UPDATE jobs SET state = 'waiting', worker = NULL,
                    run_at = least(now() + make_interval(secs => $2), '9999-12-31 23:59Z'),
                    unroutable_since = CASE WHEN $3::float8 IS NOT NULL THEN coalesce(unroutable_since, now() - make_interval(secs => $3)) END,
                    begun_version = CASE WHEN fence > 1 OR EXISTS (SELECT FROM sagas s WHERE s.id = jobs.id) THEN begun_version END
             WHERE id = $1",
        )
        .bind(run.job_id.0)
        .bind(wait.as_secs_f64())
        .bind(unroutable.map(|time| time.as_secs_f64()))
        .execute(&mut *tx)
        .await?;
        crate::fault_point!("engine.release.inside");
        tx.commit().await?;
        crate::fault_point!("engine.release.after");
        Ok(Some(wait))
    }

    /// Whether a job has ended, and under which fence it runs: read back after an answer that was lost
    /// (PROTOCOL.md 20).
    pub async fn standing(&self, job: JobId) -> Result<Option<(String, Fence)>, StoreError> {
        let row: Option<(String, i64)> = sqlx::query_as("SELECT state, fence FROM jobs WHERE id = $1")
            .bind(job.0)
            .fetch_optional(&self.pool)
            .await?;
        Ok(row.map(|(state, fence)| (state, Fence(fence))))
    }

    /// Which of these running jobs a person wants to end.
    pub async fn cancel_requests(&self, running: &[JobId]) -> Result<Vec<JobId>, StoreError> {
        let ids: Vec<Uuid> =
            sqlx::query_scalar("SELECT id FROM jobs WHERE id = ANY($1) AND cancel_requested_at IS NOT NULL")
                .bind(running.iter().map(|id| id.0).collect::<Vec<_>>())
                .fetch_all(&self.pool)
                .await?;
        Ok(ids.into_iter().map(JobId).collect())
    }
}

/// Ends runs in the log, with their steps. Answers with those that are there: a run whose first step failed has no row, as its
/// rollback left nothing to log steps for, or to point at.
async fn end_compensated(
    connection: &mut PgConnection,
    items: &[&Ending],
) -> Result<HashSet<Uuid>, sqlx::Error> {
    let runs: Vec<(Uuid, &Ending)> =
        items.iter().filter_map(|item| Some((item.run.saga_id?, *item))).collect();
    if runs.is_empty() {
        return Ok(HashSet::new());
    }
    let ended: Vec<Uuid> = sqlx::query_scalar(
        "UPDATE sagas s SET state = 'compensated', verdict = e.verdict, finished_at = now(), updated_at = now(), fence = e.fence
         FROM unnest((SELECT $1::uuid[]), $2::jsonb[], $3::bigint[]) AS e (id, verdict, fence) WHERE s.id = e.id RETURNING s.id",
    )
    .bind(runs.iter().map(|(saga, _)| *saga).collect::<Vec<_>>())
    .bind(runs.iter().map(|(_, item)| json!(item.verdict)).collect::<Vec<_>>())
    .bind(runs.iter().map(|(_, item)| item.run.fence.0).collect::<Vec<_>>())
    .fetch_all(&mut *connection)
    .await?;
    let ended: HashSet<Uuid> = ended.into_iter().collect();
    let steps: Vec<_> = runs
        .iter()
        .filter(|(saga, _)| ended.contains(saga))
        .map(|(saga, item)| (*saga, item.run.fence, item.steps.as_slice()))
        .collect();
    insert_steps(connection, &steps).await?;
    Ok(ended)
}

/// Ends jobs, or lets them wait for another attempt, as their verdicts say; charges the attempt of those that failed, and writes
/// the dead letters, which point at the runs that are `logged`. The caller holds the jobs' rows.
pub(super) async fn settle(
    connection: &mut PgConnection,
    items: &[&Ending],
    logged: &HashSet<Uuid>,
) -> Result<(), sqlx::Error> {
    let failures: Vec<Option<&Failure>> = items.iter().map(|item| item.verdict.failure()).collect();
    let retries = items.iter().map(|item| match item.verdict {
        Verdict::Retry { retry_in_ms, .. } => Some(Duration::from_millis(retry_in_ms).as_secs_f64()),
        _ => None,
    });
    sqlx::query(
        "WITH e AS (
            SELECT * FROM unnest((SELECT $1::uuid[]), $2::uuid[], $3::bigint[], $4::text[], $5::timestamptz[], $6::text[], $7::text[],
                                 $8::float8[], $9::text[], $10::text[], $11::text[], $12::jsonb[])
                 AS e (id, saga, fence, worker, started_at, state, outcome, retry_in_s, class, code, error, chain)
         ), done AS (
            UPDATE jobs j SET
                state = e.state, outcome = coalesce(e.outcome, j.outcome), last_error = coalesce(e.error, j.last_error),
                attempts = j.attempts + (e.class IS NOT NULL)::integer,
                -- Whoever takes it next ends it, if a person wants that.
                run_at = coalesce(least(now() + make_interval(secs => e.retry_in_s * (j.cancel_requested_at IS NULL)::integer),
                                        CASE WHEN e.retry_in_s IS NOT NULL THEN timestamptz '9999-12-31 23:59Z' END), j.run_at),
                unroutable_since = NULL,
                worker = CASE WHEN e.state = 'waiting' THEN NULL ELSE j.worker END,
                finished_at = CASE WHEN e.state = 'waiting' THEN NULL ELSE now() END
            FROM e WHERE j.id = e.id RETURNING j.*
         ), charged AS (
            INSERT INTO job_attempts (job_id, attempt, fence, worker, started_at, class, error)
            SELECT done.id, done.attempts, e.fence, e.worker, e.started_at, e.class, e.error
            FROM done JOIN e ON e.id = done.id WHERE e.class IS NOT NULL
         )
         INSERT INTO dead_letters (id, job_id, saga_id, tenant, kind, queue, class, reason, error_chain, payload, payload_key_id,
                                   traceparent)
         SELECT uuid7(), done.id, e.saga, tenant, kind, queue, e.code, e.error, e.chain, payload, payload_key_id, traceparent
         FROM done JOIN e ON e.id = done.id WHERE done.state = 'dead'",
    )
    .bind(items.iter().map(|item| item.run.job_id.0).collect::<Vec<_>>())
    .bind(items.iter().map(|item| item.run.saga_id.filter(|saga| logged.contains(saga))).collect::<Vec<_>>())
    .bind(items.iter().map(|item| item.run.fence.0).collect::<Vec<_>>())
    .bind(items.iter().map(|item| item.run.worker.to_string()).collect::<Vec<_>>())
    .bind(items.iter().map(|item| item.run.started_at).collect::<Vec<_>>())
    .bind(items.iter().map(|item| item.verdict.state().as_str()).collect::<Vec<_>>())
    .bind(items.iter().map(|item| item.verdict.outcome()).collect::<Vec<_>>())
    .bind(retries.collect::<Vec<_>>())
    .bind(failures.iter().map(|f| f.map(|f| f.class.name())).collect::<Vec<_>>())
    .bind(failures.iter().map(|f| f.map(|f| f.code.as_str())).collect::<Vec<_>>())
    .bind(failures.iter().map(|f| f.map(|f| f.error.as_str())).collect::<Vec<_>>())
    .bind(failures.iter().map(|f| f.map(|f| json!(f.chain))).collect::<Vec<_>>())
    .execute(connection)
    .await?;
    Ok(())
}
