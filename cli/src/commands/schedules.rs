//! `flotilla schedules`: recurring jobs.

use std::time::Duration;

use anyhow::bail;
use chrono::{DateTime, Utc};
use clap::ValueEnum;
use producer::{CatchUp, NewSchedule, Schedule, ScheduleError, schedules::coming, timetable::Timetable};
use queue::{Priority, QueueName, TenantId};
use serde_json::json;

use super::{
    enqueue::{client, explained, read_payload},
    migrate::DEFAULT_TENANT,
};
use crate::{
    context::{Context, actor},
    failure::{Ending, Outcome, Refused},
    output::{self, ago, fields, short, time},
};

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// List schedules, by tenant and name
    List {
        /// Only this tenant's
        #[arg(long)]
        tenant: Option<TenantId>,
        /// Only schedules after this one, the last of the page before: TENANT/NAME, or NAME with --tenant
        #[arg(long, value_name = "NAME")]
        after: Option<String>,
        /// Schedules at most
        #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(i64).range(1..=10_000))]
        limit: i64,
    },
    /// Show one schedule with its coming ticks
    Show(Which),
    /// Make a schedule: a job at each tick of a cron expression
    Create(Spec),
    /// Replace all that a schedule says; with other times it goes on with its first tick after now
    Update(Spec),
    /// Stop a schedule from making jobs; those it has made go on
    Pause(Which),
    /// Let a schedule make jobs again, from its first tick after now on
    Resume(Which),
    /// Remove a schedule; the jobs it has made stay
    Delete(Which),
    /// Print the coming ticks of a schedule
    Next {
        #[command(flatten)]
        which: Which,
        /// How many
        #[arg(short = 'n', long, default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=1000))]
        count: u16,
    },
}

#[derive(Debug, clap::Args)]
pub struct Which {
    /// The schedule
    name: String,
    /// Whose it is
    #[arg(long, env = "FLOTILLA_TENANT", default_value = DEFAULT_TENANT)]
    tenant: TenantId,
}

#[derive(Debug, clap::Args)]
pub struct Spec {
    #[command(flatten)]
    which: Which,
    /// When: minute hour day month weekday, such as "30 2 * * 1-5"; six fields have seconds in front; or @daily and the like
    #[arg(long, value_name = "EXPRESSION")]
    cron: String,
    /// Whose local time the expression speaks of: an IANA name, such as Europe/Berlin
    #[arg(long, value_name = "ZONE", default_value = "UTC")]
    time_zone: String,
    /// What becomes of ticks for which no process was there in time: nothing, one job for all of them, or one for each
    #[arg(long, value_enum, default_value_t = CatchUpArg::One)]
    catch_up: CatchUpArg,
    /// Late ticks that `all` makes up for at most, the newest
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(i32).range(1..=1000))]
    max_catch_up: i32,
    /// Kind of its jobs: ingest, embed, delete, or one that your own workers know
    #[arg(long)]
    kind: String,
    /// The request that each of its jobs is: JSON, @FILE, or - for stdin
    #[arg(long, value_name = "JSON")]
    payload: String,
    /// Where its jobs wait; the kind's own queue if absent
    #[arg(long)]
    queue: Option<QueueName>,
    /// 0 to 9; 9 is served first
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u8).range(0..=9))]
    priority: u8,
    /// Charged failures after which a job is dead
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(i32).range(1..=1000))]
    max_attempts: i32,
    /// Hard cap on one run, in seconds
    #[arg(long, default_value_t = 300, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=604_800))]
    timeout: u64,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum CatchUpArg {
    Skip,
    One,
    All,
}

impl Spec {
    fn schedule(&self) -> anyhow::Result<NewSchedule> {
        let payload = read_payload(&self.payload)?;
        Ok(NewSchedule {
            queue: self.queue.clone(),
            priority: Priority::try_from(self.priority)?,
            max_attempts: self.max_attempts,
            timeout: Duration::from_secs(self.timeout),
            time_zone: self.time_zone.clone(),
            catch_up: match self.catch_up {
                CatchUpArg::Skip => CatchUp::Skip,
                CatchUpArg::One => CatchUp::One,
                CatchUpArg::All => CatchUp::All,
            },
            max_catch_up: self.max_catch_up,
            ..NewSchedule::new(self.which.tenant.clone(), &self.which.name, &self.kind, payload, &self.cron)
        })
    }
}

/// Where a page ended: a name of `tenant`, or of the tenant in front of it.
fn place<'a>(tenant: Option<&TenantId>, after: &'a str) -> anyhow::Result<(TenantId, &'a str)> {
    if let Some(tenant) = tenant {
        return Ok((tenant.clone(), after));
    }
    let Some((tenant, name)) = after.split_once('/') else {
        bail!("--after is {after:?}: TENANT/NAME is needed without --tenant");
    };
    Ok((TenantId::new(tenant)?, name))
}

pub async fn run(command: Command, context: &Context) -> Outcome {
    let client = client(context).await?;
    let schedules = client.schedules();
    let said = |tenant: &TenantId, error: ScheduleError| told(error, tenant);
    let record = async |action: &str, which: &Which| {
        let subject = format!("{}/{}", which.tenant, which.name);
        client.postgres().record_action(&actor(), action, &subject, &json!({})).await
    };
    match command {
        Command::List { tenant, after, limit } => {
            let after = after.as_deref().map(|after| place(tenant.as_ref(), after)).transpose()?;
            let after = after.as_ref().map(|(tenant, name)| (tenant, *name));
            let found = schedules.list(tenant.as_ref(), after, limit).await?;
            context.out.data(&found, || output::rows(&table(&found), "no schedules"))?;
        }
        Command::Show(which) => {
            let found = schedules.get(&which.tenant, &which.name).await;
            show(&found.map_err(|error| said(&which.tenant, error))?, context)?;
        }
        Command::Create(spec) => {
            let made = schedules.create(&spec.schedule()?).await;
            let made = made.map_err(|error| said(&spec.which.tenant, error))?;
            record("schedules.create", &spec.which).await?;
            show(&made, context)?;
        }
        Command::Update(spec) => {
            let made = schedules.update(&spec.schedule()?).await;
            let made = made.map_err(|error| said(&spec.which.tenant, error))?;
            record("schedules.update", &spec.which).await?;
            show(&made, context)?;
        }
        Command::Pause(which) => {
            let paused = schedules.pause(&which.tenant, &which.name).await;
            let paused = paused.map_err(|error| said(&which.tenant, error))?;
            record("schedules.pause", &which).await?;
            context.out.data(&paused, || format!("{} is paused", which.name))?;
        }
        Command::Resume(which) => {
            let resumed = schedules.resume(&which.tenant, &which.name).await;
            let resumed = resumed.map_err(|error| said(&which.tenant, error))?;
            record("schedules.resume", &which).await?;
            let next = resumed.next_tick_at.map_or("never".to_owned(), time);
            context.out.data(&resumed, || format!("{} goes on; its next tick: {next}", which.name))?;
        }
        Command::Delete(which) => {
            let gone = schedules.delete(&which.tenant, &which.name).await;
            gone.map_err(|error| said(&which.tenant, error))?;
            record("schedules.delete", &which).await?;
            context.out.data(&json!({ "deleted": which.name }), || format!("{} is deleted", which.name))?;
        }
        Command::Next { which, count } => {
            let found = schedules.get(&which.tenant, &which.name).await;
            let found = found.map_err(|error| said(&which.tenant, error))?;
            let ticks = coming(&found, count.into())?;
            context.out.data(&ticks, || {
                if found.paused_at.is_some() {
                    return format!("{} is paused", which.name);
                }
                ticks.iter().map(|tick| moment(&found, *tick) + "\n").collect()
            })?;
        }
    }
    Ok(Ending::Fine)
}

/// A tick in the schedule's own zone, and how far off it is.
fn moment(schedule: &Schedule, tick: DateTime<Utc>) -> String {
    let local = Timetable::read(&schedule.cron, &schedule.time_zone)
        .map_or_else(|_| tick.to_rfc3339(), |table| tick.with_timezone(&table.zone()).to_rfc3339());
    format!("{local} ({})", ago(tick))
}

fn table(found: &[Schedule]) -> comfy_table::Table {
    let mut table =
        output::table(&["NAME", "TENANT", "CRON", "ZONE", "KIND", "CATCH UP", "NEXT", "LAST", "NOTE"]);
    for one in found {
        let next = match one.paused_at {
            Some(_) => "paused".to_owned(),
            None => one.next_tick_at.map(ago).unwrap_or_default(),
        };
        table.add_row([
            (&one.name).into(),
            (&one.tenant).into(),
            (&one.cron).into(),
            (&one.time_zone).into(),
            (&one.kind).into(),
            (&one.catch_up).into(),
            output::state(&next),
            one.last_tick_at.map(ago).unwrap_or_default().into(),
            short(one.last_error.as_deref().unwrap_or_default(), 60).into(),
        ]);
    }
    table
}

fn show(one: &Schedule, context: &Context) -> anyhow::Result<()> {
    // Of one that this release can't read nothing is known but what it says; `last_error` tells why.
    let ticks = coming(one, 3).unwrap_or_default();
    context.out.data(one, || {
        fields(&[
            ("schedule", Some(one.name.clone())),
            ("tenant", Some(one.tenant.clone())),
            ("cron", Some(format!("{} in {}", one.cron, one.time_zone))),
            (
                "catch up",
                Some(match one.catch_up() {
                    CatchUp::All => format!("all, {} at most", one.max_catch_up),
                    other => other.name().to_owned(),
                }),
            ),
            ("kind", Some(one.kind.clone())),
            ("queue", Some(format!("{} at priority {}", one.queue, one.priority))),
            ("payload", Some(short(&one.payload.to_string(), 200))),
            ("failures", Some(format!("{} allowed", one.max_attempts))),
            ("paused", one.paused_at.map(time)),
            (
                "next",
                (!ticks.is_empty())
                    .then(|| ticks.iter().map(|tick| moment(one, *tick)).collect::<Vec<_>>().join("\n")),
            ),
            ("last", one.last_tick_at.map(|tick| moment(one, tick))),
            ("last job", one.last_job.map(|id| id.to_string())),
            ("last error", one.last_error.clone()),
            ("made", Some(format!("{} ({})", time(one.created_at), ago(one.created_at)))),
        ])
    })
}

/// What is the request's own fault is exit code 1.
fn told(error: ScheduleError, tenant: &TenantId) -> anyhow::Error {
    match error {
        ScheduleError::Job(error) => explained(error, tenant),
        ScheduleError::Store(error) => error.into(),
        other => Refused(other.to_string()).into(),
    }
}
