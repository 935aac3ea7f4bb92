//! `flotilla sagas`: runs and their timelines.

mod timeline;

use queue::JobId;
use sagas::stores::postgres::{
    Postgres,
    inspect::{JobView, SagaView, StepView},
};
use serde::Serialize;
use uuid::Uuid;

use crate::{
    context::Context,
    failure::{Ending, Outcome, Refused},
    output::{self, ago, between, short, span},
};

/// States of a saga's run.
const STATES: [&str; 6] = ["running", "compensating", "finishing", "completed", "compensated", "parked"];

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// List runs, newest first
    List {
        /// Only runs in this state
        #[arg(long, value_parser = STATES)]
        state: Option<String>,
        /// Runs at most
        #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(i64).range(1..=10_000))]
        limit: i64,
    },
    /// Draw a run's timeline: each step of each delivery, forward and backward
    Show {
        /// The run, or its job: then all its runs are drawn
        id: Uuid,
    },
}

/// A run with its steps.
#[derive(Debug, Serialize)]
struct Run {
    #[serde(flatten)]
    saga: SagaView,
    steps: Vec<StepView>,
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
        Command::List { state, limit } => {
            let sagas = postgres.sagas(state.as_deref(), limit).await?;
            context.out.data(&sagas, || output::rows(&saga_table(&sagas), "no such saga runs"))?;
        }
        Command::Show { id } => {
            let (job, runs) = find(id, &postgres).await?;
            context.out.data(&Detail { job: &job, sagas: &runs }, || {
                runs.iter()
                    .map(|run| timeline::draw(&job, &run.saga, &run.steps, timeline::WIDTH))
                    .collect::<Vec<_>>()
                    .join("\n")
            })?;
        }
    }
    Ok(Ending::Fine)
}

/// The runs that an id means, and their job.
async fn find(id: Uuid, postgres: &Postgres) -> anyhow::Result<(JobView, Vec<Run>)> {
    let sagas = match postgres.saga(id).await? {
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
        runs.push(Run { saga, steps });
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
            output::state(&saga.state),
            output::number(saga.next_step),
            (&saga.tenant).into(),
            ago(saga.created_at).into(),
            took.map(span).unwrap_or_default().into(),
            short(saga.error.as_deref().unwrap_or_default(), 60).into(),
        ]);
    }
    table
}
