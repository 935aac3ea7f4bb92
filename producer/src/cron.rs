//! Cron: makes the jobs of schedules whose tick is due, each tick's exactly once over the whole fleet.
//!
//! Any number may run: each takes schedules that no other holds. Job and next tick are committed in one transaction, and a
//! tick's job has an id that derives from schedule and tick; so one that dies in between has either done both or nothing.
//! The relay puts the jobs into Redis.
//!
//! A schedule that this process can't read, of a newer release perhaps, is left to those that can: it stays due, and says why.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use chrono::{DateTime, Utc};
use metrics::{counter, gauge};
use queue::{Priority, QueueName, TenantId};
use sagas::{
    StoreError, kinds,
    stores::postgres::{
        Postgres,
        accept::NewJob,
        schedules::{CatchUp, Schedule, Tick, Ticked, tick_job},
    },
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    checks::json_size,
    pacing::{Growing, pause, within},
    timetable::Timetable,
};

/// Schedules that one transaction deals with.
const BATCH: i64 = 50;
/// Ticks that are on time and enqueued at once at most: those of a schedule with seconds whose process was held up.
const MAX_ON_TIME: usize = 100;
/// Bytes of payload, as JSON, that one transaction enqueues at most, unless a single job has more. What a schedule's late
/// ticks have beyond it is left out, the oldest first; all else is left to the next round, which comes at once.
const MAX_BYTES: usize = 16 * 1024 * 1024;
/// Jobs that one transaction enqueues at most, unless a single schedule has more: with so many it ends long before it is given up.
const MAX_JOBS: usize = 2000;
/// Longest time between two looks: how late a tick may be noticed that another process has scheduled meanwhile.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Shortest time between two looks.
const REST: Duration = Duration::from_millis(20);

/// The loop. One for each process that keeps ledger and queue in step.
#[derive(Debug, Clone)]
pub struct Cron {
    postgres: Postgres,
    /// A tick that is later than this was missed.
    on_time: Duration,
    /// Schedules that this process can't read, each as of its owner's last change; after the next it is looked at again.
    unread: Arc<Mutex<HashMap<Uuid, DateTime<Utc>>>>,
    /// Stands for Postgres' clock; only tests set it.
    now: Option<DateTime<Utc>>,
}

/// What one round did, in ticks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Round {
    /// Schedules that were due.
    pub schedules: usize,
    /// Jobs for ticks that were on time.
    pub enqueued: usize,
    /// Jobs for ticks that were late.
    pub caught_up: usize,
    /// Schedules for which late ticks were left out, as their catch-up policy says.
    pub skipped: usize,
    /// Schedules that made no job: the ledger refused it, or this process can't read them.
    pub refused: usize,
}

impl Cron {
    /// A loop over this ledger; ticks up to `on_time` late are on time.
    pub fn new(postgres: Postgres, on_time: Duration) -> Self {
        Self { postgres, on_time, unread: Arc::default(), now: None }
    }

    /// The same loop at another time, for tests.
    #[doc(hidden)]
    pub fn at(&self, now: DateTime<Utc>) -> Self {
        Self { now: Some(now), ..self.clone() }
    }

    /// Runs until `shutdown`. Ends a round under way first, unless the server hangs.
    pub async fn run(self, shutdown: CancellationToken) {
        let mut pauses = Growing::new(Duration::from_millis(100), Duration::from_secs(5));
        while !shutdown.is_cancelled() {
            let wait = match self.round_and_rest().await {
                Ok(wait) => {
                    pauses.reset();
                    wait
                }
                Err(error) => {
                    let wait = pauses.next();
                    tracing::warn!(%error, again_in = ?wait, "schedules wait");
                    wait
                }
            };
            if !pause(wait, &shutdown).await {
                return;
            }
        }
    }

    async fn round_and_rest(&self) -> Result<Duration, StoreError> {
        let limit = self.postgres.call_timeout();
        let next = within(limit, self.postgres.next_tick_in(self.now, &self.unread())).await?;
        let late = next.map_or(0.0, |next| (-next).max(0.0));
        gauge!("schedules_lateness_seconds").set(late);
        match next {
            Some(next) if next <= 0.0 => {
                let round = self.round().await?;
                // Others have them in hand, or there are more.
                Ok(if round.schedules == 0 { REST * 5 } else { Duration::ZERO })
            }
            Some(next) => Ok(Duration::try_from_secs_f64(next).unwrap_or(LOOK_EVERY).clamp(REST, LOOK_EVERY)),
            None => Ok(LOOK_EVERY),
        }
    }

    fn unread(&self) -> Vec<(Uuid, DateTime<Utc>)> {
        let unread = self.unread.lock().unwrap_or_else(PoisonError::into_inner);
        unread.iter().map(|(id, at)| (*id, *at)).collect()
    }

    /// Deals with schedules that are due, at most 50 and as many as 2,000 jobs and 16 MiB of payload let, in one
    /// transaction.
    pub async fn round(&self) -> Result<Round, StoreError> {
        let limit = self.postgres.call_timeout() * 2;
        let due = within(limit, self.postgres.due_schedules(self.now, BATCH, &self.unread())).await?;
        let mut round = Round::default();
        if due.schedules.is_empty() {
            return Ok(round);
        }
        let (mut plans, mut bytes, mut jobs): (Vec<Plan>, usize, usize) = (vec![], 0, 0);
        for schedule in &due.schedules {
            let plan = Plan::of(schedule, due.now, self.on_time);
            bytes = bytes.saturating_add(plan.bytes);
            jobs += plan.tick.jobs.len();
            // It, and those behind it, are due still.
            if (bytes > MAX_BYTES || jobs > MAX_JOBS) && !plans.is_empty() {
                break;
            }
            plans.push(plan);
        }
        round.schedules = plans.len();
        let names: Vec<(String, String, DateTime<Utc>)> =
            due.schedules.iter().map(|s| (s.tenant.clone(), s.name.clone(), s.updated_at)).collect();
        let ticks: Vec<Tick> = plans.iter().map(|plan| plan.tick.clone()).collect();
        let answers = within(limit, due.tick(&ticks)).await?;
        for ((plan, answer), (tenant, name, updated_at)) in plans.iter().zip(answers).zip(names) {
            if plan.tick.error.is_some() {
                let mut unread = self.unread.lock().unwrap_or_else(PoisonError::into_inner);
                unread.insert(plan.tick.schedule, updated_at);
            }
            let error = match answer {
                Ticked::Enqueued(_) => plan.tick.error.clone(),
                Ticked::Refused(error) => Some(error),
                Ticked::Left(error) => {
                    tracing::warn!(tenant, schedule = name, error, "a tick waits");
                    continue;
                }
            };
            match error {
                None => {
                    round.enqueued += plan.tick.jobs.len() - plan.late;
                    round.caught_up += plan.late;
                    round.skipped += usize::from(plan.skipped);
                }
                Some(error) => {
                    tracing::error!(tenant, schedule = name, error, "a tick made no job");
                    round.refused += 1;
                }
            }
        }
        for (outcome, count) in [
            ("enqueued", round.enqueued),
            ("caught_up", round.caught_up),
            ("skipped", round.skipped),
            ("refused", round.refused),
        ] {
            counter!("schedules_ticks_total", "outcome" => outcome).increment(count as u64);
        }
        tracing::debug!(?round, "ticked");
        Ok(round)
    }
}

/// What is to be done with one due schedule.
#[derive(Debug, Clone)]
struct Plan {
    tick: Tick,
    /// Of its jobs, those for ticks that were late.
    late: usize,
    /// Whether late ticks are left out.
    skipped: bool,
    /// Of its jobs' payloads together.
    bytes: usize,
}

impl Plan {
    /// The ticks up to `now` sort into those on time, each of which has its job, and late ones, of which the policy says.
    fn of(schedule: &Schedule, now: DateTime<Utc>, on_time: Duration) -> Self {
        match Self::read(schedule, now, on_time) {
            Ok(plan) => plan,
            // Nothing but a hand in the table, or another release's idea of cron, brings this about. The tick stays due for
            // those that can read it.
            Err(error) => Self {
                tick: Tick {
                    schedule: schedule.id,
                    jobs: vec![],
                    next: schedule.next_tick_at,
                    error: Some(error),
                },
                late: 0,
                skipped: false,
                bytes: 0,
            },
        }
    }

    fn read(schedule: &Schedule, now: DateTime<Utc>, on_time: Duration) -> Result<Self, String> {
        let table =
            Timetable::read(&schedule.cron, &schedule.time_zone).map_err(|error| error.to_string())?;
        let size = json_size(&schedule.payload).max(1);
        let fits = (MAX_BYTES / size).max(1);
        let first = schedule.next_tick_at.unwrap_or(now);
        let fresh_from = now - chrono::Duration::from_std(on_time).unwrap_or_default();
        let (on_time, more) = table.newest(first.max(fresh_from), now, MAX_ON_TIME);
        let bound = match schedule.catch_up() {
            CatchUp::Skip => 0,
            // Whatever is on time stands for what was missed, too.
            CatchUp::One => usize::from(on_time.is_empty()),
            CatchUp::All => usize::try_from(schedule.max_catch_up).unwrap_or(0),
        };
        let late_until = on_time.first().map_or(now, |tick| *tick - chrono::Duration::milliseconds(1));
        let (late, left_out) = if first <= late_until {
            table.newest(first, late_until, bound.min(fits))
        } else {
            (vec![], false)
        };
        // No tick that is on time is lost for its size.
        let room = fits - late.len();
        let next = on_time.get(room).copied().or_else(|| table.next_after(now));
        let jobs = late
            .iter()
            .chain(on_time.iter().take(room))
            .map(|tick| Ok((*tick, job_of(schedule, *tick)?)))
            .collect::<Result<Vec<_>, String>>()?;
        let bytes = size.saturating_mul(jobs.len());
        let tick = Tick { schedule: schedule.id, jobs, next, error: None };
        Ok(Self { tick, late: late.len(), skipped: left_out || more, bytes })
    }
}

/// The job of one tick. Its `run_at` is the tick.
fn job_of(schedule: &Schedule, tick: DateTime<Utc>) -> Result<NewJob, String> {
    let queue = QueueName::new(schedule.queue.as_str()).map_err(|error| error.to_string())?;
    let tenant = TenantId::new(schedule.tenant.as_str()).map_err(|error| error.to_string())?;
    let mut job = NewJob::new(&schedule.kind, queue, tenant, schedule.payload.clone());
    job.id = tick_job(schedule.id, tick);
    job.priority = Priority::try_from(i64::from(schedule.priority)).map_err(|error| error.to_string())?;
    job.run_at = Some(tick);
    job.max_attempts = schedule.max_attempts;
    job.timeout = Duration::from_millis(schedule.timeout_ms.unsigned_abs().into());
    // So that a document's job gets its place in the document's order, as every other does (PROTOCOL.md 8).
    job.document = kinds::document_of(&schedule.kind, &schedule.payload);
    Ok(job)
}
