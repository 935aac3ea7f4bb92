//! What sagas wait for without holding a slot: timers, signals, child jobs.
//!
//! A wait is a row, made by the first delivery that gets to it and ended by the first that finds it over, both under the
//! fence: whatever is delivered again finds the same time and the same answer. What ends a wait from outside (a signal, the
//! end of the last child) locks the waiting job's row before it commits, as [`suspend`](Postgres::suspend) does: so either it
//! finds the job asleep and wakes it, or the job finds it and does not go to sleep.

use std::{collections::HashMap, time::Duration};

use chrono::{DateTime, Utc};
use queue::JobId;
use serde::Serialize;
use serde_json::Value;
use sqlx::{FromRow, PgConnection, Row, postgres::PgRow};
use uuid::Uuid;

use super::{
    Postgres,
    accept::{Accepted, NewJob},
    batches::{self, BatchId, Changed, Inserted, NewBatch},
    collecting,
    ending::{Run, insert_steps, log_run},
    lock_alive,
    take::StepRecord,
};
use crate::{
    encryption::{Owner, Purpose},
    error::{Class, Dependency, StoreError},
};

/// Signals of one job at most.
pub const MAX_SIGNALS: i64 = 100;

/// The answer to a wait.
#[derive(Debug, Clone, PartialEq)]
pub enum Awaited<T> {
    /// It is over, and this is what came.
    Here(T),
    /// Its time was over before anything came.
    TimedOut,
    /// Nothing yet. `None`: there is no time at which it ends by itself.
    NotYet(Option<Duration>),
    /// The job is somebody else's.
    LeaseLost,
    /// The log has no row of the run yet, so nothing can be kept for it.
    NotBegun,
    /// It is over, but this process can't open what came: another may, or this one once it has the key.
    Unreadable(String),
}

/// When a timer is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Due {
    /// So long after the first delivery asked.
    In(Duration),
    /// Then.
    At(DateTime<Utc>),
}

/// What became of a signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signalled {
    /// It is kept for the job, which is woken if it waits for it.
    Sent,
    /// The same signal with the same payload was sent before.
    Duplicate,
    /// A signal of this name with another payload was sent before.
    Conflict,
    /// The job has ended.
    Ended,
    /// The job has [`MAX_SIGNALS`] signals.
    TooMany,
    /// No such job of this tenant.
    Unknown,
}

/// How a child job ended.
#[derive(Debug, Clone, PartialEq)]
pub struct ChildEnd {
    /// The child, or the replay that took its place.
    pub id: JobId,
    /// `succeeded`, `cancelled`, `dead` or `parked`.
    pub state: String,
    /// What it returned.
    pub result: Option<Value>,
    /// Why it failed.
    pub error: Option<String>,
}

impl ChildEnd {
    /// Whether it did what it was asked to.
    pub fn succeeded(&self) -> bool {
        self.state == "succeeded"
    }
}

/// A wait as people see it.
#[derive(Debug, Clone, Serialize, FromRow)]
pub struct WaitView {
    /// `timer`, `signal` or `children`.
    pub kind: String,
    /// What for.
    pub name: String,
    /// When it is due, or given up.
    pub due_at: Option<DateTime<Utc>>,
    /// The batch of the children.
    pub batch_id: Option<Uuid>,
    /// Since when.
    pub created_at: DateTime<Utc>,
    /// When it was over.
    pub ended_at: Option<DateTime<Utc>>,
    /// `due`, `answered` or `timed_out`.
    pub outcome: Option<String>,
}

/// The collector cancels no more in a batch that has finished: what goes on in it since, as a replay does, is few and cancelled here.
async fn cancel_the_rest(connection: &mut PgConnection, batch: BatchId) -> Result<(), StoreError> {
    collecting::cancel_members_in(connection, batch, Uuid::nil(), i64::MAX).await?;
    Ok(())
}

/// Cancels the children of a run that is parked short of its pivot, in the transaction that closes it. It locks their batches, so
/// that it comes before all other locks.
pub(super) async fn cancel_children_of_parked(
    connection: &mut PgConnection,
    saga: Uuid,
) -> Result<(), StoreError> {
    let batches: Vec<Uuid> = sqlx::query_scalar(
        "SELECT w.batch_id FROM saga_waits w JOIN sagas s ON s.id = w.saga_id
         WHERE s.id = $1 AND s.state = 'parked' AND w.kind = 'children'
             AND (s.verdict ? 'end' OR s.verdict ->> 'past_pivot' = 'false') ORDER BY w.batch_id",
    )
    .bind(saga)
    .fetch_all(&mut *connection)
    .await?;
    for batch in batches.into_iter().map(BatchId) {
        if batches::cancel_in(connection, batch).await? == Changed::Finished {
            cancel_the_rest(connection, batch).await?;
        }
    }
    Ok(())
}

/// A wait's row, read under the fence.
struct Wait {
    outcome: Option<String>,
    left: Option<Duration>,
}

impl Wait {
    fn is_due(&self) -> bool {
        self.left.is_some_and(|left| left.is_zero())
    }
}

impl Postgres {
    /// Waits for a time. Its row is made by the first call for this run and name; what later calls say of the time changes
    /// nothing.
    pub async fn await_timer(&self, run: &Run, name: &str, due: Due) -> Result<Awaited<()>, StoreError> {
        let mut tx = self.begin().await?;
        if lock_alive(&mut tx, &[(run.job_id, run.fence)]).await?.is_empty() {
            return Ok(Awaited::LeaseLost);
        }
        let Some(wait) = wait_row(&mut tx, run, "timer", name, Some(due), None).await? else {
            return Ok(Awaited::NotBegun);
        };
        let answer = if wait.is_due() {
            end_wait(&mut tx, run, "timer", name, "due").await?;
            Awaited::Here(())
        } else {
            Awaited::NotYet(wait.left)
        };
        crate::fault_point!("engine.timer.inside");
        tx.commit().await?;
        Ok(answer)
    }

    /// Waits for a signal, `within` this time of the first call. Whether it came or timed out is decided once: a signal that
    /// comes after that is kept, and changes nothing for this wait.
    pub async fn await_signal(
        &self,
        run: &Run,
        name: &str,
        within: Duration,
    ) -> Result<Awaited<Value>, StoreError> {
        let mut tx = self.begin().await?;
        if lock_alive(&mut tx, &[(run.job_id, run.fence)]).await?.is_empty() {
            return Ok(Awaited::LeaseLost);
        }
        let due = Some(Due::In(within));
        let Some(wait) = wait_row(&mut tx, run, "signal", name, due, None).await? else {
            return Ok(Awaited::NotBegun);
        };
        let came = if wait.outcome.as_deref() == Some("timed_out") {
            None
        } else {
            self.signal_payload(&mut tx, run.job_id, name).await?
        };
        let answer = match came {
            // Over also if it can't be read here: a wait that is not would bring the job back at once, again and again.
            Some(payload) => {
                end_wait(&mut tx, run, "signal", name, "answered").await?;
                payload.map_or_else(Awaited::Unreadable, Awaited::Here)
            }
            None if wait.is_due() => {
                end_wait(&mut tx, run, "signal", name, "timed_out").await?;
                Awaited::TimedOut
            }
            None => Awaited::NotYet(wait.left),
        };
        crate::fault_point!("engine.signal.inside");
        tx.commit().await?;
        Ok(answer)
    }

    /// Enqueues the children of a run, if this is the first call for them, and waits for their end. They are a sealed batch
    /// with this id; with known ids a second call enqueues none.
    pub async fn await_children(
        &self,
        run: &Run,
        name: &str,
        batch: &NewBatch,
        jobs: &[NewJob],
    ) -> Result<Awaited<Vec<ChildEnd>>, StoreError> {
        let mut tx = self.begin().await?;
        if lock_alive(&mut tx, &[(run.job_id, run.fence)]).await?.is_empty() {
            return Ok(Awaited::LeaseLost);
        }
        let Some(wait) = wait_row(&mut tx, run, "children", name, None, Some(batch.id)).await? else {
            return Ok(Awaited::NotBegun);
        };
        if wait.outcome.is_none() {
            let there: bool = sqlx::query_scalar("SELECT EXISTS (SELECT FROM batches WHERE id = $1)")
                .bind(batch.id.0)
                .fetch_one(&mut *tx)
                .await?;
            if !there {
                self.enqueue_children(&mut tx, batch, jobs).await?;
            }
        }
        let answer = if let Some(ends) = self.child_ends(&mut tx, batch.id).await? {
            end_wait(&mut tx, run, "children", name, "answered").await?;
            ends.map_or_else(Awaited::Unreadable, Awaited::Here)
        } else {
            if wait.outcome.is_some() {
                reopen(&mut tx, run, batch.id).await?;
            }
            Awaited::NotYet(None)
        };
        crate::fault_point!("engine.children.inside");
        tx.commit().await?;
        Ok(answer)
    }

    /// Cancels the unfinished children of a run and waits for their end. Children that were never enqueued have none.
    pub async fn await_cancelled_children(
        &self,
        run: &Run,
        batch: BatchId,
    ) -> Result<Awaited<()>, StoreError> {
        let mut tx = self.begin().await?;
        // A batch's row is locked before all others.
        let cancelled = batches::cancel_in(&mut tx, batch).await?;
        if lock_alive(&mut tx, &[(run.job_id, run.fence)]).await?.is_empty() {
            return Ok(Awaited::LeaseLost);
        }
        if cancelled == Changed::Finished {
            cancel_the_rest(&mut tx, batch).await?;
        }
        let under_way: bool = sqlx::query_scalar(
            "SELECT EXISTS (SELECT FROM jobs WHERE batch_id = $1 AND state IN ('waiting', 'running'))",
        )
        .bind(batch.0)
        .fetch_one(&mut *tx)
        .await?;
        if under_way {
            reopen(&mut tx, run, batch).await?;
        }
        crate::fault_point!("engine.cancel_children.inside");
        tx.commit().await?;
        Ok(if under_way { Awaited::NotYet(None) } else { Awaited::Here(()) })
    }

    async fn enqueue_children(
        &self,
        connection: &mut PgConnection,
        batch: &NewBatch,
        jobs: &[NewJob],
    ) -> Result<(), StoreError> {
        let refused = |what: String| StoreError::new(Dependency::Postgres, Class::Permanent, what);
        if let Inserted::Refused(why) = batches::insert(connection, batch, None, false).await? {
            return Err(refused(format!("the children can't be enqueued: {why:?}")));
        }
        let jobs: Vec<NewJob> = jobs
            .iter()
            .map(|job| NewJob { batch: Some(batch.id), parent: batch.parent, ..job.clone() })
            .collect();
        for (no, accepted) in self.accept_in(connection, &jobs, false).await?.into_iter().enumerate() {
            if !matches!(accepted, Accepted::New(_)) {
                return Err(refused(format!("child {no} can't be enqueued: {accepted:?}")));
            }
        }
        Ok(batches::seal(connection, batch.id).await?)
    }

    /// How the members of a batch ended, in the order in which they were given; their ids ascend. One that died and was replayed
    /// ended as its replay did. Or why the result of one can't be read here. `None` while one is under way: that and the ends are
    /// read at once, since a replay may begin at any time.
    async fn child_ends(
        &self,
        connection: &mut PgConnection,
        batch: BatchId,
    ) -> Result<Option<Result<Vec<ChildEnd>, String>>, StoreError> {
        let rows = sqlx::query(
            "SELECT id, replay_of, tenant, state, result, result_key_id, last_error FROM jobs WHERE batch_id = $1 ORDER BY id",
        )
        .bind(batch.0)
        .fetch_all(connection)
        .await?;
        let mut members: HashMap<Uuid, usize> = HashMap::with_capacity(rows.len());
        for (place, row) in rows.iter().enumerate() {
            if matches!(row.try_get("state")?, "waiting" | "running") {
                return Ok(None);
            }
            members.insert(row.try_get("id")?, place);
        }
        // The place of what replays the member at a place.
        let mut replays: HashMap<usize, usize> = HashMap::new();
        let mut given = Vec::with_capacity(rows.len());
        for (place, row) in rows.iter().enumerate() {
            let dead: Option<Uuid> = row.try_get("replay_of")?;
            match dead.and_then(|dead| members.get(&dead)) {
                Some(dead) => {
                    replays.insert(*dead, place);
                }
                None => given.push(place),
            }
        }
        let mut ends = Vec::with_capacity(given.len());
        for mut place in given {
            // Each job replays one, so this comes to an end.
            while let Some(later) = replays.get(&place) {
                place = *later;
            }
            match self.child_end(&rows[place])? {
                Ok(end) => ends.push(end),
                Err(why) => return Ok(Some(Err(why))),
            }
        }
        Ok(Some(Ok(ends)))
    }

    fn child_end(&self, row: &PgRow) -> Result<Result<ChildEnd, String>, sqlx::Error> {
        let (id, tenant): (Uuid, String) = (row.try_get("id")?, row.try_get("tenant")?);
        let result: Option<Value> = row.try_get("result")?;
        let key: Option<String> = row.try_get("result_key_id")?;
        let owner = Owner { tenant: &tenant, job: id, purpose: Purpose::Result };
        let result = result.map(|stored| self.cipher.open(owner, stored, key.as_deref())).transpose();
        let (state, error) = (row.try_get("state")?, row.try_get("last_error")?);
        Ok(result
            .map(|result| ChildEnd { id: JobId(id), state, result, error })
            .map_err(|why| format!("the result of child {id}: {why}")))
    }

    /// Sends a job a signal, of `tenant` if given. It is kept until a step waits for it. The same one is sent once.
    pub async fn signal(
        &self,
        job: JobId,
        tenant: Option<&str>,
        name: &str,
        payload: &Value,
    ) -> Result<Signalled, StoreError> {
        let mut tx = self.begin().await?;
        let row: Option<(String, String)> = sqlx::query_as(
            "SELECT tenant, state FROM jobs WHERE id = $1 AND ($2::text IS NULL OR tenant = $2) FOR NO KEY UPDATE",
        )
        .bind(job.0)
        .bind(tenant)
        .fetch_optional(&mut *tx)
        .await?;
        let Some((tenant, state)) = row else { return Ok(Signalled::Unknown) };
        if let Some(earlier) = self.signal_payload(&mut tx, job, name).await? {
            let earlier =
                earlier.map_err(|why| StoreError::new(Dependency::Postgres, Class::Permanent, why))?;
            return Ok(if earlier == *payload { Signalled::Duplicate } else { Signalled::Conflict });
        }
        // The end of a parked one can be taken back: its run may come to wait for this.
        if !matches!(state.as_str(), "waiting" | "running" | "parked") {
            return Ok(Signalled::Ended);
        }
        let count: i64 = sqlx::query_scalar("SELECT count(*) FROM job_signals WHERE job_id = $1")
            .bind(job.0)
            .fetch_one(&mut *tx)
            .await?;
        if count >= MAX_SIGNALS {
            return Ok(Signalled::TooMany);
        }
        let owner = Owner { tenant: &tenant, job: job.0, purpose: Purpose::Signal };
        let (sealed, key_id) = self.cipher.seal(owner, payload).ok_or_else(|| {
            StoreError::new(Dependency::Postgres, Class::Permanent, "the signal's payload can't be sealed")
        })?;
        sqlx::query(
            "INSERT INTO job_signals (job_id, name, payload, payload_key_id) VALUES ($1, $2, $3, $4)",
        )
        .bind(job.0)
        .bind(name)
        .bind(sealed)
        .bind(key_id)
        .execute(&mut *tx)
        .await?;
        wake(&mut tx, job, "w.kind = 'signal' AND w.name = $2::text", name).await?;
        tx.commit().await?;
        Ok(Signalled::Sent)
    }

    /// What came, or why it can't be read here.
    async fn signal_payload(
        &self,
        connection: &mut PgConnection,
        job: JobId,
        name: &str,
    ) -> Result<Option<Result<Value, String>>, StoreError> {
        let row = sqlx::query(
            "SELECT j.tenant, s.payload, s.payload_key_id FROM job_signals s JOIN jobs j ON j.id = s.job_id
             WHERE s.job_id = $1 AND s.name = $2",
        )
        .bind(job.0)
        .bind(name)
        .fetch_optional(connection)
        .await?;
        let Some(row) = row else { return Ok(None) };
        let (tenant, key): (String, Option<String>) =
            (row.try_get("tenant")?, row.try_get("payload_key_id")?);
        let owner = Owner { tenant: &tenant, job: job.0, purpose: Purpose::Signal };
        let payload = self.cipher.open(owner, row.try_get("payload")?, key.as_deref());
        Ok(Some(payload.map_err(|why| format!("the signal {name:?}: {why}"))))
    }

    /// Gives a job back, uncharged, with what its saga has done so far: the run goes on from `next_step` with `data` in its
    /// next delivery, and of a group leaves out the branches `done`. Returns the wait, which is shorter if one of its waits is due
    /// before, and none if what the run waits for has come meanwhile, or a person wants the job's end and the run can still turn
    /// back. `None`: the fence refused.
    pub async fn suspend(
        &self,
        run: &Run,
        wait: Duration,
        progress: Option<(i16, &Value, &[String])>,
        steps: &[StepRecord],
    ) -> Result<Option<Duration>, StoreError> {
        crate::fault_point!("engine.suspend.before");
        let mut tx = self.begin().await?;
        let alive = lock_alive(&mut tx, &[(run.job_id, run.fence)]).await?;
        let Some(alive) = alive.get(&run.job_id) else { return Ok(None) };
        log_run(&mut *tx, run).await?;
        let (mut at_once, mut wait) = (alive.cancel_requested, wait);
        if let Some(saga) = run.saga_id {
            // This statement began after the lock, so it sees whatever came before.
            let begun: Option<(bool, bool, Option<f64>)> = sqlx::query_as(
                "SELECT EXISTS (
                     SELECT FROM saga_waits w WHERE w.saga_id = s.id AND w.ended_at IS NULL AND w.fence = $2
                       AND (EXISTS (SELECT FROM job_signals g WHERE w.kind = 'signal' AND g.job_id = s.job_id AND g.name = w.name)
                         -- Whether one is under way, as those ask who wait: a batch that has finished may have one again.
                         OR w.kind = 'children' AND NOT EXISTS (
                             SELECT FROM jobs c WHERE c.batch_id = w.batch_id AND c.state IN ('waiting', 'running')))),
                     s.state = 'running' AND s.pivot_at IS NULL,
                     -- In a group the others went on since the wait was asked for.
                     (SELECT extract(epoch FROM min(w.due_at) - now())::float8 FROM saga_waits w
                      WHERE w.saga_id = s.id AND w.ended_at IS NULL AND w.fence = $2 AND s.state = 'running')
                 FROM sagas s WHERE s.id = $1",
            )
            .bind(saga)
            .bind(run.fence.0)
            .fetch_optional(&mut *tx)
            .await?;
            if let Some((next_step, data, done)) = progress {
                sqlx::query(
                    // The log never goes back: a step whose commit was not answered may stand in it although it seemed to fail.
                    "UPDATE sagas SET next_step = $2, data = $3, done = $4, updated_at = now(), fence = $5
                     WHERE id = $1 AND next_step <= $2",
                )
                .bind(saga)
                .bind(next_step)
                .bind(data)
                .bind(done)
                .bind(run.fence.0)
                .execute(&mut *tx)
                .await?;
            }
            if let Some((came, may_turn, due)) = begun {
                at_once = came || at_once && may_turn;
                wait = due.map_or(wait, |due| wait.min(Duration::from_secs_f64(due.max(0.0))));
                insert_steps(&mut tx, &[(saga, run.fence, steps)]).await?;
            }
        }
        let wait = if at_once { Duration::ZERO } else { wait };
        sqlx::query(
            "UPDATE jobs SET state = 'waiting', worker = NULL, run_at = least(now() + make_interval(secs => $2), '9999-12-31 23:59Z'),
                    unroutable_since = NULL
             WHERE id = $1",
        )
        .bind(run.job_id.0)
        .bind(wait.as_secs_f64())
        .execute(&mut *tx)
        .await?;
        crate::fault_point!("engine.suspend.inside");
        tx.commit().await?;
        crate::fault_point!("engine.suspend.after");
        Ok(Some(wait))
    }

    /// What a run waited and waits for, oldest first.
    pub async fn waits(&self, saga: Uuid) -> Result<Vec<WaitView>, StoreError> {
        Ok(sqlx::query_as(
            "SELECT kind, name, due_at, batch_id, created_at, ended_at, outcome FROM saga_waits WHERE saga_id = $1
             ORDER BY created_at, name",
        )
        .bind(saga)
        .fetch_all(&self.pool)
        .await?)
    }
}

/// Wakes the jobs that wait for a batch which has finished; the caller commits that.
pub(super) async fn wake_parents(connection: &mut PgConnection, batch: BatchId) -> Result<(), sqlx::Error> {
    let parents: Vec<Uuid> = sqlx::query_scalar(
        "SELECT j.id FROM jobs j WHERE j.id IN (
             SELECT s.job_id FROM saga_waits w JOIN sagas s ON s.id = w.saga_id WHERE w.batch_id = $1 AND w.ended_at IS NULL)
         ORDER BY j.id FOR NO KEY UPDATE OF j",
    )
    .bind(batch.0)
    .fetch_all(&mut *connection)
    .await?;
    for parent in parents {
        wake(connection, JobId(parent), "w.batch_id = $2::text::uuid", &batch.0.to_string()).await?;
    }
    Ok(())
}

/// Makes a sleeping job due, and the relay tell Redis so, if its run waits for this. The caller holds the job's row.
async fn wake(
    connection: &mut PgConnection,
    job: JobId,
    what: &'static str,
    which: &str,
) -> Result<(), sqlx::Error> {
    sqlx::query(sqlx::AssertSqlSafe(format!(
        "UPDATE jobs SET run_at = now(), dispatched_at = NULL
         WHERE id = $1 AND state = 'waiting' AND EXISTS (
             SELECT FROM saga_waits w JOIN sagas s ON s.id = w.saga_id
             WHERE s.job_id = $1 AND s.state IN ('running', 'compensating') AND w.ended_at IS NULL
               AND w.fence = jobs.fence AND {what})"
    )))
    .bind(job.0)
    .bind(which)
    .execute(connection)
    .await?;
    Ok(())
}

/// The row of a wait, made if it is not there. `None`: the log has no row of the run.
async fn wait_row(
    connection: &mut PgConnection,
    run: &Run,
    kind: &'static str,
    name: &str,
    due: Option<Due>,
    batch: Option<BatchId>,
) -> Result<Option<Wait>, sqlx::Error> {
    let (after, at) = match due {
        Some(Due::In(time)) => (Some(time.as_secs_f64()), None),
        Some(Due::At(at)) => (None, Some(at)),
        None => (None, None),
    };
    log_run(&mut *connection, run).await?;
    sqlx::query(
        "INSERT INTO saga_waits (saga_id, kind, name, due_at, batch_id, fence)
         SELECT id, $2, $3, coalesce($5, now() + make_interval(secs => $4)), $6, $7 FROM sagas WHERE id = $1
         ON CONFLICT (saga_id, kind, name) DO UPDATE SET fence = excluded.fence",
    )
    .bind(run.saga_id)
    .bind(kind)
    .bind(name)
    .bind(after)
    .bind(at)
    .bind(batch.map(|batch| batch.0))
    .bind(run.fence.0)
    .execute(&mut *connection)
    .await?;
    let row = sqlx::query(
        "SELECT outcome, extract(epoch FROM due_at - now())::float8 AS left_s FROM saga_waits
         WHERE saga_id = $1 AND kind = $2 AND name = $3",
    )
    .bind(run.saga_id)
    .bind(kind)
    .bind(name)
    .fetch_optional(connection)
    .await?;
    row.map(|row| {
        let left: Option<f64> = row.try_get("left_s")?;
        // Up to the next millisecond, which is what Redis counts in: not due a moment too early.
        let left = left.map(|left| Duration::from_millis((left.max(0.0) * 1000.0).ceil() as u64));
        Ok(Wait { outcome: row.try_get("outcome")?, left })
    })
    .transpose()
}

/// Opens a wait for children again, if it was over before: one of them is replayed, or was parked and goes on. So its end is
/// heard of.
async fn reopen(connection: &mut PgConnection, run: &Run, batch: BatchId) -> Result<(), sqlx::Error> {
    sqlx::query(
        "UPDATE saga_waits SET ended_at = NULL, outcome = NULL, fence = $3 WHERE saga_id = $1 AND batch_id = $2",
    )
    .bind(run.saga_id)
    .bind(batch.0)
    .bind(run.fence.0)
    .execute(connection)
    .await?;
    Ok(())
}

async fn end_wait(
    connection: &mut PgConnection,
    run: &Run,
    kind: &'static str,
    name: &str,
    outcome: &'static str,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "UPDATE saga_waits SET ended_at = now(), outcome = $4
         WHERE saga_id = $1 AND kind = $2 AND name = $3 AND ended_at IS NULL",
    )
    .bind(run.saga_id)
    .bind(kind)
    .bind(name)
    .bind(outcome)
    .execute(connection)
    .await?;
    Ok(())
}
