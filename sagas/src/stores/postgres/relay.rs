//! What relay and reconciler read: the ledger is the outbox (PROTOCOL.md 18).

use std::time::Duration;

use chrono::{DateTime, Utc};
use queue::{Envelope, JobId, Priority, QueueName, TenantId, TraceContext};
use sqlx::{PgConnection, Postgres as Db, Row, Transaction, postgres::PgRow};
use uuid::Uuid;

use super::Postgres;
use crate::error::{Class, Dependency, StoreError};

/// Undispatched jobs, locked until [`Batch::done`] or drop, so that two relays never take the same ones.
pub struct Batch {
    tx: Transaction<'static, Db>,
    /// The jobs.
    pub envelopes: Vec<Envelope>,
}

/// What a look at unfinished jobs found.
pub struct Unfinished {
    /// Those that should be in Redis.
    pub settled: Vec<Envelope>,
    /// After which id to look next; `None`: that was all.
    pub next: Option<Uuid>,
}

impl Batch {
    /// Records that these jobs are in Redis. The others stay undispatched.
    pub async fn done(mut self, dispatched: &[JobId]) -> Result<(), StoreError> {
        sqlx::query("UPDATE jobs SET dispatched_at = now() WHERE id = ANY($1)")
            .bind(dispatched.iter().map(|id| id.0).collect::<Vec<_>>())
            .execute(&mut *self.tx)
            .await?;
        Ok(self.tx.commit().await?)
    }
}

/// Times beyond those that Rust knows ('infinity') are brought within: one job must not stop the relay.
pub(super) const ENVELOPE: &str = "id, kind, queue, priority, tenant, traceparent, tracestate, created_at,
    greatest(least(run_at, '9999-12-31 23:59Z'), 'epoch') AS run_at, run_at > now() AS later";

/// Undispatched jobs of one queue and priority, those due earliest first.
const OF_PLACE: &str = "SELECT id FROM jobs WHERE dispatched_at IS NULL AND state = 'waiting'
    AND queue = p.queue AND priority = p.priority AND run_at <= p.until";

impl Postgres {
    /// Undispatched jobs, at most `limit`, without those of the queues in `full`, and without those of the queues in `later_full`
    /// that are not due yet: such jobs, however many, must not hold up the others. The highest priority comes first, and of one
    /// priority the queue whose first job has been due the longest, the others' turn being the next batch; but each priority has a
    /// twentieth for itself, which its queues share, so that none waits for all of another.
    ///
    /// It hops from one queue and priority to the next, a look-up each, and locks no more than it takes.
    pub async fn undispatched(
        &self,
        limit: i64,
        full: &[String],
        later_full: &[String],
    ) -> Result<Batch, StoreError> {
        let mut tx = self.begin().await?;
        let rows = sqlx::query(sqlx::AssertSqlSafe(format!(
            "WITH RECURSIVE hop AS (
                 (SELECT queue, priority, run_at FROM jobs WHERE dispatched_at IS NULL AND state = 'waiting'
                  ORDER BY queue, priority, run_at LIMIT 1)
                 UNION ALL
                 SELECT next.* FROM hop CROSS JOIN LATERAL (
                     SELECT queue, priority, run_at FROM jobs WHERE dispatched_at IS NULL AND state = 'waiting'
                       AND (queue, priority) > (hop.queue, hop.priority)
                     ORDER BY queue, priority, run_at LIMIT 1) AS next
             ), place AS MATERIALIZED (
                 SELECT *, greatest($3 / count(*) OVER (PARTITION BY priority), 1) AS share FROM (
                     SELECT queue, priority, run_at AS first,
                            CASE WHEN queue = ANY ($4) THEN now() ELSE 'infinity' END AS until FROM hop
                 ) AS p
                 WHERE queue <> ALL ($2) AND first <= until
             ), of_each AS MATERIALIZED (
                 SELECT j.id FROM generate_series(0, 9) AS n (priority), LATERAL (
                     SELECT j.id FROM (SELECT * FROM place WHERE priority = n.priority ORDER BY first) AS p,
                         LATERAL ({OF_PLACE} ORDER BY run_at LIMIT p.share FOR UPDATE SKIP LOCKED) AS j
                     LIMIT $3) AS j
                 LIMIT $1
             ), highest AS MATERIALIZED (
                 SELECT j.id FROM (SELECT * FROM place ORDER BY priority DESC, first) AS p, LATERAL (
                     {OF_PLACE} AND id <> ALL (ARRAY(SELECT id FROM of_each))
                     ORDER BY run_at LIMIT $1 FOR UPDATE SKIP LOCKED) AS j
                 LIMIT $1 - (SELECT count(*) FROM of_each)
             )
             SELECT {ENVELOPE} FROM jobs WHERE id IN (SELECT id FROM of_each UNION ALL SELECT id FROM highest) ORDER BY created_at"
        )))
        .bind(limit)
        .bind(full)
        .bind((limit / 20).max(1))
        .bind(later_full)
        .fetch_all(&mut *tx)
        .await?;
        let envelopes: Vec<Envelope> = rows.iter().map(envelope).collect::<Result<_, _>>()?;
        // Committed with the dispatch.
        let ids: Vec<Uuid> = envelopes.iter().map(|envelope| envelope.id.0).collect();
        self.seal_plain(&mut tx, &ids).await?;
        Ok(Batch { tx, envelopes })
    }

    /// How many jobs wait for the relay.
    pub async fn undispatched_count(&self) -> Result<i64, StoreError> {
        Ok(sqlx::query_scalar("SELECT count(*) FROM jobs WHERE dispatched_at IS NULL AND state = 'waiting'")
            .fetch_one(&self.pool)
            .await?)
    }

    /// Looks at the next `limit` unfinished jobs after `after`, oldest ids first. Of these it returns the dispatched ones, without those
    /// changed within `grace`: they may be on their way. The running among them are ones that a worker took.
    ///
    /// It counts what it looks at, not what it returns: jobs that wait for the relay may stand between two others by the million.
    pub async fn unfinished(
        &self,
        after: Uuid,
        limit: i64,
        grace: Duration,
    ) -> Result<Unfinished, StoreError> {
        let rows = sqlx::query(sqlx::AssertSqlSafe(format!(
            "SELECT {ENVELOPE}, (dispatched_at < now() - make_interval(secs => $3)
                 AND coalesce(taken_at, created_at) < now() - make_interval(secs => $3)) IS TRUE AS settled
             FROM jobs WHERE id > $1 AND state IN ('waiting', 'running') ORDER BY id LIMIT $2"
        )))
        .bind(after)
        .bind(limit)
        .bind(grace.as_secs_f64())
        .fetch_all(&self.pool)
        .await?;
        let mut settled = vec![];
        for row in &rows {
            if row.try_get("settled")? {
                settled.push(envelope(row)?);
            }
        }
        let last = rows.last().map(|row| row.try_get("id")).transpose()?;
        Ok(Unfinished { settled, next: last.filter(|_| rows.len() as i64 == limit) })
    }

    /// The envelope of one unfinished job.
    pub async fn envelope(&self, job: JobId) -> Result<Option<Envelope>, StoreError> {
        let row = sqlx::query(sqlx::AssertSqlSafe(format!(
            "SELECT {ENVELOPE} FROM jobs WHERE id = $1 AND state IN ('waiting', 'running')"
        )))
        .bind(job.0)
        .fetch_optional(&self.pool)
        .await?;
        row.as_ref().map(envelope).transpose()
    }

    /// Whether this process is the one that runs the role `name` for now. The answer holds as long as the returned
    /// connection lives; another process takes over when it ends.
    pub async fn lead(&self, name: &str) -> Result<Option<Leadership>, StoreError> {
        use sqlx::Connection;
        // A leader checks in every second or so; one that is stopped or cut off must not keep the role.
        let options =
            self.pool.connect_options().as_ref().clone().options([("idle_session_timeout", "15000")]);
        let mut connection = PgConnection::connect_with(&options).await?;
        let leads: bool = sqlx::query_scalar("SELECT pg_try_advisory_lock(hashtext('flotilla.role.' || $1))")
            .bind(name)
            .fetch_one(&mut connection)
            .await?;
        Ok(leads.then_some(Leadership(connection)))
    }
}

/// Leadership of a role; ends when dropped.
pub struct Leadership(PgConnection);

impl Leadership {
    /// Fails when the leadership's connection is gone, and the lock with it.
    pub async fn check(&mut self) -> Result<(), StoreError> {
        sqlx::query("SELECT 1").execute(&mut self.0).await?;
        Ok(())
    }
}

pub(super) fn envelope(row: &PgRow) -> Result<Envelope, StoreError> {
    // The columns' checks allow nothing that these types refuse.
    let odd = |what: &str, e: &dyn std::fmt::Display| {
        StoreError::new(Dependency::Postgres, Class::Permanent, format!("a job's {what} can't be read: {e}"))
    };
    let run_at: DateTime<Utc> = row.try_get("run_at")?;
    let created_at: DateTime<Utc> = row.try_get("created_at")?;
    let later: bool = row.try_get("later")?;
    let traceparent: Option<String> = row.try_get("traceparent")?;
    Ok(Envelope {
        id: JobId(row.try_get("id")?),
        kind: row.try_get("kind")?,
        queue: QueueName::new(row.try_get::<String, _>("queue")?).map_err(|e| odd("queue", &e))?,
        priority: Priority::try_from(i64::from(row.try_get::<i16, _>("priority")?))
            .map_err(|e| odd("priority", &e))?,
        tenant: TenantId::new(row.try_get::<String, _>("tenant")?).map_err(|e| odd("tenant", &e))?,
        run_at_ms: later.then(|| run_at.timestamp_millis()),
        enqueued_at_ms: created_at.timestamp_millis(),
        trace: match traceparent {
            Some(traceparent) => Some(TraceContext { traceparent, tracestate: row.try_get("tracestate")? }),
            None => None,
        },
        fast: None,
        attempts: 0,
        lost: 0,
        lost_alone: 0,
    })
}
