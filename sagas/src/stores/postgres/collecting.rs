//! What the collector does to batches: folds what happened into their counts, finishes them, enqueues their callbacks, and
//! goes on with cancels.

use queue::{JobId, QueueName};
use serde_json::{Value, json};
use sqlx::{PgConnection, Row, postgres::PgRow};
use uuid::Uuid;

use super::{
    Postgres,
    accept::{NewJob, there},
    batches::{BatchId, CallbackOn},
    waits,
};
use crate::error::{Class, Dependency, StoreError};

/// Events that one fold takes.
const FOLD: i64 = 10_000;

/// What one fold did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Folded {
    /// Events that went into the counts.
    pub events: i64,
    /// More may be left than one fold takes.
    pub more: bool,
    /// The last member has ended, and this fold said so.
    pub finished: bool,
    /// The callback that this fold enqueued; the relay dispatches it.
    pub called: Option<JobId>,
}

/// Members that were cancelled together.
#[derive(Debug, Clone, Default)]
pub struct CancelledPage {
    /// The last member of the page: the next one begins after it. `None`: there was none.
    pub last: Option<Uuid>,
    /// Waiting ones that ended here, for the queue to forget.
    pub cancelled: Vec<(QueueName, JobId)>,
}

impl Postgres {
    /// Batches to which something happened since they were last folded, but for those named.
    pub async fn batches_to_fold(&self, limit: i64, but: &[BatchId]) -> Result<Vec<BatchId>, StoreError> {
        // Hops from batch to batch, however many events each has.
        let ids: Vec<Uuid> = sqlx::query_scalar(
            "WITH RECURSIVE hop AS (
                 (SELECT batch FROM batch_events ORDER BY batch LIMIT 1)
                 UNION ALL
                 SELECT (SELECT e.batch FROM batch_events e WHERE e.batch > hop.batch ORDER BY e.batch LIMIT 1)
                 FROM hop WHERE hop.batch IS NOT NULL)
             SELECT batch FROM hop WHERE batch IS NOT NULL AND batch <> ALL($2) LIMIT $1",
        )
        .bind(limit)
        .bind(but.iter().map(|id| id.0).collect::<Vec<_>>())
        .fetch_all(&self.pool)
        .await?;
        Ok(ids.into_iter().map(BatchId).collect())
    }

    /// Folds a batch's events into its counts; if that completes it, finishes it and enqueues its callback, all in one
    /// transaction: whatever dies, the callback is enqueued exactly once. A batch that another collector holds is left to it.
    pub async fn fold_batch(&self, id: BatchId) -> Result<Folded, StoreError> {
        let mut tx = self.begin().await?;
        let held = sqlx::query("SELECT FROM batches WHERE id = $1 FOR NO KEY UPDATE SKIP LOCKED")
            .bind(id.0)
            .fetch_optional(&mut *tx)
            .await?;
        if held.is_none() {
            return Ok(Folded::default());
        }
        // This statement began after the lock, so it sees every event of those who sealed the batch or added to it before.
        let row = sqlx::query(
            "WITH due AS (SELECT id FROM batch_events WHERE batch = $1 ORDER BY id LIMIT $2),
                  gone AS (DELETE FROM batch_events e USING due WHERE e.id = due.id
                           RETURNING e.added, e.succeeded, e.failed, e.cancelled),
                  news AS (SELECT count(*) AS events, coalesce(sum(added), 0) AS added, coalesce(sum(succeeded), 0) AS succeeded,
                                  coalesce(sum(failed), 0) AS failed, coalesce(sum(cancelled), 0) AS cancelled FROM gone)
             UPDATE batches b SET total = b.total + news.added, succeeded = b.succeeded + news.succeeded,
                    failed = b.failed + news.failed, cancelled = b.cancelled + news.cancelled
             FROM news WHERE b.id = $1
             RETURNING news.events, b.name, b.tenant, b.outer_batch, b.total, b.succeeded, b.failed, b.cancelled, b.callback,
                       b.callback_on, b.called_at IS NOT NULL AS called, b.sealed_at IS NOT NULL AS sealed,
                       b.cancelled_at IS NOT NULL AS ended_by_person, b.finished_at IS NOT NULL AS finished",
        )
        .bind(id.0)
        .bind(FOLD)
        .fetch_one(&mut *tx)
        .await?;
        let counts = Counts::read(&row)?;
        let mut folded = Folded { events: counts.events, more: counts.events >= FOLD, ..Folded::default() };
        // Events beyond this fold may say that members were added which are not in the counts yet.
        if counts.sealed && !folded.more && counts.ended() == counts.total {
            if !counts.finished {
                finish(&mut tx, id, &counts).await?;
                folded.finished = true;
            }
            // Also of one that had finished before: a replay has ended in it, or a parked member that went on.
            waits::wake_parents(&mut tx, id).await?;
            if let Some(template) = counts.callback(&row)? {
                let mut job = self.callback_job(template, id, &counts, row.try_get("name")?)?;
                // Retention may have removed its parent.
                let named = there(&mut tx, job.parent.into_iter()).await?;
                job.parent = job.parent.filter(|parent| named.contains(parent));
                self.accept_one(&mut tx, &job).await?;
                called(&mut tx, id, job.id).await?;
                folded.called = Some(job.id);
            }
        }
        crate::fault_point!("collector.fold.inside");
        tx.commit().await?;
        Ok(folded)
    }

    /// The callback as it is enqueued.
    fn callback_job(
        &self,
        template: Value,
        id: BatchId,
        counts: &Counts,
        name: &str,
    ) -> Result<NewJob, StoreError> {
        let job: NewJob = serde_json::from_value(template).map_err(|e| {
            StoreError::new(Dependency::Postgres, Class::Permanent, format!("batch {id}: its callback: {e}"))
        })?;
        let mut job = self.open_job(job)?;
        if let Value::Object(fields) = &mut job.payload {
            fields.insert(
                "batch".to_owned(),
                json!({
                    "id": id, "name": name, "total": counts.total, "succeeded": counts.succeeded,
                    "failed": counts.failed, "cancelled": counts.cancelled,
                }),
            );
        }
        Ok(job)
    }

    /// Cancelled batches after `after` with members that may not have heard of it, and the batches in any of them.
    pub async fn batches_to_cancel(&self, after: BatchId, limit: i64) -> Result<Vec<BatchId>, StoreError> {
        let mut tx = self.begin().await?;
        // A batch in a cancelled one is cancelled like its other members.
        let inner: Vec<Uuid> = sqlx::query_scalar(
            "SELECT i.id FROM batches i JOIN batches o ON o.id = i.outer_batch
             WHERE o.cancelled_at IS NOT NULL AND o.finished_at IS NULL AND i.cancelled_at IS NULL AND i.finished_at IS NULL
             ORDER BY i.id LIMIT $1",
        )
        .bind(limit)
        .fetch_all(&mut *tx)
        .await?;
        tx.commit().await?;
        for id in inner {
            self.cancel_batch(BatchId(id), None).await?;
        }
        let ids: Vec<Uuid> = sqlx::query_scalar(
            "SELECT id FROM batches WHERE cancelled_at IS NOT NULL AND finished_at IS NULL AND id > $2 ORDER BY id LIMIT $1",
        )
        .bind(limit)
        .bind(after.0)
        .fetch_all(&self.pool)
        .await?;
        Ok(ids.into_iter().map(BatchId).collect())
    }

    /// Cancels a page of a batch's unfinished members after `after`, each as [`cancel`](Self::cancel) does
    /// (PROTOCOL.md 14); those asked before are passed over.
    pub async fn cancel_members(
        &self,
        batch: BatchId,
        after: Uuid,
        limit: i64,
    ) -> Result<CancelledPage, StoreError> {
        let mut tx = self.begin().await?;
        let page = cancel_members_in(&mut tx, batch, after, limit).await?;
        tx.commit().await?;
        Ok(page)
    }
}

/// As [`cancel_members`](Postgres::cancel_members), in the caller's transaction.
pub(super) async fn cancel_members_in(
    connection: &mut PgConnection,
    batch: BatchId,
    after: Uuid,
    limit: i64,
) -> Result<CancelledPage, StoreError> {
    let ids: Vec<Uuid> = sqlx::query_scalar(
        "SELECT id FROM jobs WHERE batch_id = $1 AND id > $2 AND state IN ('waiting', 'running') AND cancel_requested_at IS NULL
         ORDER BY id LIMIT $3 FOR NO KEY UPDATE",
    )
    .bind(batch.0)
    .bind(after)
    .bind(limit)
    .fetch_all(&mut *connection)
    .await?;
    // With the rows locked, what is read of their sagas stays true.
    let rows = sqlx::query(
        "WITH member AS (
             SELECT j.id, j.queue, j.state = 'waiting' AND NOT EXISTS (
                        SELECT FROM sagas s WHERE s.job_id = j.id AND s.state IN ('running', 'compensating')) AS idle
             FROM jobs j WHERE j.id = ANY($1) AND NOT EXISTS (
                 SELECT FROM sagas s WHERE s.job_id = j.id AND s.state = 'running' AND s.pivot_at IS NOT NULL))
         UPDATE jobs j SET cancel_requested_at = now(),
                state = CASE WHEN m.idle THEN 'cancelled' ELSE j.state END,
                finished_at = CASE WHEN m.idle THEN now() END,
                -- A waiting job with effects runs now, in order to undo them; the relay tells Redis.
                run_at = CASE WHEN j.state = 'waiting' AND NOT m.idle THEN now() ELSE j.run_at END,
                dispatched_at = CASE WHEN j.state <> 'waiting' OR m.idle THEN j.dispatched_at END
         FROM member m WHERE j.id = m.id RETURNING j.id, j.queue, m.idle",
    )
    .bind(&ids)
    .fetch_all(&mut *connection)
    .await?;
    let mut page = CancelledPage { last: ids.last().copied(), ..CancelledPage::default() };
    for row in &rows {
        if !row.try_get::<bool, _>("idle")? {
            continue;
        }
        let queue = QueueName::new(row.try_get::<String, _>("queue")?).map_err(|e| {
            StoreError::new(
                Dependency::Postgres,
                Class::Permanent,
                format!("a job's queue can't be read: {e}"),
            )
        })?;
        page.cancelled.push((queue, JobId(row.try_get("id")?)));
    }
    Ok(page)
}

struct Counts {
    events: i64,
    total: i64,
    succeeded: i64,
    failed: i64,
    cancelled: i64,
    sealed: bool,
    finished: bool,
    ended_by_person: bool,
    outer: Option<Uuid>,
}

impl Counts {
    fn read(row: &PgRow) -> Result<Self, sqlx::Error> {
        Ok(Self {
            events: row.try_get("events")?,
            total: row.try_get("total")?,
            succeeded: row.try_get("succeeded")?,
            failed: row.try_get("failed")?,
            cancelled: row.try_get("cancelled")?,
            sealed: row.try_get("sealed")?,
            finished: row.try_get("finished")?,
            ended_by_person: row.try_get("ended_by_person")?,
            outer: row.try_get("outer_batch")?,
        })
    }

    fn ended(&self) -> i64 {
        self.succeeded + self.failed + self.cancelled
    }

    /// The callback's template, if it is to be enqueued now that all members have ended.
    fn callback(&self, row: &PgRow) -> Result<Option<Value>, sqlx::Error> {
        if row.try_get("called")? {
            return Ok(None);
        }
        let on: Option<&str> = row.try_get("callback_on")?;
        let well = self.succeeded == self.total && !self.ended_by_person;
        if on == Some(CallbackOn::Complete.name()) || (on == Some(CallbackOn::Success.name()) && well) {
            return row.try_get("callback");
        }
        Ok(None)
    }
}

/// Says that the last member has ended; a batch in another one counts there from now on.
async fn finish(connection: &mut PgConnection, id: BatchId, counts: &Counts) -> Result<(), sqlx::Error> {
    sqlx::query("UPDATE batches SET finished_at = now() WHERE id = $1")
        .bind(id.0)
        .execute(&mut *connection)
        .await?;
    if let Some(outer) = counts.outer {
        sqlx::query("INSERT INTO batch_events (batch, succeeded, failed, cancelled) VALUES ($1, $2, $3, $4)")
            .bind(outer)
            .bind(i32::from(counts.succeeded == counts.total && !counts.ended_by_person))
            .bind(i32::from(counts.failed > 0))
            .bind(i32::from(counts.failed == 0 && (counts.cancelled > 0 || counts.ended_by_person)))
            .execute(connection)
            .await?;
    }
    Ok(())
}

async fn called(connection: &mut PgConnection, id: BatchId, job: JobId) -> Result<(), sqlx::Error> {
    sqlx::query("UPDATE batches SET called_at = now(), callback_job = $2, callback = NULL WHERE id = $1")
        .bind(id.0)
        .bind(job.0)
        .execute(connection)
        .await?;
    Ok(())
}
