//! Recurring jobs: the table `schedules`, and the transaction of a tick (PROTOCOL.md 17).
//!
//! When a tick is due is Postgres' own clock's to say; which ticks there are is the caller's, who knows cron.

use chrono::{DateTime, Utc};
use queue::JobId;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::{Acquire, FromRow, PgConnection, Postgres as Db, Transaction};
use uuid::Uuid;

use super::{
    Postgres,
    accept::{Accepted, NewJob},
};
use crate::error::{Class, StoreError};

/// What becomes of ticks for which no process was there in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CatchUp {
    /// Nothing: the next tick that is on time is the next job.
    Skip,
    /// One job stands for all of them, that of the latest.
    #[default]
    One,
    /// A job for each of them, for the newest `max_catch_up` at most, and for as many as 16 MiB of payload hold.
    All,
}

impl CatchUp {
    /// The word in the ledger, in requests and in output.
    pub fn name(self) -> &'static str {
        match self {
            Self::Skip => "skip",
            Self::One => "one",
            Self::All => "all",
        }
    }
}

/// What a schedule says; made by its owner.
#[derive(Debug, Clone, PartialEq)]
pub struct ScheduleSpec {
    /// Kind of its jobs.
    pub kind: String,
    /// Where they wait.
    pub queue: String,
    /// 0 to 9.
    pub priority: i16,
    /// The request that each of them is.
    pub payload: Value,
    /// Charged failures before one is dead.
    pub max_attempts: i32,
    /// Hard cap on one run, ms.
    pub timeout_ms: i32,
    /// A cron expression.
    pub cron: String,
    /// IANA name of the time zone that the expression speaks of.
    pub time_zone: String,
    /// What becomes of ticks that were missed.
    pub catch_up: CatchUp,
    /// Late ticks that [`CatchUp::All`] makes up for at most.
    pub max_catch_up: i32,
}

/// A schedule as people see it.
#[derive(Debug, Clone, PartialEq, Serialize, FromRow)]
pub struct Schedule {
    /// The schedule; one that is deleted and made again has another.
    pub id: Uuid,
    /// Its owner's name for it.
    pub name: String,
    /// Owner.
    pub tenant: String,
    /// Kind of its jobs.
    pub kind: String,
    /// Where they wait.
    pub queue: String,
    /// 0 to 9.
    pub priority: i16,
    /// The request that each of them is.
    pub payload: Value,
    /// Charged failures before one is dead.
    pub max_attempts: i32,
    /// Hard cap on one run, ms.
    pub timeout_ms: i32,
    /// When: a cron expression.
    pub cron: String,
    /// IANA name of the time zone that the expression speaks of.
    pub time_zone: String,
    /// `skip`, `one` or `all`.
    pub catch_up: String,
    /// Late ticks that `all` makes up for at most.
    pub max_catch_up: i32,
    /// Since when it makes no jobs.
    pub paused_at: Option<DateTime<Utc>>,
    /// The first tick that has not been dealt with; `None`: there is none.
    pub next_tick_at: Option<DateTime<Utc>>,
    /// The last tick that made a job.
    pub last_tick_at: Option<DateTime<Utc>>,
    /// That job.
    pub last_job: Option<Uuid>,
    /// Why the last tick made none although it should have.
    pub last_error: Option<String>,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// When its owner changed it last.
    pub updated_at: DateTime<Utc>,
}

impl Schedule {
    /// Its policy for ticks that were missed; the column's check allows no other words.
    pub fn catch_up(&self) -> CatchUp {
        match self.catch_up.as_str() {
            "skip" => CatchUp::Skip,
            "all" => CatchUp::All,
            _ => CatchUp::One,
        }
    }
}

const SCHEDULE: &str =
    "id, name, tenant, kind, queue, priority, payload, max_attempts, timeout_ms, cron, time_zone, catch_up,
    max_catch_up, paused_at, next_tick_at, last_tick_at, last_job, last_error, created_at, updated_at";

/// Lets those through that the caller has not named as unread in `$2` and `$3`. Not as a join, which could not follow the index
/// of what is due.
const READ: &str =
    "(id, updated_at) NOT IN (SELECT o.id, o.at FROM unnest($2::uuid[], $3::timestamptz[]) AS o (id, at))";

fn ids_of(unread: &[(Uuid, DateTime<Utc>)]) -> Vec<Uuid> {
    unread.iter().map(|(id, _)| *id).collect()
}

fn changes_of(unread: &[(Uuid, DateTime<Utc>)]) -> Vec<DateTime<Utc>> {
    unread.iter().map(|(_, at)| *at).collect()
}

/// What is to be done with one due schedule.
#[derive(Debug, Clone)]
pub struct Tick {
    /// The schedule.
    pub schedule: Uuid,
    /// Its jobs, each with its tick, oldest first. Their ids derive from schedule and tick, so that no tick ever makes a
    /// second job.
    pub jobs: Vec<(DateTime<Utc>, NewJob)>,
    /// The first tick that is not dealt with here.
    pub next: Option<DateTime<Utc>>,
    /// Why nothing could be enqueued.
    pub error: Option<String>,
}

/// What became of one tick.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ticked {
    /// So many jobs are in the ledger.
    Enqueued(usize),
    /// The ledger refuses these jobs for good, or their queue takes none now. The schedule has moved on, and says so.
    Refused(String),
    /// The ledger was not done with these jobs in time. The schedule is as it was, and still due.
    Left(String),
}

/// Due schedules, locked until [`Due::tick`] or drop: a process that dies in between leaves them to the next.
pub struct Due {
    postgres: Postgres,
    tx: Transaction<'static, Db>,
    /// The time that made them due.
    pub now: DateTime<Utc>,
    /// The longest due first.
    pub schedules: Vec<Schedule>,
}

impl Due {
    /// Commits ticks: the jobs, which are left to the relay, and the time of the next tick, in one transaction. One answer
    /// for each. A schedule whose jobs the ledger refuses, or fails on, keeps no other from its tick. Where none was enqueued
    /// and the ledger failed on one, that is the ledger's fault for all that is known: nothing has changed then.
    pub async fn tick(mut self, ticks: &[Tick]) -> Result<Vec<Ticked>, StoreError> {
        let mut answers = Vec::with_capacity(ticks.len());
        let (mut sound, mut failed) = (false, vec![]);
        for tick in ticks {
            let jobs: Vec<NewJob> = tick.jobs.iter().map(|(_, job)| job.clone()).collect();
            let mut inner = self.tx.begin().await?;
            let answer = if let Some(why) = refused(&mut inner, &jobs).await? {
                inner.rollback().await?;
                Ticked::Refused(why)
            } else {
                match self.postgres.accept_in(&mut inner, &jobs, false).await {
                    Ok(replies) => {
                        inner.commit().await?;
                        sound |= !jobs.is_empty();
                        let new = replies.iter().filter(|reply| matches!(reply, Accepted::New(_)));
                        Ticked::Enqueued(new.count())
                    }
                    Err(error) if matches!(error.class, Class::Data) => {
                        inner.rollback().await?;
                        Ticked::Refused(error.message)
                    }
                    Err(error) if matches!(error.class, Class::Permanent | Class::Timeout) => {
                        inner.rollback().await?;
                        let answer = match error.class {
                            Class::Permanent => Ticked::Refused(error.message.clone()),
                            _ => Ticked::Left(error.message.clone()),
                        };
                        failed.push(error);
                        answer
                    }
                    Err(error) => return Err(error),
                }
            };
            move_on(&mut self.tx, tick, &answer).await?;
            answers.push(answer);
        }
        if let Some(error) = failed.into_iter().next().filter(|_| !sound) {
            return Err(error);
        }
        self.tx.commit().await?;
        Ok(answers)
    }
}

/// Why a schedule's jobs, which are all of one queue and tenant, are not taken: their queue drains, or as many wait as may.
async fn refused(connection: &mut PgConnection, jobs: &[NewJob]) -> Result<Option<String>, sqlx::Error> {
    let Some(job) = jobs.first() else { return Ok(None) };
    let asked = sqlx::query("SELECT refuse_if_full($1, $2)")
        .bind(job.queue.as_str())
        .bind(job.tenant.as_str())
        .execute(connection)
        .await;
    match asked {
        Ok(_) => Ok(None),
        Err(sqlx::Error::Database(error)) if matches!(error.code().as_deref(), Some("55000" | "53400")) => {
            Ok(Some(error.message().to_owned()))
        }
        Err(error) => Err(error),
    }
}

async fn move_on(connection: &mut PgConnection, tick: &Tick, answer: &Ticked) -> Result<(), sqlx::Error> {
    let error = match answer {
        Ticked::Refused(error) => Some(error.as_str()),
        Ticked::Enqueued(_) => tick.error.as_deref(),
        Ticked::Left(_) => return Ok(()),
    };
    let last = tick.jobs.last().filter(|_| error.is_none());
    sqlx::query(
        "UPDATE schedules SET next_tick_at = $2, last_tick_at = coalesce($3, last_tick_at), last_job = coalesce($4, last_job),
                last_error = $5
         WHERE id = $1",
    )
    .bind(tick.schedule)
    .bind(tick.next)
    .bind(last.map(|(at, _)| *at))
    .bind(last.map(|(_, job)| job.id.0))
    .bind(error)
    .execute(connection)
    .await?;
    Ok(())
}

/// What became of a new schedule.
#[derive(Debug, Clone, PartialEq)]
pub enum Created {
    /// It is there.
    Yes(Box<Schedule>),
    /// The tenant has one of this name.
    NameTaken,
    /// No such tenant.
    UnknownTenant,
}

impl Postgres {
    /// Schedules whose tick is due, at most `limit`, without those that another process has in hand and those `unread` by the
    /// caller, each named with its `updated_at`: once its owner has changed one, it is another. `now` stands for Postgres'
    /// clock; only tests give it.
    pub async fn due_schedules(
        &self,
        now: Option<DateTime<Utc>>,
        limit: i64,
        unread: &[(Uuid, DateTime<Utc>)],
    ) -> Result<Due, StoreError> {
        let mut tx = self.begin().await?;
        let now: DateTime<Utc> =
            sqlx::query_scalar("SELECT coalesce($1, now())").bind(now).fetch_one(&mut *tx).await?;
        let schedules = sqlx::query_as(sqlx::AssertSqlSafe(format!(
            "SELECT {SCHEDULE} FROM schedules WHERE paused_at IS NULL AND next_tick_at <= $1 AND {READ}
             ORDER BY next_tick_at LIMIT $4 FOR UPDATE SKIP LOCKED"
        )))
        .bind(now)
        .bind(ids_of(unread))
        .bind(changes_of(unread))
        .bind(limit)
        .fetch_all(&mut *tx)
        .await?;
        Ok(Due { postgres: self.clone(), tx, now, schedules })
    }

    /// How long until the next tick of any schedule but those `unread` by the caller; negative when it is late. `None`: there
    /// is none.
    pub async fn next_tick_in(
        &self,
        now: Option<DateTime<Utc>>,
        unread: &[(Uuid, DateTime<Utc>)],
    ) -> Result<Option<f64>, StoreError> {
        Ok(sqlx::query_scalar(sqlx::AssertSqlSafe(format!(
            "SELECT extract(epoch FROM next_tick_at - coalesce($1, now()))::float8 FROM schedules
             WHERE paused_at IS NULL AND next_tick_at IS NOT NULL AND {READ} ORDER BY next_tick_at LIMIT 1"
        )))
        .bind(now)
        .bind(ids_of(unread))
        .bind(changes_of(unread))
        .fetch_optional(&self.pool)
        .await?)
    }

    /// The time of this ledger's clock, which alone says when a tick is due.
    pub async fn now(&self) -> Result<DateTime<Utc>, StoreError> {
        Ok(sqlx::query_scalar("SELECT now()").fetch_one(&self.pool).await?)
    }

    /// Makes a schedule whose first tick is `next`.
    pub async fn create_schedule(
        &self,
        tenant: &str,
        name: &str,
        spec: &ScheduleSpec,
        next: Option<DateTime<Utc>>,
    ) -> Result<Created, StoreError> {
        let made = bind_spec(
            sqlx::query_as(sqlx::AssertSqlSafe(format!(
                "INSERT INTO schedules (id, tenant, name, next_tick_at, kind, queue, priority, payload, max_attempts, timeout_ms,
                                        cron, time_zone, catch_up, max_catch_up)
                 SELECT $1, t.id, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14 FROM tenants t WHERE t.id = $2
                 ON CONFLICT (tenant, name) DO NOTHING RETURNING {SCHEDULE}"
            )))
            .bind(Uuid::now_v7())
            .bind(tenant)
            .bind(name)
            .bind(next),
            spec,
        )
        .fetch_optional(&self.pool)
        .await?;
        Ok(match made {
            Some(schedule) => Created::Yes(Box::new(schedule)),
            None if self.tenant(tenant).await?.is_none() => Created::UnknownTenant,
            None => Created::NameTaken,
        })
    }

    /// Replaces what a schedule says. Its next tick is `next` if its times have changed or it had none; otherwise it is left,
    /// so that one that is due this moment is not lost. A paused one stays so. `None`: there is none of this name.
    pub async fn update_schedule(
        &self,
        tenant: &str,
        name: &str,
        spec: &ScheduleSpec,
        next: Option<DateTime<Utc>>,
    ) -> Result<Option<Schedule>, StoreError> {
        Ok(bind_spec(
            sqlx::query_as(sqlx::AssertSqlSafe(format!(
                "UPDATE schedules SET next_tick_at = CASE WHEN cron = $11 AND time_zone = $12 THEN coalesce(next_tick_at, $4) ELSE $4 END, kind = $5, queue = $6, priority = $7, payload = $8, max_attempts = $9,
                        timeout_ms = $10, cron = $11, time_zone = $12, catch_up = $13, max_catch_up = $14,
                        last_error = NULL, updated_at = now()
                 WHERE tenant = $2 AND name = $3 AND $1::uuid IS NOT NULL RETURNING {SCHEDULE}"
            )))
            .bind(Uuid::nil())
            .bind(tenant)
            .bind(name)
            .bind(next),
            spec,
        )
        .fetch_optional(&self.pool)
        .await?)
    }

    /// Stops a schedule from making jobs; one that is paused already keeps its time.
    pub async fn pause_schedule(&self, tenant: &str, name: &str) -> Result<Option<Schedule>, StoreError> {
        Ok(sqlx::query_as(sqlx::AssertSqlSafe(format!(
            "UPDATE schedules SET paused_at = coalesce(paused_at, now()), updated_at = now()
             WHERE tenant = $1 AND name = $2 RETURNING {SCHEDULE}"
        )))
        .bind(tenant)
        .bind(name)
        .fetch_optional(&self.pool)
        .await?)
    }

    /// Lets a paused schedule make jobs again, from the tick `next` on, which the caller has worked out from `read`: those
    /// meanwhile were not missed but not wanted. One that is not paused is left as it is. `None`: it has other times than
    /// `read` by now, or is gone.
    pub async fn resume_schedule(
        &self,
        read: &Schedule,
        next: Option<DateTime<Utc>>,
    ) -> Result<Option<Schedule>, StoreError> {
        Ok(sqlx::query_as(sqlx::AssertSqlSafe(format!(
            "UPDATE schedules SET next_tick_at = CASE WHEN paused_at IS NULL THEN next_tick_at ELSE $4 END, paused_at = NULL,
                    updated_at = now()
             WHERE id = $1 AND cron = $2 AND time_zone = $3 RETURNING {SCHEDULE}"
        )))
        .bind(read.id)
        .bind(&read.cron)
        .bind(&read.time_zone)
        .bind(next)
        .fetch_optional(&self.pool)
        .await?)
    }

    /// Removes a schedule; its jobs stay. `false`: there is none of this name.
    pub async fn delete_schedule(&self, tenant: &str, name: &str) -> Result<bool, StoreError> {
        let done = sqlx::query("DELETE FROM schedules WHERE tenant = $1 AND name = $2")
            .bind(tenant)
            .bind(name)
            .execute(&self.pool)
            .await?;
        Ok(done.rows_affected() == 1)
    }

    /// One schedule.
    pub async fn schedule(&self, tenant: &str, name: &str) -> Result<Option<Schedule>, StoreError> {
        Ok(sqlx::query_as(sqlx::AssertSqlSafe(format!(
            "SELECT {SCHEDULE} FROM schedules WHERE tenant = $1 AND name = $2"
        )))
        .bind(tenant)
        .bind(name)
        .fetch_optional(&self.pool)
        .await?)
    }

    /// A page of schedules by tenant and name, of one tenant or of all, after the one of that tenant and name.
    pub async fn schedules(
        &self,
        tenant: Option<&str>,
        after: Option<(&str, &str)>,
        limit: i64,
    ) -> Result<Vec<Schedule>, StoreError> {
        Ok(sqlx::query_as(sqlx::AssertSqlSafe(format!(
            "SELECT {SCHEDULE} FROM schedules
             WHERE ($1::text IS NULL OR tenant = $1) AND ($2::text IS NULL OR (tenant, name) > ($2, $3))
             ORDER BY tenant, name LIMIT $4"
        )))
        .bind(tenant)
        .bind(after.map(|(tenant, _)| tenant))
        .bind(after.map(|(_, name)| name))
        .bind(limit)
        .fetch_all(&self.pool)
        .await?)
    }

    /// How many schedules a tenant has.
    pub async fn schedule_count(&self, tenant: &str) -> Result<i64, StoreError> {
        Ok(sqlx::query_scalar("SELECT count(*) FROM schedules WHERE tenant = $1")
            .bind(tenant)
            .fetch_one(&self.pool)
            .await?)
    }
}

type Asking<'q> = sqlx::query::QueryAs<'q, Db, Schedule, sqlx::postgres::PgArguments>;

fn bind_spec<'q>(query: Asking<'q>, spec: &ScheduleSpec) -> Asking<'q> {
    query
        .bind(spec.kind.clone())
        .bind(spec.queue.clone())
        .bind(spec.priority)
        .bind(spec.payload.clone())
        .bind(spec.max_attempts)
        .bind(spec.timeout_ms)
        .bind(spec.cron.clone())
        .bind(spec.time_zone.clone())
        .bind(spec.catch_up.name())
        .bind(spec.max_catch_up)
}

/// The id of the job that a schedule's tick makes: the same for the same tick, so that none makes two. A UUIDv7 of the
/// tick's own time, whose random part is taken from a hash of schedule and tick.
pub fn tick_job(schedule: Uuid, tick: DateTime<Utc>) -> JobId {
    use sha2::{Digest, Sha256};
    let millis = u64::try_from(tick.timestamp_millis()).unwrap_or_default();
    let mut hash = Sha256::new();
    hash.update(schedule.as_bytes());
    hash.update(millis.to_be_bytes());
    let hash = hash.finalize();
    let mut random = [0; 10];
    random.copy_from_slice(&hash[..10]);
    JobId(uuid::Builder::from_unix_timestamp_millis(millis, &random).into_uuid())
}
