//! What a person does about a parked run.

use anyhow::bail;
use sagas::{
    standing::{Effect, Standing, VersionStanding},
    stores::postgres::{Postgres, inspect::SagaView, parked::Handled},
};
use serde_json::json;
use uuid::Uuid;

use super::find;
use crate::{
    context::{Context, actor},
    failure::Refused,
    output::fields,
};

/// Lets it go on, and puts its job into Redis.
pub async fn retry(id: Uuid, postgres: &Postgres, context: &Context) -> anyhow::Result<()> {
    let saga = parked(id, postgres).await?;
    let queue = context.dispatcher(postgres).await?;
    let (job, _) = done(saga.id, postgres.retry_parked(saga.id, &actor()).await?)?;
    context.dispatch(queue.as_ref(), job, postgres).await;
    context.out.data(&json!({ "saga": saga.id, "job": job, "job_state": "waiting" }), || {
        format!(
            "{} goes on: job {job} waits for a worker\n`flotilla sagas show {0}` shows how it ends",
            saga.id
        )
    })
}

/// Closes it; says first what stands, because nothing looks after that any more but the janitor.
pub async fn resolve(id: Uuid, reason: &str, postgres: &Postgres, context: &Context) -> anyhow::Result<()> {
    if reason.trim().is_empty() {
        bail!("--reason is empty: say why, for whoever reads the audit log");
    }
    let saga = parked(id, postgres).await?;
    let stores = context.stores(postgres.clone())?;
    let standing = stores.standing(&saga).await?;
    let resolved = postgres.resolve_parked(saga.id, &actor(), reason, stores.settings.sweep_bound).await?;
    let (job, state) = done(saga.id, resolved)?;
    let data = json!({ "saga": saga.id, "job": job, "job_state": state, "stood": standing });
    context.out.data(&data, || {
        let next = match state.as_str() {
            "dead" => format!("replay it with `flotilla dlq replay {job}`, or discard its letter\n"),
            _ => String::new(),
        };
        format!(
            "{}\n{} is closed, job {job} is {state}\nthe janitor removes points and cache entries of a version that nobody \
             sees, in {:?}; jobs that the run waited for are cancelled if it was short of its pivot; effects elsewhere are \
             yours\n{next}",
            stands(&standing),
            saga.id,
            stores.settings.sweep_bound,
        )
    })
}

/// The parked run that an id means.
async fn parked(id: Uuid, postgres: &Postgres) -> anyhow::Result<SagaView> {
    let (_, runs) = find(id, postgres).await?;
    let states: Vec<String> = runs.iter().map(|run| run.saga.state.to_string()).collect();
    match runs.into_iter().find(|run| run.saga.state == "parked") {
        Some(run) => Ok(run.saga),
        None => Err(not_parked(id, &states.join(", ")).into()),
    }
}

fn done(saga: Uuid, handled: Handled) -> Result<(queue::JobId, String), Refused> {
    match handled {
        Handled::Done(job, state) => Ok((job, state)),
        Handled::Not(state) => Err(not_parked(saga, &state)),
        Handled::Unknown => Err(Refused(format!("there is no saga run {saga}"))),
    }
}

fn not_parked(id: Uuid, state: &str) -> Refused {
    Refused(format!("{id} is not parked but {state}: nothing was done"))
}

/// What stands of a parked run, and what can be done.
pub fn described(id: Uuid, standing: &Standing) -> String {
    format!(
        "{}\nmend the cause, then let it go on with `flotilla sagas retry {id}`;\n\
         or close it with `flotilla sagas resolve {id} --reason …`\n",
        stands(standing)
    )
}

fn stands(standing: &Standing) -> String {
    let steps: Vec<String> = standing
        .steps
        .iter()
        .map(|step| {
            let effect = match step.effect {
                Effect::Stands => "stands",
                Effect::MayStand => "may stand",
                Effect::Undone => "undone",
            };
            let error = step.error.as_ref().map(|error| format!(": {error}")).unwrap_or_default();
            format!("{} {effect}{error}", step.step)
        })
        .collect();
    let versions: Vec<String> = standing.versions.iter().map(version).collect();
    let lines = |lines: Vec<String>| (!lines.is_empty()).then(|| lines.join("\n"));
    fields(&[
        ("errors", lines(standing.errors.clone())),
        ("steps", lines(steps)),
        ("versions", lines(versions)),
    ])
}

fn version(version: &VersionStanding) -> String {
    let row = &version.row;
    let points = version.points.map_or("unknown points".to_owned(), |points| {
        format!("{points} of {} points in {}", row.chunk_count, row.collection)
    });
    let cached = match version.cached {
        Some(true) => "a cache entry",
        Some(false) => "no cache entry",
        None => "cache unknown",
    };
    let text = if row.has_body { "its text" } else { "no text" };
    let mut line = format!(
        "{} {}: {text} and {} chunk rows in Postgres, {points}, {cached}",
        row.id, row.state, row.chunk_rows
    );
    for why in &version.unknown {
        line = format!("{line}\n  {why}");
    }
    line
}
