//! Batches: jobs that are counted together, with a job that is enqueued once they have ended. Here is what people and
//! programs do to them; what the collector does is in [`collecting`](super::collecting).
//!
//! Counts are added to in the transaction that ends a member, by triggers on `jobs` (PROTOCOL.md 17): no statement that
//! ends jobs can forget them. Locks: a member's acceptance holds its batch's row `FOR KEY SHARE`, sealing it `FOR UPDATE`,
//! the collector's fold `FOR NO KEY UPDATE`; so adders and the collector never wait for each other, and nobody is added to
//! a sealed batch. A batch's row is locked before all others.

use std::{collections::HashMap, fmt, str::FromStr};

use chrono::{DateTime, Utc};
use queue::{JobId, TenantId};
use serde::{Deserialize, Serialize};
use serde_json::json;
use sqlx::{FromRow, PgConnection, Row};
use uuid::Uuid;

use super::{
    Postgres,
    accept::{Accepted, NewJob},
};
use crate::error::{Class, Dependency, StoreError};

/// A batch's identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BatchId(pub Uuid);

impl BatchId {
    /// A fresh UUIDv7.
    #[allow(clippy::new_without_default)] // a default that differs on each call would surprise
    pub fn new() -> Self {
        Self(Uuid::now_v7())
    }
}

impl fmt::Display for BatchId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for BatchId {
    type Err = uuid::Error;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Uuid::parse_str(text).map(Self)
    }
}

/// When a batch's callback is enqueued. Once in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CallbackOn {
    /// When all members have ended, however they did.
    Complete,
    /// When all members have succeeded; replays of those that failed count. Never for a cancelled batch.
    Success,
}

impl CallbackOn {
    /// The name in the ledger and on the way in.
    pub fn name(self) -> &'static str {
        match self {
            Self::Complete => "complete",
            Self::Success => "success",
        }
    }
}

/// The job that a batch enqueues at its end. Its payload gets a field `batch` with the batch's id, name and counts.
#[derive(Debug, Clone, PartialEq)]
pub struct Callback {
    /// When.
    pub on: CallbackOn,
    /// What; its id is fixed now, so that it can be waited for.
    pub job: NewJob,
}

/// A batch to make.
#[derive(Debug, Clone, PartialEq)]
pub struct NewBatch {
    /// Made by the client, so that a retried call is the same batch.
    pub id: BatchId,
    /// The owner of the batch and of every member.
    pub tenant: TenantId,
    /// For people, 1 to 256 characters.
    pub name: String,
    /// The unfinished job whose work this is. If it is a member of a batch, this one counts as a member there, too.
    pub parent: Option<JobId>,
    /// What to enqueue at the end.
    pub callback: Option<Callback>,
}

/// What became of a batch that was to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Created {
    /// It is there.
    Batch {
        /// What became of the jobs that came with it.
        jobs: Vec<Accepted>,
        /// The id that its callback's job will have or has; of a batch that was there before, its own and not this call's.
        /// `None` also once that job's record has expired.
        callback: Option<JobId>,
    },
    /// No such tenant.
    UnknownTenant,
    /// The id is another tenant's batch's.
    Taken,
    /// The parent is not an unfinished job of this tenant.
    NoParent(JobId),
}

/// The answer to sealing or cancelling.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Changed {
    /// It is now, or was before.
    Done,
    /// It has finished, which nothing changes any more.
    Finished,
    /// No such batch of this tenant.
    Unknown,
}

/// A batch as people see it. Its counts are exact at one moment.
#[derive(Debug, Clone, Serialize, FromRow)]
pub struct BatchView {
    /// The batch.
    pub id: Uuid,
    /// Owner.
    pub tenant: String,
    /// For people.
    pub name: String,
    /// `open`: takes members; `sealed`: takes none; `cancelled`: its members are being cancelled, or were; `finished`:
    /// all members have ended.
    pub state: String,
    /// The job whose work it is.
    pub parent: Option<Uuid>,
    /// The batch of which it counts as a member.
    pub outer_batch: Option<Uuid>,
    /// Members.
    pub total: i64,
    /// Ended well.
    pub succeeded: i64,
    /// Dead or parked.
    pub failed: i64,
    /// Ended by a person.
    pub cancelled: i64,
    /// Taken by a worker now.
    pub running: i64,
    /// Members that have ended, and what the running ones say of themselves, of all: 0 to 100.
    pub percent: f64,
    /// `complete` or `success`.
    pub callback_on: Option<String>,
    /// The callback's job, once it is enqueued.
    pub callback_job: Option<Uuid>,
    /// When that was.
    pub called_at: Option<DateTime<Utc>>,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// Since when it takes no more members.
    pub sealed_at: Option<DateTime<Utc>>,
    /// When a person asked for its end.
    pub cancelled_at: Option<DateTime<Utc>>,
    /// When its last member ended.
    pub finished_at: Option<DateTime<Utc>>,
}

/// What the collector has not folded yet is added on the way, in the same snapshot.
const VIEW: &str = "SELECT v.*,
       CASE WHEN v.total > 0 THEN least(100, 100.0 * (v.succeeded + v.failed + v.cancelled) / v.total + v.under_way / v.total)
            WHEN v.finished_at IS NOT NULL THEN 100 ELSE 0 END::float8 AS percent
  FROM (SELECT b.id, b.tenant, b.name, b.parent, b.outer_batch, b.callback_on, b.callback_job, b.called_at, b.created_at,
               b.sealed_at, b.cancelled_at, b.finished_at,
               CASE WHEN b.cancelled_at IS NOT NULL THEN 'cancelled' WHEN b.finished_at IS NOT NULL THEN 'finished'
                    WHEN b.sealed_at IS NOT NULL THEN 'sealed' ELSE 'open' END AS state,
               b.total + e.added AS total, b.succeeded + e.succeeded AS succeeded, b.failed + e.failed AS failed,
               b.cancelled + e.cancelled AS cancelled, r.running, r.under_way
          FROM batches b
         CROSS JOIN LATERAL (
               SELECT coalesce(sum(added), 0)::bigint AS added, coalesce(sum(succeeded), 0)::bigint AS succeeded,
                      coalesce(sum(failed), 0)::bigint AS failed, coalesce(sum(cancelled), 0)::bigint AS cancelled
               FROM batch_events WHERE batch = b.id) e
         CROSS JOIN LATERAL (
               SELECT count(*) AS running, coalesce(sum(p.percent), 0)::float8 AS under_way
               FROM jobs j LEFT JOIN job_progress p ON p.job_id = j.id AND p.fence = j.fence
               WHERE j.batch_id = b.id AND j.state = 'running') r
       ) v";

/// Which batches; newest first.
#[derive(Debug, Clone, Default)]
pub struct BatchFilter {
    /// Only of this tenant.
    pub tenant: Option<String>,
    /// Only those that have (or have not) finished.
    pub finished: Option<bool>,
    /// Only older ids: the last id of the page before.
    pub before: Option<Uuid>,
    /// Page length.
    pub limit: i64,
}

impl Postgres {
    /// Makes a batch with its first jobs, and seals it if asked, in one transaction. Calling again with the same ids after
    /// an unknown outcome makes and accepts nothing twice. The jobs' own `batch` is set here.
    pub async fn create_batch(
        &self,
        batch: &NewBatch,
        jobs: &[NewJob],
        seal: bool,
        dispatched: bool,
    ) -> Result<Created, StoreError> {
        let mut tx = self.begin().await?;
        let callback = batch.callback.as_ref().map(|callback| self.seal_job(&callback.job)).transpose()?;
        let callback = match insert(&mut tx, batch, callback.as_ref(), true).await? {
            Inserted::Refused(why) => return Ok(why),
            Inserted::New => callback.map(|job| job.id),
            Inserted::There { callback } => {
                if seal {
                    // Others may know of it: those who have found it open commit first.
                    lock(&mut tx, batch.id, None).await?;
                }
                callback
            }
        };
        let jobs: Vec<NewJob> =
            jobs.iter().map(|job| NewJob { batch: Some(batch.id), ..job.clone() }).collect();
        let jobs = self.accept_in(&mut tx, &jobs, dispatched).await?;
        if seal {
            self::seal(&mut tx, batch.id).await?;
        }
        tx.commit().await?;
        Ok(Created::Batch { jobs, callback })
    }

    /// Seals a batch: it takes no more members, and completes once all have ended. An empty one completes at once.
    pub async fn seal_batch(&self, id: BatchId, tenant: Option<&str>) -> Result<Changed, StoreError> {
        let mut tx = self.begin().await?;
        let changed = match lock(&mut tx, id, tenant).await? {
            Changed::Done => self::seal(&mut tx, id).await.map(|()| Changed::Done)?,
            // Whatever has finished was sealed before.
            Changed::Finished => Changed::Done,
            Changed::Unknown => Changed::Unknown,
        };
        tx.commit().await?;
        Ok(changed)
    }

    /// Cancels a batch: seals it, and from this commit on its unfinished members will be cancelled, whoever dies. What
    /// calls this goes through the members itself ([`cancel_members`](Self::cancel_members)); the collector ends what is left.
    pub async fn cancel_batch(&self, id: BatchId, tenant: Option<&str>) -> Result<Changed, StoreError> {
        let mut tx = self.begin().await?;
        let changed = lock(&mut tx, id, tenant).await?;
        if changed == Changed::Done {
            cancel_locked(&mut tx, id).await?;
        }
        tx.commit().await?;
        Ok(changed)
    }

    /// One batch.
    pub async fn batch(&self, id: BatchId, tenant: Option<&str>) -> Result<Option<BatchView>, StoreError> {
        let sql = format!("{VIEW} WHERE v.id = $1 AND ($2::text IS NULL OR v.tenant = $2)");
        Ok(sqlx::query_as(sqlx::AssertSqlSafe(sql))
            .bind(id.0)
            .bind(tenant)
            .fetch_optional(&self.pool)
            .await?)
    }

    /// A page of batches, newest first.
    pub async fn batches(&self, filter: &BatchFilter) -> Result<Vec<BatchView>, StoreError> {
        let sql = format!(
            "{VIEW} WHERE v.id IN (SELECT id FROM batches WHERE ($1::text IS NULL OR tenant = $1)
                 AND ($2::boolean IS NULL OR (finished_at IS NOT NULL) = $2) AND ($3::uuid IS NULL OR id < $3)
                 ORDER BY id DESC LIMIT $4)
             ORDER BY v.id DESC"
        );
        Ok(sqlx::query_as(sqlx::AssertSqlSafe(sql))
            .bind(&filter.tenant)
            .bind(filter.finished)
            .bind(filter.before)
            .bind(filter.limit)
            .fetch_all(&self.pool)
            .await?)
    }
}

/// Cancels a batch in the caller's transaction, whose first lock this is; see [`cancel_batch`](Postgres::cancel_batch).
pub(super) async fn cancel_in(connection: &mut PgConnection, id: BatchId) -> Result<Changed, sqlx::Error> {
    let changed = lock(connection, id, None).await?;
    if changed == Changed::Done {
        cancel_locked(connection, id).await?;
    }
    Ok(changed)
}

async fn cancel_locked(connection: &mut PgConnection, id: BatchId) -> Result<(), sqlx::Error> {
    sqlx::query("UPDATE batches SET cancelled_at = coalesce(cancelled_at, now()), sealed_at = coalesce(sealed_at, now()) WHERE id = $1")
        .bind(id.0)
        .execute(&mut *connection)
        .await?;
    look_again(connection, id).await
}

/// What became of a batch's row.
pub(super) enum Inserted {
    /// It is there now, unseen by others until the commit.
    New,
    /// It was there before, with this callback's job.
    There {
        /// Its id.
        callback: Option<JobId>,
    },
    /// It can't be.
    Refused(Created),
}

/// Inserts the batch, unless it is there. With `counted` it is a member of its parent's own batch. The children that a saga
/// waits for are not: the parent ends after them, so its own end speaks for them, also where one of them failed and was
/// mended since.
pub(super) async fn insert(
    connection: &mut PgConnection,
    batch: &NewBatch,
    callback: Option<&NewJob>,
    counted: bool,
) -> Result<Inserted, StoreError> {
    let tenant = batch.tenant.to_string();
    let known: bool = sqlx::query_scalar("SELECT EXISTS (SELECT FROM tenants WHERE id = $1)")
        .bind(&tenant)
        .fetch_one(&mut *connection)
        .await?;
    if !known {
        return Ok(Inserted::Refused(Created::UnknownTenant));
    }
    if let Some(there) = there(connection, batch.id, &tenant).await? {
        return Ok(there);
    }
    let mut outer: Option<Uuid> = None;
    if let Some(parent) = batch.parent {
        // Its end waits for this commit, so that the outer batch can't complete before it knows of this one.
        let row = sqlx::query(
            "SELECT batch_id FROM jobs WHERE id = $1 AND tenant = $2 AND state IN ('waiting', 'running') FOR SHARE",
        )
        .bind(parent.0)
        .bind(&tenant)
        .fetch_optional(&mut *connection)
        .await?;
        let Some(row) = row else { return Ok(Inserted::Refused(Created::NoParent(parent))) };
        if counted {
            outer = row.try_get("batch_id")?;
        }
    }
    let inserted = sqlx::query(
        "INSERT INTO batches (id, tenant, name, parent, outer_batch, callback, callback_on) VALUES ($1, $2, $3, $4, $5, $6, $7)
         ON CONFLICT (id) DO NOTHING",
    )
    .bind(batch.id.0)
    .bind(&tenant)
    .bind(&batch.name)
    .bind(batch.parent.map(|id| id.0))
    .bind(outer)
    .bind(callback.map(|job| json!(job)))
    .bind(batch.callback.as_ref().map(|callback| callback.on.name()))
    .execute(&mut *connection)
    .await?;
    if inserted.rows_affected() == 0 {
        // Another call with this id has been quicker, and has committed by now (PROTOCOL.md 20).
        return there(connection, batch.id, &tenant).await?.ok_or_else(|| {
            StoreError::new(Dependency::Postgres, Class::Transient, "the batch was removed while it was made")
        });
    }
    if let Some(outer) = outer {
        sqlx::query("INSERT INTO batch_events (batch, added) VALUES ($1, 1)")
            .bind(outer)
            .execute(connection)
            .await?;
    }
    Ok(Inserted::New)
}

/// The batch, if it is there.
async fn there(
    connection: &mut PgConnection,
    id: BatchId,
    tenant: &str,
) -> Result<Option<Inserted>, sqlx::Error> {
    let row = sqlx::query(
        "SELECT tenant, coalesce(callback_job, (callback ->> 'id')::uuid) AS callback FROM batches WHERE id = $1",
    )
    .bind(id.0)
    .fetch_optional(connection)
    .await?;
    let Some(row) = row else { return Ok(None) };
    if row.try_get::<&str, _>("tenant")? != tenant {
        return Ok(Some(Inserted::Refused(Created::Taken)));
    }
    Ok(Some(Inserted::There { callback: row.try_get::<Option<Uuid>, _>("callback")?.map(JobId) }))
}

/// Locks an unfinished batch against adders and the collector.
async fn lock(
    connection: &mut PgConnection,
    id: BatchId,
    tenant: Option<&str>,
) -> Result<Changed, sqlx::Error> {
    let finished: Option<bool> = sqlx::query_scalar(
        "SELECT finished_at IS NOT NULL FROM batches WHERE id = $1 AND ($2::text IS NULL OR tenant = $2) FOR UPDATE",
    )
    .bind(id.0)
    .bind(tenant)
    .fetch_optional(connection)
    .await?;
    Ok(match finished {
        Some(false) => Changed::Done,
        Some(true) => Changed::Finished,
        None => Changed::Unknown,
    })
}

pub(super) async fn seal(connection: &mut PgConnection, id: BatchId) -> Result<(), sqlx::Error> {
    let sealed = sqlx::query("UPDATE batches SET sealed_at = now() WHERE id = $1 AND sealed_at IS NULL")
        .bind(id.0)
        .execute(&mut *connection)
        .await?;
    if sealed.rows_affected() == 1 {
        look_again(connection, id).await?;
    }
    Ok(())
}

/// Makes the collector look at a batch to which nothing else may happen any more.
async fn look_again(connection: &mut PgConnection, id: BatchId) -> Result<(), sqlx::Error> {
    sqlx::query("INSERT INTO batch_events (batch) VALUES ($1)").bind(id.0).execute(connection).await?;
    Ok(())
}

/// Refuses jobs whose batch is unknown or takes no more members, and holds the others' batches open until the commit.
pub(super) async fn hold_open(
    connection: &mut PgConnection,
    jobs: &[NewJob],
    replies: &mut [Option<Accepted>],
) -> Result<(), sqlx::Error> {
    let mut wanted: Vec<Uuid> = jobs
        .iter()
        .zip(replies.iter())
        .filter(|(_, reply)| reply.is_none())
        .filter_map(|(job, _)| Some(job.batch?.0))
        .collect();
    if wanted.is_empty() {
        return Ok(());
    }
    wanted.sort_unstable();
    wanted.dedup();
    let rows = sqlx::query(
        "SELECT id, tenant, sealed_at IS NULL AS open FROM batches WHERE id = ANY($1) ORDER BY id FOR KEY SHARE",
    )
    .bind(wanted)
    .fetch_all(connection)
    .await?;
    let mut known: HashMap<Uuid, (String, bool)> = HashMap::with_capacity(rows.len());
    for row in &rows {
        known.insert(row.try_get("id")?, (row.try_get("tenant")?, row.try_get("open")?));
    }
    for (job, reply) in jobs.iter().zip(replies) {
        let Some(batch) = job.batch.filter(|_| reply.is_none()) else { continue };
        match known.get(&batch.0) {
            Some((tenant, true)) if *tenant == job.tenant.to_string() => {}
            Some((tenant, false)) if *tenant == job.tenant.to_string() => {
                *reply = Some(Accepted::BatchSealed(batch));
            }
            _ => *reply = Some(Accepted::UnknownBatch(batch)),
        }
    }
    Ok(())
}
