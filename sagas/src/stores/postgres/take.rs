//! The take: Postgres grants the fence (PROTOCOL.md 1).

use std::{borrow::Cow, collections::HashMap, time::Duration};

use async_trait::async_trait;
use queue::{Envelope, JobId, WorkerId};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::{Row, postgres::PgRow};
use uuid::Uuid;

use super::{Fence, Postgres, accept, batches::BatchId, sealing};
use crate::{
    coalescing::Batch,
    encryption::PayloadCipher,
    error::{Dependency, StoreError},
};

/// What the ledger knows of a job, as a worker gets it with the take.
#[derive(Debug, Clone)]
pub struct TakenJob {
    /// The job.
    pub id: JobId,
    /// What to do.
    pub kind: String,
    /// Where it waited.
    pub queue: String,
    /// 0 to 9.
    pub priority: i16,
    /// The owner.
    pub tenant: String,
    /// The request; null if it is [`unreadable`](Self::unreadable).
    pub payload: Value,
    /// Why this process can't open the sealed request. The engine runs no step of such a job.
    pub unreadable: Option<String>,
    /// Carried by every write of this run.
    pub fence: Fence,
    /// Takes so far, this one included.
    pub deliveries: i32,
    /// Takes that ended in a lost lease.
    pub lost_deliveries: i32,
    /// Of those, how many happened while the job ran alone in its process.
    pub lost_alone: i32,
    /// Charged failures so far.
    pub attempts: i32,
    /// Charged failures after which the job is dead.
    pub max_attempts: i32,
    /// Hard cap on one run.
    pub timeout: Duration,
    /// The document that the job is about.
    pub document_id: Option<Uuid>,
    /// The job's place in that document's order.
    pub doc_order: Option<i64>,
    /// A person asked for its end.
    pub cancel_requested: bool,
    /// The batch that it is a member of.
    pub batch: Option<BatchId>,
    /// W3C trace context of the producer.
    pub traceparent: Option<String>,
    /// For how long, before this take, no worker could run it. Taken where its kind is known, it waits for nobody from now on; but
    /// if it is [`unreadable`](Self::unreadable) there, its [release](Postgres::release) has the clock go on.
    pub unroutable_for: Option<Duration>,
    /// The unfinished run of an earlier delivery.
    pub saga: Option<OpenSaga>,
}

/// An unfinished saga run, as the log has it.
#[derive(Debug, Clone)]
pub struct OpenSaga {
    /// The run.
    pub id: Uuid,
    /// Whether this very take began it, so that none of its steps can have run, and the log has no row of it yet.
    pub fresh: bool,
    /// Version of the definition that began it.
    pub definition_version: i32,
    /// Whether it has begun to compensate; then it never goes forward again.
    pub compensating: bool,
    /// First forward step that is not known to be done.
    pub next_step: i16,
    /// The saga's typed data. `None`: as [`Saga::prepare`](crate::Saga::prepare) makes it.
    pub data: Option<Value>,
    /// Why `data` can't be read; then they are `None` here.
    pub unreadable: Option<String>,
    /// Branches of the next step, a group, that are done.
    pub done: Vec<String>,
    /// Whether a pivot that doesn't commit itself may have begun; then the run only goes forward.
    pub pivot_begun: bool,
    /// How the job ends after compensation.
    pub verdict: Option<Value>,
    /// Deliveries lost since compensation began.
    pub lost_compensating: i32,
}

impl OpenSaga {
    /// A run that a take has begun. Its id is the job's.
    fn begun(job: JobId, definition_version: i32) -> Self {
        Self {
            id: job.0,
            fresh: true,
            definition_version,
            compensating: false,
            next_step: 0,
            data: None,
            unreadable: None,
            done: vec![],
            pivot_begun: false,
            verdict: None,
            lost_compensating: 0,
        }
    }
}

/// The answer for one job of a batch.
#[derive(Debug, Clone)]
pub enum Take {
    /// It is ours, under a new fence.
    Taken(Box<TakenJob>),
    /// It has ended, or never existed: drop it from Redis.
    Gone,
    /// It is not due yet, or another job of its document goes first: put it back for so long.
    NotYet(Duration),
}

/// One job of a take.
#[derive(Debug, Clone)]
pub struct TakeItem {
    /// The claimed job.
    pub id: JobId,
    /// The full record of a job with `durability=fast`, which the ledger does not have yet.
    pub fast: Option<accept::NewJob>,
}

impl TakeItem {
    /// A claimed job; or how long it is to be put off, because this release can't read its record: a newer one may have written it,
    /// and read it.
    pub fn of(envelope: &Envelope) -> Result<Self, Duration> {
        match envelope.fast.clone().map(serde_json::from_value).transpose() {
            Ok(fast) => Ok(Self { id: envelope.id, fast }),
            Err(error) => {
                tracing::error!(job = %envelope.id, %error, wait = ?UNREADABLE_RECORD_FOR, "a fast job's record can't be read; it is put off");
                Err(UNREADABLE_RECORD_FOR)
            }
        }
    }
}

/// How long a job is put off that the ledger refuses to hand out; `None`: it may do so the next time. It alone: a batch is split until
/// the guilty one is found. Asked for again at once it would hold its slot, its lease and its company for nothing.
pub fn refused_for(error: &StoreError) -> Option<Duration> {
    (error.trouble || !error.class.is_retryable()).then_some(REFUSED_FOR)
}

/// When to look again at a job that nobody could run or read for `waited` and that is dead after `limit`: no later than that.
pub(crate) fn look_again_in(limit: Duration, waited: Duration) -> Duration {
    UNREADABLE_FOR.min(limit.saturating_sub(waited)).max(Duration::from_millis(100))
}

/// The coalesced take of one worker.
#[derive(Debug, Clone)]
pub struct TakeBatch {
    postgres: Postgres,
    worker: WorkerId,
    begins: Vec<(&'static str, i32)>,
    /// `None`: every kind.
    knows: Option<Vec<&'static str>>,
}

impl TakeBatch {
    /// The take by `worker`, which begins no runs.
    pub fn new(postgres: Postgres, worker: WorkerId) -> Self {
        Self { postgres, worker, begins: vec![], knows: Some(vec![]) }
    }

    /// The first run of jobs of these kinds begins with their first take, in the version given.
    #[must_use]
    pub fn beginning(self, begins: Vec<(&'static str, i32)>) -> Self {
        Self { begins, ..self }
    }

    /// The worker knows these kinds, so that nobody need wait for one that does (PROTOCOL.md 15).
    #[must_use]
    pub fn knowing(self, knows: Vec<&'static str>) -> Self {
        Self { knows: Some(knows), ..self }
    }

    /// The worker can run jobs of every kind.
    #[must_use]
    pub fn knowing_all(self) -> Self {
        Self { knows: None, ..self }
    }
}

/// How long a job waits for a worker that can run it, unless that is set (PROTOCOL.md 15).
pub const UNROUTABLE_AFTER: Duration = Duration::from_secs(3600);
/// How long a job waits at most that this worker can't run or read, before it or another looks again: long enough not to spin,
/// short enough that a deploy is noticed.
pub(crate) const UNREADABLE_FOR: Duration = Duration::from_secs(10);
/// How long a job waits that the ledger refuses to hand out.
const REFUSED_FOR: Duration = Duration::from_secs(10);
/// How long a `fast` job waits whose record this release can't read.
const UNREADABLE_RECORD_FOR: Duration = Duration::from_secs(60);
/// How long a job waits whose document is busy, before it is looked at again.
const BLOCKED_FOR: Duration = Duration::from_millis(200);

#[async_trait]
impl Batch for TakeBatch {
    type Item = TakeItem;
    type Reply = Take;
    const OP: &'static str = "take";
    const DEPENDENCY: Dependency = Dependency::Postgres;

    async fn flush(&self, items: &[TakeItem]) -> Result<Vec<Take>, StoreError> {
        let fast: Vec<_> = items.iter().filter_map(|item| item.fast.clone()).collect();
        if !fast.is_empty() {
            self.postgres.admit_fast(fast).await?;
        }
        let ids: Vec<JobId> = items.iter().map(|item| item.id).collect();
        let mut taken = self.postgres.take(&ids, self).await?;
        let refused: Vec<Uuid> = ids.iter().filter(|id| !taken.contains_key(id)).map(|id| id.0).collect();
        let mut waits =
            if refused.is_empty() { HashMap::new() } else { self.postgres.why_refused(&refused).await? };
        Ok(ids
            .iter()
            .map(|id| match taken.remove(id) {
                Some(job) => Take::Taken(Box::new(job)),
                None => waits.remove(id).map_or(Take::Gone, Take::NotYet),
            })
            .collect())
    }
}

impl Postgres {
    /// Takes the jobs that may run now: fence and delivery count grow, a delivery that ended in a lost lease is counted
    /// (the row still says `running`, under another worker: a living worker that takes a job again has only missed an
    /// answer), and the unfinished saga comes along. Of one document's jobs only the first in
    /// order is taken, and none while another runs. One that was running when its worker was lost has its document's place
    /// still: an earlier one that was put off and is due by now waits for it, so it must not wait for that.
    ///
    /// A run that the first take begins has no row in the log until something is to be said of it; the second take says at least
    /// that it is there (`docs/decisions/0049-the-first-row-of-a-run-can-wait.md`).
    async fn take(
        &self,
        ids: &[JobId],
        TakeBatch { worker, begins, knows, .. }: &TakeBatch,
    ) -> Result<HashMap<JobId, TakenJob>, StoreError> {
        let rows = sqlx::query(
            "WITH due AS (
                SELECT j.id, j.runs_alone, j.was_lost, j.begun_at, j.unroutable_since,
                       CASE WHEN j.fence = 0 THEN begins.version ELSE j.begun_version END AS begun_version
                FROM (SELECT id FROM unnest((SELECT $1::uuid[])) AS claimed (id) ORDER BY id) AS claimed
                CROSS JOIN LATERAL (
                    SELECT j.id, j.kind, j.fence, j.begun_version, j.runs_alone, j.unroutable_since, j.taken_at AS begun_at,
                           j.state = 'running' AND j.worker IS DISTINCT FROM $2 AS was_lost
                    FROM jobs j
                    WHERE j.id = claimed.id AND j.state IN ('waiting', 'running') AND j.run_at <= now()
                      AND (j.document_id IS NULL OR j.state = 'running' OR NOT EXISTS (
                          SELECT FROM jobs o
                          WHERE o.document_id = j.document_id AND o.id <> j.id AND o.state IN ('waiting', 'running')
                            AND (o.state = 'running' OR (o.doc_order < j.doc_order AND o.run_at <= now()))))
                    FOR NO KEY UPDATE OF j
                ) AS j
                LEFT JOIN unnest($3::text[], $4::integer[]) AS begins (kind, version) ON begins.kind = j.kind
             ), taken AS (
                UPDATE jobs j SET
                    fence = fence + 1, deliveries = deliveries + 1,
                    lost_deliveries = lost_deliveries + due.was_lost::integer,
                    lost_alone = lost_alone + (due.was_lost AND due.runs_alone)::integer,
                    runs_alone = false, state = 'running', worker = $2, taken_at = now(), begun_version = due.begun_version,
                    dispatched_at = coalesce(dispatched_at, now()),
                    unroutable_since = CASE WHEN $5::text[] IS NULL OR j.kind = ANY ($5) THEN NULL ELSE j.unroutable_since END
                FROM due WHERE j.id = due.id
                RETURNING j.*, due.was_lost, due.runs_alone AS was_alone, due.begun_at, due.unroutable_since AS was_unroutable_since
             ), lost AS (
                -- As towards the poison limit: whoever was beside it may have killed the worker, or nobody. The array makes it a
                -- look-up for each, of which there are few.
                UPDATE sagas SET lost_compensating = lost_compensating + 1
                WHERE state = 'compensating' AND job_id = ANY (ARRAY(SELECT t.id FROM taken t WHERE t.was_lost AND t.was_alone))
             ), logged AS (
                -- By now a step of it may have run. Its former holder may have written the row while this waited for the job.
                INSERT INTO sagas (id, job_id, kind, definition_version, tenant, state, fence, created_at)
                SELECT t.id, t.id, t.kind, t.begun_version, t.tenant, 'running', t.fence, t.begun_at FROM taken t
                WHERE t.fence > 1 AND t.begun_version IS NOT NULL
                ON CONFLICT DO NOTHING
             )
             SELECT t.id, t.kind, t.queue, t.priority, t.tenant, t.payload, t.payload_key_id, t.fence, t.deliveries, t.lost_deliveries,
                    t.lost_alone, t.attempts, t.max_attempts, t.timeout_ms, t.document_id, t.doc_order,
                    t.cancel_requested_at IS NOT NULL AS cancel_requested, t.batch_id, t.traceparent, t.begun_version,
                    extract(epoch FROM now() - t.was_unroutable_since)::float8 AS unroutable_s
             FROM taken t",
        )
        .bind(ids.iter().map(|id| id.0).collect::<Vec<_>>())
        .bind(worker.to_string())
        .bind(begins.iter().map(|(kind, _)| *kind).collect::<Vec<_>>())
        .bind(begins.iter().map(|(_, version)| *version).collect::<Vec<_>>())
        .bind(knows)
        .fetch_all(&self.pool)
        .await?;
        crate::fault_point!("engine.take.inside");
        let mut taken = HashMap::with_capacity(rows.len());
        for row in &rows {
            let mut job = taken_job(row, &self.cipher)?;
            let begun: Option<i32> = row.try_get("begun_version")?;
            job.saga =
                begun.filter(|_| job.fence == Fence(1)).map(|version| OpenSaga::begun(job.id, version));
            taken.insert(job.id, job);
        }
        let again: Vec<Uuid> =
            taken.values().filter(|job| job.fence > Fence(1)).map(|job| job.id.0).collect();
        if !again.is_empty() {
            for (job, open) in self.open_runs(&again).await? {
                if let Some(job) = taken.get_mut(&job) {
                    job.saga = Some(open);
                }
            }
        }
        Ok(taken)
    }

    /// The unfinished runs of jobs that were taken before. Asked once the take is committed: the holder of an older fence may
    /// have written until then, and a statement doesn't see what is committed while it waits for a row.
    async fn open_runs(&self, jobs: &[Uuid]) -> Result<Vec<(JobId, OpenSaga)>, StoreError> {
        // One look-up for each. As a plain condition it is a scan of all runs that are under way, and of those that ended since
        // the last vacuum, whenever the statistics were made while few were.
        let rows = sqlx::query(
            "SELECT job_id, s.id, definition_version, state, next_step, data, done, verdict, pivot_at IS NOT NULL AS pivot_begun,
                    lost_compensating
             FROM unnest((SELECT $1::uuid[])) AS again (id) CROSS JOIN LATERAL (
                SELECT * FROM sagas o WHERE o.job_id = again.id AND o.state IN ('running', 'compensating') LIMIT 1
             ) s",
        )
        .bind(jobs)
        .fetch_all(&self.pool)
        .await?;
        rows.iter()
            .map(|row| {
                // As with payloads: what nobody can read of one run must not keep the others of the batch from their workers.
                let (data, unreadable) = match row.try_get("data") {
                    Ok(data) => (data, None),
                    Err(error) => (None, Some(error.to_string())),
                };
                let open = OpenSaga {
                    id: row.try_get("id")?,
                    fresh: false,
                    definition_version: row.try_get("definition_version")?,
                    compensating: row.try_get::<&str, _>("state")? == "compensating",
                    next_step: row.try_get("next_step")?,
                    data,
                    unreadable,
                    done: row.try_get("done")?,
                    pivot_begun: row.try_get("pivot_begun")?,
                    // Without one the run is parked.
                    verdict: row.try_get("verdict").unwrap_or_else(|error| {
                        tracing::error!(%error, "a run's verdict can't be read");
                        None
                    }),
                    lost_compensating: row.try_get("lost_compensating")?,
                };
                Ok((JobId(row.try_get("job_id")?), open))
            })
            .collect()
    }

    /// How long each job that was not taken has to wait. Jobs that have ended are absent.
    async fn why_refused(&self, ids: &[Uuid]) -> Result<HashMap<JobId, Duration>, StoreError> {
        let rows = sqlx::query(
            "SELECT id, extract(epoch FROM run_at - now())::float8 AS due_in_s FROM jobs
             WHERE id = ANY($1) AND state IN ('waiting', 'running')",
        )
        .bind(ids)
        .fetch_all(&self.pool)
        .await?;
        rows.iter()
            .map(|row| {
                let due_in: f64 = row.try_get("due_in_s")?;
                let wait = if due_in > 0.0 { Duration::from_secs_f64(due_in) } else { BLOCKED_FOR };
                Ok((JobId(row.try_get("id")?), wait))
            })
            .collect()
    }

    /// Records that a taken job runs alone in its process from now on, so that a loss counts towards the delivery
    /// limit (PROTOCOL.md 13). `false`: the fence refused.
    pub async fn mark_alone(&self, id: JobId, fence: Fence) -> Result<bool, StoreError> {
        let done = sqlx::query(crate::fenced_sql!(
            "UPDATE jobs SET runs_alone = true WHERE id = $1 AND fence = $2 AND state = 'running'",
            "fence = $2 AND state = 'running'"
        ))
        .bind(id.0)
        .bind(fence.0)
        .execute(&self.pool)
        .await?;
        Ok(done.rows_affected() == 1)
    }
}

fn taken_job(row: &PgRow, cipher: &PayloadCipher) -> Result<TakenJob, sqlx::Error> {
    let (id, tenant): (Uuid, String) = (row.try_get("id")?, row.try_get("tenant")?);
    let key: Option<String> = row.try_get("payload_key_id")?;
    // What one job has that nobody can read must not keep the others of the batch from their workers.
    let opened = row.try_get("payload").map_err(|error| error.to_string()).and_then(|stored| {
        sealing::open_taken(cipher, &tenant, id, stored, key.as_deref()).map_err(|why| why.to_string())
    });
    let (payload, unreadable) = opened.map_or_else(|why| (Value::Null, Some(why)), |payload| (payload, None));
    Ok(TakenJob {
        id: JobId(id),
        kind: row.try_get("kind")?,
        queue: row.try_get("queue")?,
        priority: row.try_get("priority")?,
        tenant,
        payload,
        unreadable,
        fence: Fence(row.try_get("fence")?),
        deliveries: row.try_get("deliveries")?,
        lost_deliveries: row.try_get("lost_deliveries")?,
        lost_alone: row.try_get("lost_alone")?,
        attempts: row.try_get("attempts")?,
        max_attempts: row.try_get("max_attempts")?,
        timeout: Duration::from_millis(row.try_get::<i32, _>("timeout_ms")?.unsigned_abs().into()),
        document_id: row.try_get("document_id")?,
        doc_order: row.try_get("doc_order")?,
        cancel_requested: row.try_get("cancel_requested")?,
        batch: row.try_get::<Option<Uuid>, _>("batch_id")?.map(BatchId),
        traceparent: row.try_get("traceparent")?,
        unroutable_for: row
            .try_get::<Option<f64>, _>("unroutable_s")?
            .map(|s| Duration::from_secs_f64(s.max(0.0))),
        saga: None,
    })
}

/// How one step of a run went; becomes a row of `saga_timeline`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StepRecord {
    /// Name of the step.
    pub step: Cow<'static, str>,
    /// Whether this was its compensation.
    pub compensation: bool,
    /// Tries within this delivery.
    pub attempts: i32,
    /// When the first try began.
    pub started_at: chrono::DateTime<chrono::Utc>,
    /// When the last try ended.
    pub ended_at: chrono::DateTime<chrono::Utc>,
    /// The last error, if the step failed.
    pub error: Option<String>,
}
