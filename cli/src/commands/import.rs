//! `flotilla import`: an ingest job for each file of a folder, or each line of a JSONL file.

mod glob;
mod progress;
mod source;

use std::{
    collections::VecDeque,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use producer::{Client, Durability, EnqueueError, Idempotency, NewJob, Receipt, Until, new_job};
use queue::{Priority, QueueName, TenantId};
use serde::Serialize;
use sha2::{Digest, Sha256};
use tracing::Instrument as _;
use uuid::Uuid;

use self::{
    progress::Progress,
    source::{Item, Source},
};
use super::{enqueue, migrate::DEFAULT_TENANT};
use crate::{
    context::Context,
    failure::{Ending, Outcome},
    output::{self, short},
};

/// Refused documents that are named one by one.
const NAMED: usize = 20;
/// How long an unreachable ledger or a full queue may hold the import up without any progress.
const HELD_UP_AT_MOST: Duration = Duration::from_secs(120);
/// Unfinished jobs asked for at once, and how often.
const ASKED: usize = 2000;
const ASK_EVERY: Duration = Duration::from_millis(300);
/// Bytes of text in one batch, well below what a client accepts.
const BATCH_BYTES: usize = 8 * 1024 * 1024;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// A folder of text files, or a file of ingest payloads, one JSON object a line
    #[arg(value_name = "DIR|FILE.jsonl")]
    path: PathBuf,
    /// Whose documents
    #[arg(long, env = "FLOTILLA_TENANT", default_value = DEFAULT_TENANT)]
    tenant: TenantId,
    /// 0 to 9; 9 is served first
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u8).range(0..=9))]
    priority: u8,
    /// Where the jobs wait [default: ingest]
    #[arg(long)]
    queue: Option<QueueName>,
    /// File name extensions to take, such as md,txt; `*` takes every file [default: those of texts]
    #[arg(long, value_delimiter = ',', value_name = "EXT")]
    ext: Vec<String>,
    /// Only paths that match, such as `guides/**` or `*.md`: * stands for anything but /, ** for anything
    #[arg(long, value_name = "PATTERN")]
    glob: Option<String>,
    /// Put this before each document's name, which is its path within the folder
    #[arg(long, default_value = "", hide_default_value = true, value_name = "TEXT")]
    prefix: String,
    /// Documents at most
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Documents enqueued in one transaction
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u16).range(1..=1000))]
    batch: u16,
    /// Accept the same content of the same document once within 24 hours, so that an import can be run again
    #[arg(long)]
    once: bool,
    /// Wait until all jobs have ended, at most so many seconds (a day without a number)
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, require_equals = true, default_missing_value = "86400")]
    wait: Option<u64>,
}

/// How an import went.
#[derive(Debug, Default, Serialize)]
struct Summary {
    /// Documents that were read or failed to be.
    found: usize,
    /// Files that were left out for their name.
    skipped: usize,
    accepted: usize,
    duplicates: usize,
    refused: Vec<Refusal>,
    enqueue_seconds: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    ended: Option<Ended>,
}

#[derive(Debug, Serialize)]
struct Refusal {
    document: String,
    error: String,
}

/// How the accepted jobs ended, as far as was waited for.
#[derive(Debug, Clone, Copy, Default, Serialize)]
struct Ended {
    succeeded: usize,
    dead: usize,
    cancelled: usize,
    parked: usize,
    unfinished: usize,
    seconds: f64,
    documents_per_second: f64,
}

pub async fn run(args: Args, context: &Context) -> Outcome {
    let span = tracing::info_span!("import", path = %args.path.display(), tenant = %args.tenant);
    Box::pin(import(args, context)).instrument(span).await
}

async fn import(args: Args, context: &Context) -> Outcome {
    let client = enqueue::client(context).await?;
    if client.postgres().tenant(args.tenant.as_str()).await?.is_none() {
        return Err(super::tenants::unknown(&args.tenant).into());
    }
    let selection = source::Selection {
        path: args.path.clone(),
        ext: args.ext.clone(),
        glob: args.glob.clone(),
        prefix: args.prefix.clone(),
        limit: args.limit.unwrap_or(usize::MAX),
        max_bytes: client.settings().max_payload as u64,
    };
    let source =
        tokio::task::spawn_blocking(move || Source::open(&selection)).await.context("reading ended")??;
    let mut summary = Summary { skipped: source.skipped(), ..Summary::default() };
    let begun = Instant::now();
    let mut jobs = take_in(source, &args, &client, &mut summary).await?;
    summary.enqueue_seconds = begun.elapsed().as_secs_f64();
    // A document that was in there twice, or an import that was run again, gives the same job twice.
    jobs.sort_unstable();
    jobs.dedup();
    if let Some(seconds) = args.wait {
        summary.ended = Some(follow(&jobs, begun, Duration::from_secs(seconds), &client).await?);
    }
    context.out.data(&summary, || described(&summary))?;
    advise(&summary, args.wait.is_some(), &args.tenant);
    let not_done =
        summary.ended.map_or(0, |ended| ended.dead + ended.parked + ended.cancelled + ended.unfinished);
    Ok(Ending::fine_if(summary.refused.is_empty() && not_done == 0))
}

/// Reads and enqueues everything; returns the jobs.
async fn take_in(
    source: Source,
    args: &Args,
    client: &Client,
    summary: &mut Summary,
) -> anyhow::Result<Vec<Uuid>> {
    let bar = Progress::new(source.len() as u64, "enqueued");
    // Reading goes on while a batch is being accepted.
    let (send, mut batches) = tokio::sync::mpsc::channel::<Vec<Item>>(2);
    let size = usize::from(args.batch);
    let reading = tokio::task::spawn_blocking(move || {
        let mut batch = Vec::with_capacity(size);
        let mut bytes = 0;
        for item in source {
            bytes += item.bytes();
            batch.push(item);
            if batch.len() >= size || bytes >= BATCH_BYTES {
                bytes = 0;
                if send.blocking_send(std::mem::take(&mut batch)).is_err() {
                    return;
                }
            }
        }
        if !batch.is_empty() && send.blocking_send(batch).is_err() {
            tracing::debug!("the import ended early");
        }
    });
    let mut jobs = vec![];
    while let Some(batch) = batches.recv().await {
        let count = batch.len();
        summary.found += count;
        jobs.extend(enqueue_batch(batch, args, client, summary).await?);
        bar.advance(count as u64, || format!("{} refused", summary.refused.len()));
    }
    reading.await.context("reading ended")?;
    bar.finish();
    Ok(jobs)
}

/// Enqueues one batch. Waits while the ledger is away or the queue is full.
async fn enqueue_batch(
    batch: Vec<Item>,
    args: &Args,
    client: &Client,
    summary: &mut Summary,
) -> anyhow::Result<Vec<Uuid>> {
    let mut waiting: VecDeque<(String, NewJob)> = VecDeque::with_capacity(batch.len());
    for item in batch {
        match item.payload.map_err(|error| error.to_string()).and_then(|payload| job(payload, args, client)) {
            Ok(job) => waiting.push_back((item.document, job)),
            Err(error) => summary.refused.push(Refusal { document: item.document, error }),
        }
    }
    let mut accepted = Vec::with_capacity(waiting.len());
    let mut held_up_since: Option<Instant> = None;
    while !waiting.is_empty() {
        let batch: Vec<NewJob> = waiting.iter().map(|(_, job)| job.clone()).collect();
        let outcomes = match client.enqueue_many(batch, Durability::Durable).await {
            Ok(outcomes) => outcomes,
            Err(error) if error.retry_after().is_some() => {
                waiting.iter().map(|_| Err(error.clone())).collect()
            }
            Err(error) => bail!(error),
        };
        let before = accepted.len() + summary.refused.len();
        let mut later = None;
        for outcome in outcomes {
            let Some((document, job)) = waiting.pop_front() else { break };
            match outcome {
                Ok(receipt) => accepted.push(count(receipt, summary)),
                Err(error @ EnqueueError::UnknownTenant) => {
                    return Err(enqueue::explained(error, &args.tenant));
                }
                Err(error) if error.retry_after().is_some() => {
                    waiting.push_back((document, job));
                    later = Some(error);
                }
                Err(error) => summary.refused.push(Refusal { document, error: error.to_string() }),
            }
        }
        if let Some(error) = later {
            let since = if accepted.len() + summary.refused.len() > before {
                Instant::now()
            } else {
                held_up_since.unwrap_or_else(Instant::now)
            };
            held_up_since = Some(since);
            if since.elapsed() > HELD_UP_AT_MOST {
                return Err(error).with_context(|| {
                    format!(
                        "{} documents were accepted, then nothing for {HELD_UP_AT_MOST:?}",
                        summary.accepted
                    )
                });
            }
            tracing::debug!(%error, "the import waits");
            tokio::time::sleep(error.retry_after().unwrap_or_default()).await;
        }
    }
    Ok(accepted)
}

fn count(receipt: Receipt, summary: &mut Summary) -> Uuid {
    if receipt.duplicate {
        summary.duplicates += 1;
    } else {
        summary.accepted += 1;
    }
    receipt.id.0
}

fn job(payload: serde_json::Value, args: &Args, client: &Client) -> Result<NewJob, String> {
    let fingerprint = args.once.then(|| Sha256::digest(payload.to_string().as_bytes()));
    let mut job = new_job("ingest", args.tenant.clone(), payload).map_err(|error| error.to_string())?;
    if let Some(queue) = &args.queue {
        job.queue = queue.clone();
    }
    job.priority = Priority::try_from(args.priority).map_err(|error| error.to_string())?;
    job.trace = telemetry::current_trace();
    job.idempotency = fingerprint.map(|hash| Idempotency {
        key: hash.iter().fold(String::new(), |text, byte| format!("{text}{byte:02x}")),
        scope: "import".to_owned(),
        ttl: client.settings().idempotency_ttl,
        until: Until::Accepted,
    });
    Ok(job)
}

/// Follows the jobs in the ledger until all have ended or the time is over.
async fn follow(jobs: &[Uuid], begun: Instant, limit: Duration, client: &Client) -> anyhow::Result<Ended> {
    let bar = Progress::new(jobs.len() as u64, "ended");
    let deadline = Instant::now() + limit;
    let mut unfinished: VecDeque<Uuid> = jobs.iter().copied().collect();
    let mut ended = Ended::default();
    let mut held_up_since: Option<Instant> = None;
    while !unfinished.is_empty() && Instant::now() < deadline {
        let round = unfinished.len();
        let mut looked = 0;
        while looked < round {
            let page: Vec<Uuid> = unfinished.drain(..ASKED.min(round - looked)).collect();
            looked += page.len();
            let states = match client.postgres().job_states(&page).await {
                Ok(states) => states,
                Err(error) if error.is_unavailable() => {
                    let since = *held_up_since.get_or_insert_with(Instant::now);
                    if since.elapsed() > HELD_UP_AT_MOST {
                        return Err(error)
                            .context("the jobs are accepted, and the ledger can't be asked how they end");
                    }
                    unfinished.extend(page);
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            held_up_since = None;
            let before = unfinished.len();
            for (id, state) in states {
                match state.as_str() {
                    "succeeded" => ended.succeeded += 1,
                    "dead" => ended.dead += 1,
                    "cancelled" => ended.cancelled += 1,
                    "parked" => ended.parked += 1,
                    _ => unfinished.push_back(id),
                }
            }
            let done = page.len() - (unfinished.len() - before);
            ended.unfinished = unfinished.len();
            bar.advance(done as u64, || format!("{} succeeded, {} dead", ended.succeeded, ended.dead));
        }
        if !unfinished.is_empty() {
            tokio::time::sleep(ASK_EVERY.min(deadline.saturating_duration_since(Instant::now()))).await;
        }
    }
    bar.finish();
    ended.unfinished = unfinished.len();
    ended.seconds = begun.elapsed().as_secs_f64();
    ended.documents_per_second = (jobs.len() - unfinished.len()) as f64 / ended.seconds.max(1e-9);
    Ok(ended)
}

fn described(summary: &Summary) -> String {
    let mut pairs = vec![
        ("found", Some(summary.found.to_string())),
        ("accepted", Some(summary.accepted.to_string())),
        ("duplicates", (summary.duplicates > 0).then(|| summary.duplicates.to_string())),
        ("refused", (!summary.refused.is_empty()).then(|| summary.refused.len().to_string())),
        ("enqueued in", Some(format!("{:.1} s", summary.enqueue_seconds))),
    ];
    if let Some(ended) = summary.ended {
        let some = |count: usize| (count > 0).then(|| count.to_string());
        pairs.extend([
            ("succeeded", Some(ended.succeeded.to_string())),
            ("dead", some(ended.dead)),
            ("cancelled", some(ended.cancelled)),
            ("parked", some(ended.parked)),
            ("unfinished", some(ended.unfinished)),
            (
                "ended in",
                Some(format!("{:.1} s, {:.1} documents/s", ended.seconds, ended.documents_per_second)),
            ),
        ]);
    }
    output::fields(&pairs)
}

/// Says what the person may want to do next.
fn advise(summary: &Summary, waited: bool, tenant: &TenantId) {
    if summary.found == 0 {
        output::say("nothing was found: --ext and --glob say which files are taken");
    }
    if summary.skipped > 0 {
        let left = output::counted(summary.skipped, "file");
        output::say(format!("{left} left out for the name; --ext '*' takes every file"));
    }
    for refusal in summary.refused.iter().take(NAMED) {
        output::say(format!("refused: {}: {}", refusal.document, short(&refusal.error, 300)));
    }
    if summary.refused.len() > NAMED {
        output::say(format!("refused: {} more; --json names all", summary.refused.len() - NAMED));
    }
    match summary.ended {
        Some(ended) if ended.dead > 0 => {
            output::say(format!("see why with `flotilla dlq list --tenant {tenant}`"));
        }
        Some(ended) if ended.unfinished > 0 => {
            output::say("not all jobs have ended: is a worker running? See `flotilla stats`");
        }
        None if !waited && summary.accepted > 0 => output::say("follow them with `flotilla stats --watch`"),
        _ => {}
    }
}
