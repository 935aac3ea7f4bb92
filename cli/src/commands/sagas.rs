//! `flotilla sagas`: runs and their timelines, and what a person does about parked ones.

mod parked;
mod timeline;

use chrono::{DateTime, Utc};
use queue::JobId;
use sagas::{
    RunState,
    standing::Standing,
    stores::postgres::{
        Postgres,
        inspect::{JobView, SagaFilter, SagaView, StepView},
        waits::{Signalled, WaitView},
    },
};
use serde::Serialize;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::{
    context::{Context, actor},
    failure::{Ending, Outcome, Refused},
    output::{self, ago, between, short, span},
    times,
};

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// List runs, newest first; the first run of a job is as old as the job
    List {
        /// Only runs in this state
        #[arg(long, value_parser = output::one_of(RunState::ALL, RunState::as_str))]
        state: Option<RunState>,
        /// Only this tenant's runs
        #[arg(long)]
        tenant: Option<String>,
        /// Only runs of this kind
        #[arg(long)]
        kind: Option<String>,
        /// Only runs begun then or later: a time, or how long ago, such as 2h
        #[arg(long, value_name = "TIME", value_parser = times::past)]
        since: Option<DateTime<Utc>>,
        /// Only runs begun before: a time, or how long ago
        #[arg(long, value_name = "TIME", value_parser = times::past)]
        until: Option<DateTime<Utc>>,
        /// The next page: only runs before this one, the last of the page before
        #[arg(long, value_name = "ID")]
        before: Option<Uuid>,
        /// Runs at most
        #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(i64).range(1..=10_000))]
        limit: i64,
    },
    /// Draw a run's timeline: each step of each delivery, forward and backward
    Show {
        /// The run, or its job: then all its runs are drawn
        id: Uuid,
    },
    /// Let a parked run go on from its log, under a new fence
    Retry {
        /// The run, or its job
        id: Uuid,
    },
    /// Close a parked run, and give its job an end
    Resolve {
        /// The run, or its job
        id: Uuid,
        /// Why, for the audit log
        #[arg(long)]
        reason: String,
    },
    /// Send a job the signal that one of its steps waits for, or will
    Signal {
        /// The job
        job: Uuid,
        /// The signal
        name: String,
        /// What it says, as JSON
        #[arg(default_value = "null", value_parser = |text: &str| serde_json::from_str::<Value>(text))]
        payload: Value,
    },
}

/// A run with its steps.
#[derive(Debug, Serialize)]
struct Run {
    #[serde(flatten)]
    saga: SagaView,
    steps: Vec<StepView>,
    /// Of a parked run: what stands of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    standing: Option<Standing>,
    waits: Vec<WaitView>,
}

/// A job and its runs, as JSON.
#[derive(Serialize)]
struct Detail<'a> {
    job: &'a JobView,
    sagas: &'a [Run],
}

pub async fn run(command: Command, context: &Context) -> Outcome {
    let postgres = context.postgres().await?;
    match command {
        Command::List { state, tenant, kind, since, until, before, limit } => {
            let filter = SagaFilter { state, tenant, kind, since, until, before, limit };
            let sagas = postgres.sagas(&filter).await?;
            context.out.data(&sagas, || output::rows(&saga_table(&sagas), "no such saga runs"))?;
        }
        Command::Signal { job, name, payload } => return signal(job, &name, &payload, context).await,
        Command::Show { id } => {
            let (job, mut runs) = find(id, &postgres).await?;
            for run in runs.iter_mut().filter(|run| run.saga.state == "parked") {
                run.standing = Some(context.stores(postgres.clone())?.standing(&run.saga).await?);
            }
            context.out.data(&Detail { job: &job, sagas: &runs }, || {
                runs.iter().map(|run| drawn(&job, run)).collect::<Vec<_>>().join("\n")
            })?;
        }
        Command::Retry { id } => parked::retry(id, &postgres, context).await?,
        Command::Resolve { id, reason } => parked::resolve(id, &reason, &postgres, context).await?,
    }
    Ok(Ending::Fine)
}

/// A run's timeline, and what stands of a parked one.
fn drawn(job: &JobView, run: &Run) -> String {
    let text = timeline::draw(job, &run.saga, &run.steps, timeline::WIDTH) + &timeline::waits(&run.waits);
    match &run.standing {
        Some(standing) => format!("{text}\n{}", parked::described(run.saga.id, standing)),
        None => text,
    }
}

async fn signal(job: Uuid, name: &str, payload: &Value, context: &Context) -> Outcome {
    let client = super::enqueue::client(context).await?;
    let (word, sentence, good) = match client.signal(JobId(job), None, name, payload).await? {
        Signalled::Sent => ("sent", "the signal is kept for it", true),
        Signalled::Duplicate => ("duplicate", "the same signal was sent before", true),
        Signalled::Conflict => ("conflict", "this signal was sent before with another payload", false),
        Signalled::Ended => ("ended", "it has ended", false),
        Signalled::TooMany => ("too_many_signals", "it has as many signals as a job may have", false),
        Signalled::Unknown => return Err(super::jobs::unknown(job, &client)),
    };
    if word == "sent" {
        let detail = json!({ "signal": name });
        client.postgres().record_action(&actor(), "sagas.signal", &job.to_string(), &detail).await?;
    }
    context
        .out
        .data(&json!({ "job": job, "signal": name, "state": word }), || format!("job {job}: {sentence}"))?;
    Ok(Ending::fine_if(good))
}

/// The runs that an id means, and their job.
async fn find(id: Uuid, postgres: &Postgres) -> anyhow::Result<(JobView, Vec<Run>)> {
    // A job's first run may have the job's id: that means all its runs.
    let sagas = match postgres.saga(id).await?.filter(|saga| saga.job_id != id) {
        Some(saga) => vec![saga],
        None => postgres.sagas_of(JobId(id)).await?,
    };
    let job_id = sagas.first().map_or(id, |saga| saga.job_id);
    let Some(job) = postgres.job(JobId(job_id), None).await? else {
        return Err(Refused(format!("there is no saga run {id}, and no job {id}")).into());
    };
    if sagas.is_empty() {
        let why = match job.state.as_str() {
            "waiting" | "running" => "it is still to begin",
            _ => "it ended without one",
        };
        return Err(Refused(format!("job {id} is {} and has no saga run: {why}", job.state)).into());
    }
    let mut runs = Vec::with_capacity(sagas.len());
    for saga in sagas {
        let steps = postgres.steps(saga.id).await?;
        let waits = postgres.waits(saga.id).await?;
        runs.push(Run { saga, steps, standing: None, waits });
    }
    Ok((job, runs))
}

/// Runs as a table.
pub fn saga_table(sagas: &[SagaView]) -> comfy_table::Table {
    let mut table =
        output::table(&["SAGA", "JOB", "KIND", "STATE", "NEXT STEP", "TENANT", "BEGAN", "TOOK", "ERROR"]);
    for saga in sagas {
        let took = saga.finished_at.and_then(|end| between(saga.created_at, end));
        table.add_row([
            saga.id.into(),
            saga.job_id.into(),
            (&saga.kind).into(),
            output::state(saga.state.as_str()),
            output::number(saga.next_step),
            (&saga.tenant).into(),
            ago(saga.created_at).into(),
            took.map(span).unwrap_or_default().into(),
            short(saga.error.as_deref().unwrap_or_default(), 60).into(),
        ]);
    }
    table
}
