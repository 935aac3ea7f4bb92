//! `flotilla jobs`: what the ledger knows of jobs, and cancelling them.

use queue::JobId;
use sagas::stores::postgres::{
    Postgres,
    dead_letters::DeadLetter,
    inspect::{AttemptView, JobFilter, JobView, SagaView},
    ledger::Cancel,
};
use serde::Serialize;
use serde_json::json;
use uuid::Uuid;

use crate::{
    context::{Context, actor},
    failure::{Ending, Outcome, Refused},
    output::{self, ago, between, fields, short, span, time},
};

/// States of a job, in the order in which people think of them.
const STATES: [&str; 6] = ["waiting", "running", "succeeded", "cancelled", "dead", "parked"];

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// List jobs, newest first
    List {
        /// Only jobs in this state
        #[arg(long, value_parser = STATES)]
        state: Option<String>,
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
    /// Ask for a job's end: a waiting one ends now, a running one once its effects are undone
    Cancel {
        /// The job
        id: Uuid,
    },
}

pub async fn run(command: Command, context: &Context) -> Outcome {
    let postgres = context.postgres().await?;
    match command {
        Command::List { state, kind, tenant, before, limit } => {
            let jobs = postgres.jobs(&JobFilter { tenant, state, kind, before, limit }).await?;
            context.out.data(&jobs, || output::rows(&job_table(&jobs), "no such jobs"))?;
            Ok(Ending::Fine)
        }
        Command::Show { id } => show(id, &postgres, context).await,
        Command::Cancel { id } => cancel(id, context).await,
    }
}

fn job_table(jobs: &[JobView]) -> comfy_table::Table {
    let heads = ["ID", "KIND", "STATE", "PRI", "TENANT", "DOCUMENT", "TRIES", "ACCEPTED", "TOOK", "NOTE"];
    let mut table = output::table(&heads);
    for job in jobs {
        let took = job.finished_at.and_then(|end| between(job.created_at, end));
        let note = job.outcome.as_deref().filter(|o| *o != job.state).or(job.last_error.as_deref());
        table.add_row([
            job.id.into(),
            (&job.kind).into(),
            output::state(&job.state),
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

async fn show(id: Uuid, postgres: &Postgres, context: &Context) -> Outcome {
    let Some(job) = postgres.job(JobId(id), None).await? else { return Err(unknown(id).into()) };
    let detail = Detail {
        failures: postgres.attempts(JobId(id)).await?,
        sagas: postgres.sagas_of(JobId(id)).await?,
        dead_letter: postgres.dead_letter(id).await?,
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
        ("state", Some(job.outcome.as_ref().map_or(job.state.clone(), |o| format!("{} ({o})", job.state)))),
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

async fn cancel(id: Uuid, context: &Context) -> Outcome {
    let client = super::enqueue::client(context).await?;
    let (word, sentence, good) = match client.cancel(JobId(id), None).await? {
        Cancel::Cancelled => ("cancelled", "cancelled", true),
        Cancel::Requested => {
            ("requested", "its end is asked for; it is cancelled once its effects are undone", true)
        }
        Cancel::PastPivot => ("past_pivot", "too late: its effect is published", false),
        Cancel::Ended => ("ended", "it has ended already", false),
        Cancel::Unknown => return Err(unknown(id).into()),
    };
    if good {
        client.postgres().record_action(&actor(), "jobs.cancel", &id.to_string(), &json!({})).await?;
    }
    context.out.data(&json!({ "job": id, "cancel": word }), || format!("job {id}: {sentence}"))?;
    Ok(Ending::fine_if(good))
}

fn unknown(id: Uuid) -> Refused {
    Refused(format!("the ledger doesn't know job {id} (finished jobs are kept for 7 days)"))
}
