//! Recurring jobs for their owners: make, change, pause and look at schedules. [`cron`](crate::cron) makes their jobs.

use std::{sync::Arc, time::Duration};

use chrono::{DateTime, Utc};
use queue::{Priority, QueueName, TenantId};
use sagas::{
    Class, Dependency, StoreError, kinds,
    stores::postgres::{
        Postgres,
        accept::NewJob,
        schedules::{CatchUp, Created, Schedule, ScheduleSpec},
    },
};
use serde_json::Value;

use crate::{
    checks::check,
    error::EnqueueError,
    pacing::within,
    settings::ClientSettings,
    timetable::{Timetable, TimetableError},
};

/// Schedules that one tenant may have.
pub const MAX_PER_TENANT: i64 = 1000;
/// Late ticks that [`CatchUp::All`] may make up for; of large payloads as many as 16 MiB hold.
pub const MAX_CATCH_UP: i32 = 1000;
/// Coming ticks that are told at once.
pub const MAX_NEXT: usize = 1000;
/// How often a schedule is read that gets other times while it is resumed.
const RESUMES: usize = 5;

/// A schedule to make, or to put in the place of one.
#[derive(Debug, Clone, PartialEq)]
pub struct NewSchedule {
    /// The owner.
    pub tenant: TenantId,
    /// The owner's name for it: 1 to 64 characters of `A-Z a-z 0-9 _ . -`.
    pub name: String,
    /// Kind of its jobs.
    pub kind: String,
    /// Where they wait; `None`: the kind's own queue.
    pub queue: Option<QueueName>,
    /// Their priority.
    pub priority: Priority,
    /// The request that each of them is.
    pub payload: Value,
    /// Charged failures before one is dead.
    pub max_attempts: i32,
    /// Hard cap on one run.
    pub timeout: Duration,
    /// When: five cron fields, or six with seconds in front.
    pub cron: String,
    /// The zone whose local time the expression speaks of, by its IANA name.
    pub time_zone: String,
    /// What becomes of ticks for which no process was there in time.
    pub catch_up: CatchUp,
    /// Late ticks that [`CatchUp::All`] makes up for at most, 1 to 1,000.
    pub max_catch_up: i32,
}

impl NewSchedule {
    /// A schedule with the defaults: UTC, one job for whatever was missed, and those of [`NewJob::new`].
    pub fn new(
        tenant: TenantId,
        name: impl Into<String>,
        kind: impl Into<String>,
        payload: Value,
        cron: impl Into<String>,
    ) -> Self {
        Self {
            tenant,
            name: name.into(),
            kind: kind.into(),
            queue: None,
            priority: Priority::default(),
            payload,
            max_attempts: 5,
            timeout: Duration::from_secs(300),
            cron: cron.into(),
            time_zone: "UTC".to_owned(),
            catch_up: CatchUp::default(),
            max_catch_up: 100,
        }
    }
}

/// Why something can't be done with a schedule.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ScheduleError {
    /// A field of the schedule itself, which the message names.
    #[error("{0}")]
    Invalid(String),
    /// Its jobs could not be enqueued.
    #[error(transparent)]
    Job(#[from] EnqueueError),
    /// The tenant has one of this name.
    #[error("there is a schedule {0:?} already: update it, or choose another name")]
    NameTaken(String),
    /// The tenant has as many as it may have.
    #[error("the tenant has {MAX_PER_TENANT} schedules, and may have no more: delete one first")]
    TooMany,
    /// The tenant has none of this name.
    #[error("there is no schedule {0:?}")]
    Unknown(String),
    /// The ledger failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<TimetableError> for ScheduleError {
    fn from(error: TimetableError) -> Self {
        Self::Invalid(error.to_string())
    }
}

/// The way to the schedules of a ledger. Clones share everything. Changes are committed when a call returns; a call that was
/// dropped may have been done or not.
#[derive(Clone)]
pub struct Schedules {
    postgres: Postgres,
    settings: Arc<ClientSettings>,
    /// Stands for Postgres' clock; only tests set it.
    now: Option<DateTime<Utc>>,
}

impl Schedules {
    pub(crate) fn new(postgres: Postgres, settings: Arc<ClientSettings>) -> Self {
        Self { postgres, settings, now: None }
    }

    /// The same at another time, for tests.
    #[doc(hidden)]
    pub fn at(&self, now: DateTime<Utc>) -> Self {
        Self { now: Some(now), ..self.clone() }
    }

    /// Makes a schedule. Its first tick is the first after now.
    pub async fn create(&self, new: &NewSchedule) -> Result<Schedule, ScheduleError> {
        let (spec, table) = self.read(new)?;
        if self.ask(self.postgres.schedule_count(new.tenant.as_str())).await? >= MAX_PER_TENANT {
            return Err(ScheduleError::TooMany);
        }
        let next = table.next_after(self.now().await?);
        let made = self.postgres.create_schedule(new.tenant.as_str(), &new.name, &spec, next);
        match self.ask(made).await? {
            Created::Yes(schedule) => Ok(*schedule),
            Created::NameTaken => Err(ScheduleError::NameTaken(new.name.clone())),
            Created::UnknownTenant => Err(EnqueueError::UnknownTenant.into()),
        }
    }

    /// Replaces all that a schedule says; a paused one stays so. With other times than before it goes on with its first tick
    /// after now.
    pub async fn update(&self, new: &NewSchedule) -> Result<Schedule, ScheduleError> {
        let (spec, table) = self.read(new)?;
        let next = table.next_after(self.now().await?);
        let changed = self.postgres.update_schedule(new.tenant.as_str(), &new.name, &spec, next);
        self.ask(changed).await?.ok_or_else(|| ScheduleError::Unknown(new.name.clone()))
    }

    /// One schedule.
    pub async fn get(&self, tenant: &TenantId, name: &str) -> Result<Schedule, ScheduleError> {
        let found = self.ask(self.postgres.schedule(tenant.as_str(), name)).await?;
        found.ok_or_else(|| ScheduleError::Unknown(name.to_owned()))
    }

    /// A page of schedules by tenant and name, of all tenants without one, after the one of that tenant and name.
    pub async fn list(
        &self,
        tenant: Option<&TenantId>,
        after: Option<(&TenantId, &str)>,
        limit: i64,
    ) -> Result<Vec<Schedule>, ScheduleError> {
        let after = after.map(|(tenant, name)| (tenant.as_str(), name));
        self.ask(self.postgres.schedules(tenant.map(TenantId::as_str), after, limit)).await
    }

    /// Stops a schedule from making jobs. Those it has made go on.
    pub async fn pause(&self, tenant: &TenantId, name: &str) -> Result<Schedule, ScheduleError> {
        let paused = self.ask(self.postgres.pause_schedule(tenant.as_str(), name)).await?;
        paused.ok_or_else(|| ScheduleError::Unknown(name.to_owned()))
    }

    /// Lets a schedule make jobs again, from its first tick after now on: what was not wanted meanwhile is not made up for.
    pub async fn resume(&self, tenant: &TenantId, name: &str) -> Result<Schedule, ScheduleError> {
        for _ in 0..RESUMES {
            let schedule = self.get(tenant, name).await?;
            let table = Timetable::read(&schedule.cron, &schedule.time_zone)?;
            let next = table.next_after(self.now().await?);
            if let Some(resumed) = self.ask(self.postgres.resume_schedule(&schedule, next)).await? {
                return Ok(resumed);
            }
            // It has other times by now, or is gone.
        }
        let message = format!("the schedule {name:?} gets other times again and again: try again");
        Err(StoreError::new(Dependency::Postgres, Class::Transient, message).into())
    }

    /// Removes a schedule. The jobs it has made stay.
    pub async fn delete(&self, tenant: &TenantId, name: &str) -> Result<(), ScheduleError> {
        if self.ask(self.postgres.delete_schedule(tenant.as_str(), name)).await? {
            Ok(())
        } else {
            Err(ScheduleError::Unknown(name.to_owned()))
        }
    }

    /// The coming ticks of a schedule, at most 1,000; none while it is paused.
    pub async fn next(
        &self,
        tenant: &TenantId,
        name: &str,
        count: usize,
    ) -> Result<Vec<DateTime<Utc>>, ScheduleError> {
        let schedule = self.get(tenant, name).await?;
        coming(&schedule, count)
    }

    fn read(&self, new: &NewSchedule) -> Result<(ScheduleSpec, Timetable), ScheduleError> {
        // The same form as a queue's name: it may stand in a path and in a metric.
        QueueName::new(new.name.as_str()).map_err(|_| {
            ScheduleError::Invalid(format!(
                "name is {:?}: 1 to 64 characters of A-Z a-z 0-9 _ . - are allowed",
                new.name
            ))
        })?;
        let table = Timetable::read(&new.cron, &new.time_zone)?;
        if !(1..=MAX_CATCH_UP).contains(&new.max_catch_up) {
            return Err(ScheduleError::Invalid(format!(
                "max_catch_up is {}: 1 to {MAX_CATCH_UP} are allowed",
                new.max_catch_up
            )));
        }
        let queue = match &new.queue {
            Some(queue) => queue.clone(),
            None => QueueName::new(kinds::default_queue(&new.kind)).map_err(|_| {
                ScheduleError::Invalid(format!(
                    "kind is {:?}: 1 to 64 characters of A-Z a-z 0-9 _ . - are allowed, unless a queue is named",
                    new.kind
                ))
            })?,
        };
        // Its jobs are seen once, here: at a tick nobody is there to be told what is wrong with them.
        let mut job = NewJob::new(&new.kind, queue, new.tenant.clone(), new.payload.clone());
        (job.max_attempts, job.timeout) = (new.max_attempts, new.timeout);
        check(&mut job, &self.settings)?;
        let spec = ScheduleSpec {
            kind: job.kind,
            queue: job.queue.to_string(),
            priority: new.priority.into(),
            payload: job.payload,
            max_attempts: new.max_attempts,
            timeout_ms: i32::try_from(new.timeout.as_millis()).unwrap_or(i32::MAX),
            cron: new.cron.trim().to_owned(),
            time_zone: new.time_zone.clone(),
            catch_up: new.catch_up,
            max_catch_up: new.max_catch_up,
        };
        Ok((spec, table))
    }

    async fn now(&self) -> Result<DateTime<Utc>, ScheduleError> {
        match self.now {
            Some(now) => Ok(now),
            None => self.ask(self.postgres.now()).await,
        }
    }

    async fn ask<T>(&self, call: impl Future<Output = Result<T, StoreError>>) -> Result<T, ScheduleError> {
        Ok(within(self.postgres.call_timeout(), call).await?)
    }
}

/// The coming ticks of a schedule, at most 1,000; none while it is paused.
pub fn coming(schedule: &Schedule, count: usize) -> Result<Vec<DateTime<Utc>>, ScheduleError> {
    let Some(next) = schedule.next_tick_at.filter(|_| schedule.paused_at.is_none()) else {
        return Ok(vec![]);
    };
    let table = Timetable::read(&schedule.cron, &schedule.time_zone)?;
    Ok(std::iter::once(next).chain(table.ticks_after(next)).take(count.min(MAX_NEXT)).collect())
}

impl std::fmt::Debug for Schedules {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Schedules").finish_non_exhaustive()
    }
}
