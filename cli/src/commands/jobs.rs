//! `flotilla jobs`: what the ledger knows of jobs; cancelling them, moving them up and putting them off.

use std::{collections::BTreeMap, fmt::Display, time::Duration};

use anyhow::{Context as _, anyhow};
use chrono::{DateTime, Utc};
use futures::StreamExt as _;
use producer::Client;
use queue::{JobId, Priority};
use sagas::{
    JobState,
    stores::postgres::{
        control::{Change, Changed, Selection},
        dead_letters::DeadLetter,
        inspect::{AttemptView, JobFilter, JobView, SagaView},
        ledger::Cancel,
    },
};
use serde::Serialize;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::{
    context::{Context, actor},
    failure::{Ending, Outcome, Refused},
    output::{self, ago, between, fields, short, span, time},
};

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// List jobs, newest first
    List {
        /// Only jobs in this state
        #[arg(long, value_parser = output::one_of(JobState::ALL, JobState::as_str))]
        state: Option<JobState>,
        /// Only jobs of this queue
        #[arg(long)]
        queue: Option<String>,
        /// Only jobs of this kind
        #[arg(long)]
        kind: Option<String>,
        /// Only this tenant's jobs
        #[arg(long)]
        tenant: Option<String>,
        /// Only jobs that are older than this one: the last of the page before
        #[arg(long, value_name = "ID")]
        before: Option<Uuid>,
        /// Jobs at most
        #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(i64).range(1..=10_000))]
        limit: i64,
    },
    /// Show one job with its failures, its saga runs and its dead letter
    Show {
        /// The job
        id: Uuid,
    },
    /// Ask for the end of jobs: waiting ones end now, running ones once their effects are undone
    Cancel {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        bound: Bound,
    },
    /// Give waiting jobs another priority; running ones are left as they are
    #[command(visible_alias = "reprioritize")]
    Reprioritise {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        bound: Bound,
        /// 0 to 9; 9 is served first
        #[arg(long, value_parser = clap::value_parser!(u8).range(0..=9))]
        priority: u8,
    },
    /// Put waiting jobs off; running ones are left as they are
    Snooze {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        bound: Bound,
        /// How long from now: 90s, 10m, 2h, 1d
        #[arg(long = "for", value_name = "TIME", value_parser = read_span, required_unless_present = "until")]
        span: Option<Duration>,
        /// Until when, such as 2026-01-31T09:00:00Z
        #[arg(long, value_name = "TIME", conflicts_with = "span")]
        until: Option<DateTime<Utc>>,
    },
}

/// Jobs by id, or by filter.
#[derive(Debug, clap::Args)]
#[group(id = "which_jobs", required = true, multiple = true)]
pub struct Which {
    /// The jobs
    #[arg(value_name = "ID", conflicts_with_all = ["queue", "tenant", "kind"])]
    ids: Vec<Uuid>,
    /// All that have not ended in this queue, oldest first
    #[arg(long)]
    queue: Option<String>,
    /// All of this tenant that have not ended
    #[arg(long)]
    tenant: Option<String>,
    /// All of this kind that have not ended
    #[arg(long)]
    kind: Option<String>,
}

/// Cancels that are under way together.
const CANCELS_AT_ONCE: usize = 8;
/// Jobs changed by one statement.
const AT_ONCE: usize = 500;

/// How many jobs a filter may choose.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct Bound {
    /// Jobs that a filter chooses at most; --after goes on behind them
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(i64).range(1..=100_000))]
    limit: i64,
    /// Of those that a filter chooses, only the ones behind this job: the last of the run before
    #[arg(long, value_name = "ID", conflicts_with = "ids")]
    after: Option<Uuid>,
}

pub async fn run(command: Command, context: &Context) -> Outcome {
    let postgres = context.postgres().await?;
    match command {
        Command::List { state, queue, kind, tenant, before, limit } => {
            let jobs = postgres.jobs(&JobFilter { tenant, state, queue, kind, before, limit }).await?;
            context.out.data(&jobs, || output::rows(&job_table(&jobs), "no such jobs"))?;
            Ok(Ending::Fine)
        }
        Command::Show { id } => show(id, context).await,
        Command::Cancel { which, bound } => cancel(&which, bound, context).await,
        Command::Reprioritise { which, bound, priority } => {
            let priority = Some(Priority::try_from(priority)?);
            change(&which, bound, Change { priority, run_at: None }, "jobs.reprioritise", context).await
        }
        Command::Snooze { which, bound, span, until } => {
            let run_at = match (span, until) {
                (Some(span), _) => {
                    let until = postgres.now().await?.checked_add_signed(chrono::Duration::from_std(span)?);
                    Some(until.context("--for: there is no such time")?)
                }
                (None, until) => until,
            };
            change(&which, bound, Change { priority: None, run_at }, "jobs.snooze", context).await
        }
    }
}

fn job_table(jobs: &[JobView]) -> comfy_table::Table {
    let heads = ["ID", "KIND", "STATE", "PRI", "TENANT", "DOCUMENT", "TRIES", "ACCEPTED", "TOOK", "NOTE"];
    let mut table = output::table(&heads);
    for job in jobs {
        let took = job.finished_at.and_then(|end| between(job.created_at, end));
        let note =
            job.outcome.as_deref().filter(|outcome| job.state != *outcome).or(job.last_error.as_deref());
        table.add_row([
            job.id.into(),
            (&job.kind).into(),
            output::state(job.state.as_str()),
            output::number(job.priority),
            (&job.tenant).into(),
            short(job.document.as_deref().unwrap_or_default(), 40).into(),
            output::number(job.deliveries),
            ago(job.created_at).into(),
            took.map(span).unwrap_or_default().into(),
            short(note.unwrap_or_default(), 60).into(),
        ]);
    }
    table
}

/// Everything about one job.
#[derive(Serialize)]
struct Detail {
    #[serde(flatten)]
    job: JobView,
    failures: Vec<AttemptView>,
    sagas: Vec<SagaView>,
    dead_letter: Option<DeadLetter>,
}

async fn show(id: Uuid, context: &Context) -> Outcome {
    let client = super::enqueue::client(context).await?;
    let postgres = client.postgres();
    let Some(job) = client.job(JobId(id), None).await? else { return Err(unknown(id, &client)) };
    // A payload is shown by those commands alone that are asked for it.
    let dead_letter = postgres.dead_letter(id).await?;
    let dead_letter = dead_letter.map(|letter| DeadLetter { payload: Value::Null, ..letter });
    let detail = Detail {
        failures: postgres.attempts(JobId(id)).await?,
        sagas: postgres.sagas_of(JobId(id)).await?,
        dead_letter,
        job,
    };
    context.out.data(&detail, || described(&detail))?;
    Ok(Ending::Fine)
}

fn described(detail: &Detail) -> String {
    let Detail { job, failures, sagas, dead_letter } = detail;
    let text = |value: &Option<String>| value.clone();
    let took = job.finished_at.and_then(|end| between(job.created_at, end)).map(span);
    let mut out = fields(&[
        ("job", Some(job.id.to_string())),
        ("kind", Some(job.kind.clone())),
        (
            "state",
            Some(job.outcome.as_ref().map_or(job.state.to_string(), |o| format!("{} ({o})", job.state))),
        ),
        ("tenant", Some(job.tenant.clone())),
        ("queue", Some(format!("{} at priority {}", job.queue, job.priority))),
        (
            "document",
            job.document.as_ref().map(|d| format!("{d} (order {})", job.doc_order.unwrap_or_default())),
        ),
        ("accepted", Some(format!("{} ({})", time(job.created_at), ago(job.created_at)))),
        (
            "not before",
            (job.finished_at.is_none() && job.run_at > job.created_at)
                .then(|| format!("{} ({})", time(job.run_at), ago(job.run_at))),
        ),
        ("taken", job.taken_at.map(time)),
        ("finished", job.finished_at.map(time)),
        ("took", took),
        (
            "progress",
            job.progress.map(|percent| match &job.progress_message {
                Some(message) => format!("{percent} %: {message}"),
                None => format!("{percent} %"),
            }),
        ),
        ("worker", text(&job.worker)),
        ("deliveries", Some(format!("{}, {} lost", job.deliveries, job.lost_deliveries))),
        ("failures", Some(format!("{} of {}", job.attempts, job.max_attempts))),
        ("cancel asked", job.cancel_requested_at.map(time)),
        ("result", job.result.as_ref().map(ToString::to_string)),
        ("last error", text(&job.last_error)),
        ("parent", job.parent.map(|id| id.to_string())),
        ("batch", job.batch_id.map(|id| id.to_string())),
        ("replay of", job.replay_of.map(|id| id.to_string())),
        ("traceparent", text(&job.traceparent)),
    ]);
    if !failures.is_empty() {
        let mut table = output::table(&["FAILURE", "AT", "CLASS", "WORKER", "ERROR"]);
        for one in failures {
            table.add_row([
                output::number(one.attempt),
                time(one.ended_at).into(),
                (&one.class).into(),
                (&one.worker).into(),
                (&one.error).into(),
            ]);
        }
        out = format!("{out}\n{}", output::tidy(&table));
    }
    if !sagas.is_empty() {
        out = format!("{out}\n{}", output::tidy(&super::sagas::saga_table(sagas)));
    }
    if let Some(letter) = dead_letter {
        out = format!("{out}\ndead letter {} is {}: {}\n", letter.id, letter.state, letter.reason);
    }
    out
}

/// The jobs meant, and whether those can be all: the ledger's own can be chosen also where Redis can't be asked for fast ones.
async fn chosen(
    which: &Which,
    bound: Bound,
    running: bool,
    client: &Client,
) -> anyhow::Result<(Vec<JobId>, bool)> {
    if !which.ids.is_empty() {
        return Ok((which.ids.iter().copied().map(JobId).collect(), true));
    }
    let selection = Selection {
        tenant: which.tenant.clone(),
        queue: which.queue.clone(),
        kind: which.kind.clone(),
        running,
        after: bound.after,
        limit: bound.limit,
    };
    // The run before, which ended at `after`, has brought them all.
    let settled = if bound.after.is_some() { Ok(()) } else { client.settle_all_fast(&selection).await };
    if let Err(error) = &settled {
        say_left_out(error);
    }
    Ok((client.postgres().select_jobs(&selection).await?, settled.is_ok()))
}

/// Says that Redis could not be asked for the jobs that nobody else has.
pub fn say_left_out(error: impl Display) {
    output::say(format!("jobs with durability=fast that no worker has claimed may be left out: {error}"));
}

/// Says how to go on if a filter may have chosen more.
fn advise(which: &Which, bound: Bound, ids: &[JobId]) {
    if let Some(last) = ids.last().filter(|_| which.ids.is_empty() && ids.len() as i64 == bound.limit) {
        output::say(format!("--limit jobs were chosen; --after {last} goes on with those behind them"));
    }
}

async fn change(which: &Which, bound: Bound, change: Change, action: &str, context: &Context) -> Outcome {
    let client = super::enqueue::client(context).await?;
    let (ids, complete) = chosen(which, bound, false, &client).await?;
    let mut answers = Vec::with_capacity(ids.len());
    for page in ids.chunks(AT_ONCE) {
        let changed = client.change(page, None, change).await?;
        answers.extend(page.iter().zip(changed).map(|(id, changed)| {
            let (word, sentence) = match changed {
                Changed::Done => ("done", "done"),
                Changed::Running => ("running", "it runs: left as it is"),
                Changed::Ended => ("ended", "it has ended already"),
                Changed::Unknown => ("unknown", "the ledger doesn't know it"),
            };
            (id.0, word, sentence)
        }));
    }
    let done = answers.iter().filter(|(_, word, _)| *word == "done").count();
    if done > 0 {
        let detail =
            json!({ "jobs": done, "priority": change.priority.map(Priority::get), "run_at": change.run_at });
        let subject =
            which.ids.first().filter(|_| which.ids.len() == 1).map_or("jobs".to_owned(), Uuid::to_string);
        client.postgres().record_action(&actor(), action, &subject, &detail).await?;
    }
    let told: Vec<_> = answers.iter().map(|(id, word, _)| json!({ "job": id, "change": word })).collect();
    context.out.data(&told, || {
        if which.ids.is_empty() {
            return format!("{} changed", output::counted(done, "job"));
        }
        let lines: Vec<String> =
            answers.iter().map(|(id, _, sentence)| format!("job {id}: {sentence}")).collect();
        lines.join("\n")
    })?;
    advise(which, bound, &ids);
    if answers.iter().any(|(_, word, _)| *word == "unknown") {
        say_if_redis_is_away(&client);
    }
    Ok(Ending::fine_if(complete && (which.ids.is_empty() || done == answers.len())))
}

/// A length of time as people write it.
fn read_span(text: &str) -> Result<Duration, String> {
    let bad = || format!("{text:?}: a whole number with s, m, h or d behind it is needed, like 90s or 10m");
    let unit = text.chars().last().filter(char::is_ascii_alphabetic).ok_or_else(bad)?;
    let number: u32 = text[..text.len() - 1].parse().map_err(|_| bad())?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        'd' => 24 * 3600,
        _ => return Err(bad()),
    };
    Ok(Duration::from_secs(u64::from(number) * seconds))
}

async fn cancel(which: &Which, bound: Bound, context: &Context) -> Outcome {
    let client = super::enqueue::client(context).await?;
    if let [id] = which.ids[..] {
        return cancel_one(id, &client, context).await;
    }
    let (ids, complete) = chosen(which, bound, true, &client).await?;
    let mut counts: BTreeMap<&str, usize> =
        ["cancelled", "requested", "past_pivot", "ended", "unknown"].map(|word| (word, 0)).into();
    let answers: Vec<_> = futures::stream::iter(&ids)
        .map(|id| client.cancel(*id, None))
        .buffered(CANCELS_AT_ONCE)
        .collect()
        .await;
    let mut failed = None;
    for answer in answers {
        let word = match answer {
            Ok(Cancel::Cancelled) => "cancelled",
            Ok(Cancel::Requested) => "requested",
            Ok(Cancel::PastPivot) => "past_pivot",
            Ok(Cancel::Ended) => "ended",
            Ok(Cancel::Unknown) => "unknown",
            Err(error) => {
                failed = Some(error);
                continue;
            }
        };
        *counts.entry(word).or_default() += 1;
    }
    // Also what was done before another failed.
    client.postgres().record_action(&actor(), "jobs.cancel", "jobs", &json!(counts)).await?;
    context.out.data(&counts, || {
        if ids.is_empty() {
            return "no such jobs".to_owned();
        }
        counts.iter().filter(|(_, count)| **count > 0).fold(String::new(), |text, (word, count)| {
            format!("{text}{} {word}\n", output::counted(*count, "job"))
        })
    })?;
    if let Some(error) = failed {
        return Err(error.into());
    }
    advise(which, bound, &ids);
    if counts["unknown"] > 0 {
        say_if_redis_is_away(&client);
    }
    let done = counts["cancelled"] + counts["requested"];
    Ok(Ending::fine_if(complete && (which.ids.is_empty() || done == ids.len())))
}

async fn cancel_one(id: Uuid, client: &Client, context: &Context) -> Outcome {
    let (word, sentence, good) = match client.cancel(JobId(id), None).await? {
        Cancel::Cancelled => ("cancelled", "cancelled", true),
        Cancel::Requested => {
            ("requested", "its end is asked for; it is cancelled once its effects are undone", true)
        }
        Cancel::PastPivot => ("past_pivot", "too late: its effect is published", false),
        Cancel::Ended => ("ended", "it has ended already", false),
        Cancel::Unknown => return Err(unknown(id, client)),
    };
    if good {
        client.postgres().record_action(&actor(), "jobs.cancel", &id.to_string(), &json!({})).await?;
    }
    context.out.data(&json!({ "job": id, "cancel": word }), || format!("job {id}: {sentence}"))?;
    Ok(Ending::fine_if(good))
}

/// Nobody knows the job; or the ledger doesn't, and Redis, which may, can't be asked.
pub fn unknown(id: Uuid, client: &Client) -> anyhow::Error {
    match client.queue() {
        Some(_) => {
            Refused(format!("the ledger doesn't know job {id} (finished jobs are kept for 7 days)")).into()
        }
        None => anyhow!("the ledger doesn't know job {id}. {REDIS_IS_AWAY}"),
    }
}

const REDIS_IS_AWAY: &str = "The queue's Redis, which may have it if it is a fast one, can't be reached, or REDIS_QUEUE_URL is not set";

/// Some jobs are unknown.
fn say_if_redis_is_away(client: &Client) {
    if client.queue().is_none() {
        output::say(REDIS_IS_AWAY);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn spans_have_a_unit() {
        for (text, seconds) in [("90s", 90), ("10m", 600), ("2h", 7200), ("1d", 86_400)] {
            assert_eq!(read_span(text).unwrap(), Duration::from_secs(seconds));
        }
        for text in ["", "10", "m", "1.5h", "-1m", "1w", "10 m", "1µ"] {
            assert!(read_span(text).unwrap_err().contains("like 90s or 10m"), "{text}");
        }
    }
}
