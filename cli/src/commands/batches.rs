//! `flotilla batches`: jobs that are counted together.

use producer::{BatchChanged, BatchId, BatchView};
use sagas::stores::postgres::batches::BatchFilter;
use serde_json::json;
use uuid::Uuid;

use crate::{
    context::{Context, actor},
    failure::{Ending, Outcome, Refused},
    output::{self, ago, between, fields, short, span, time},
};

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// List batches, newest first
    List {
        /// Only this tenant's batches
        #[arg(long)]
        tenant: Option<String>,
        /// Only batches that have not finished
        #[arg(long)]
        unfinished: bool,
        /// Only batches that are older than this one: the last of the page before
        #[arg(long, value_name = "ID")]
        before: Option<Uuid>,
        /// Batches at most
        #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(i64).range(1..=10_000))]
        limit: i64,
    },
    /// Show one batch: its counts, how far it is, its callback
    Show {
        /// The batch
        id: BatchId,
    },
    /// Ask for a batch's end: it takes no more jobs, and each unfinished one is cancelled as if alone
    Cancel {
        /// The batch
        id: BatchId,
    },
}

pub async fn run(command: Command, context: &Context) -> Outcome {
    let postgres = context.postgres().await?;
    match command {
        Command::List { tenant, unfinished, before, limit } => {
            let filter = BatchFilter { tenant, finished: unfinished.then_some(false), before, limit };
            let batches = postgres.batches(&filter).await?;
            context.out.data(&batches, || output::rows(&table(&batches), "no such batches"))?;
            Ok(Ending::Fine)
        }
        Command::Show { id } => {
            let Some(batch) = postgres.batch(id, None).await? else { return Err(unknown(id).into()) };
            context.out.data(&batch, || described(&batch))?;
            Ok(Ending::Fine)
        }
        Command::Cancel { id } => cancel(id, context).await,
    }
}

fn table(batches: &[BatchView]) -> comfy_table::Table {
    let heads = ["ID", "NAME", "STATE", "TENANT", "JOBS", "SUCCEEDED", "FAILED", "CANCELLED", "%", "MADE"];
    let mut table = output::table(&heads);
    for batch in batches {
        table.add_row([
            batch.id.into(),
            short(&batch.name, 40).into(),
            output::state(&batch.state),
            (&batch.tenant).into(),
            output::number(batch.total),
            output::number(batch.succeeded),
            output::number(batch.failed),
            output::number(batch.cancelled),
            output::number(format!("{:.0}", batch.percent)),
            ago(batch.created_at).into(),
        ]);
    }
    table
}

fn described(batch: &BatchView) -> String {
    let open = batch.total - batch.succeeded - batch.failed - batch.cancelled;
    let callback = batch.callback_on.as_ref().map(|on| match batch.callback_job {
        Some(job) => format!("on {on}: job {job}"),
        None if batch.called_at.is_some() => format!("on {on}: its job's record has expired"),
        None => format!("on {on}: not enqueued yet"),
    });
    fields(&[
        ("batch", Some(batch.id.to_string())),
        ("name", Some(batch.name.clone())),
        ("tenant", Some(batch.tenant.clone())),
        ("state", Some(batch.state.clone())),
        ("progress", Some(format!("{:.1} %", batch.percent))),
        (
            "jobs",
            Some(format!(
                "{}: {} succeeded, {} failed, {} cancelled, {} running, {} waiting",
                batch.total,
                batch.succeeded,
                batch.failed,
                batch.cancelled,
                batch.running,
                open - batch.running
            )),
        ),
        ("callback", callback),
        ("parent", batch.parent.map(|id| id.to_string())),
        ("in batch", batch.outer_batch.map(|id| id.to_string())),
        ("made", Some(format!("{} ({})", time(batch.created_at), ago(batch.created_at)))),
        ("sealed", batch.sealed_at.map(time)),
        ("cancelled", batch.cancelled_at.map(time)),
        ("finished", batch.finished_at.map(time)),
        ("took", batch.finished_at.and_then(|end| between(batch.created_at, end)).map(span)),
    ])
}

async fn cancel(id: BatchId, context: &Context) -> Outcome {
    let client = super::enqueue::client(context).await?;
    let (word, sentence, good) = match client.cancel_batch(id, None).await? {
        BatchChanged::Done => {
            ("requested", "its unfinished jobs are cancelled, once their effects are undone", true)
        }
        BatchChanged::Finished => ("finished", "all its jobs have ended already", false),
        BatchChanged::Unknown => return Err(unknown(id).into()),
    };
    if good {
        client.postgres().record_action(&actor(), "batches.cancel", &id.to_string(), &json!({})).await?;
    }
    context.out.data(&json!({ "batch": id, "cancel": word }), || format!("batch {id}: {sentence}"))?;
    Ok(Ending::fine_if(good))
}

fn unknown(id: BatchId) -> Refused {
    Refused(format!("the ledger doesn't know batch {id} (finished batches are kept as long as their jobs)"))
}
