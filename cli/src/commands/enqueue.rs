//! `flotilla enqueue`: one job.

use std::{io::Read, time::Duration};

use anyhow::{Context as _, bail};
use chrono::{DateTime, Utc};
use clap::ValueEnum;
use producer::{
    Client, ClientSettings, Durability, EnqueueError, Idempotency, JobView, Until, WaitError, new_job,
};
use queue::{Priority, QueueName, TenantId};
use serde::Serialize;
use serde_json::{Value, json};
use tracing::Instrument as _;

use super::{migrate::DEFAULT_TENANT, tenants};
use crate::{
    context::Context,
    failure::{Ending, Outcome, Refused},
    output::{self, between, span},
};

/// Scope of the keys that commands give; those of the HTTP API never meet them.
const SCOPE: &str = "cli";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// ingest, embed, delete, or a kind that your own workers know
    kind: String,
    /// The request: JSON, @FILE, or - for stdin
    #[arg(long, value_name = "JSON")]
    payload: String,
    /// Whose job it is
    #[arg(long, env = "FLOTILLA_TENANT", default_value = DEFAULT_TENANT)]
    tenant: TenantId,
    /// 0 to 9; 9 is served first
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u8).range(0..=9))]
    priority: u8,
    /// Where it waits; the kind's own queue if absent
    #[arg(long)]
    queue: Option<QueueName>,
    /// Not before this time, such as 2026-01-31T09:00:00Z; or +SECONDS from now
    #[arg(long, value_name = "TIME", value_parser = read_time)]
    run_at: Option<DateTime<Utc>>,
    /// Accept the same request under this key once within 24 hours
    #[arg(long, value_name = "KEY")]
    idempotency_key: Option<String>,
    /// What the key's time is counted from: acceptance, or the job's end; until then it is held
    #[arg(long, value_enum, default_value_t = UntilArg::Accepted, requires = "idempotency_key")]
    idempotency_until: UntilArg,
    /// How long the key is remembered, in seconds [default: 86400]
    #[arg(long, value_name = "SECONDS", requires = "idempotency_key")]
    idempotency_ttl: Option<u64>,
    /// Charged failures after which the job is dead
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(i32).range(1..=1000))]
    max_attempts: i32,
    /// Hard cap on one run, in seconds
    #[arg(long, default_value_t = 300, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=604_800))]
    timeout: u64,
    /// `fast` is in Redis alone until a worker claims it, and is lost with Redis' data; a job on a document is durable all the
    /// same
    #[arg(long, value_enum, default_value_t = DurabilityArg::Durable)]
    durability: DurabilityArg,
    /// Wait until the job has ended, at most so many seconds (300 without a number); exit code 1 unless it succeeded
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, require_equals = true, default_missing_value = "300")]
    wait: Option<u64>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum UntilArg {
    Accepted,
    Finished,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum DurabilityArg {
    Durable,
    Fast,
}

/// What is printed.
#[derive(Debug, Serialize)]
struct Answer {
    id: queue::JobId,
    duplicate: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    job: Option<JobView>,
}

pub async fn run(args: Args, context: &Context) -> Outcome {
    let span = tracing::info_span!("enqueue", kind = args.kind, tenant = %args.tenant);
    Box::pin(enqueue(args, context)).instrument(span).await
}

async fn enqueue(args: Args, context: &Context) -> Outcome {
    let client = client(context).await?;
    let payload = read_payload(&args.payload)?;
    let mut job = match &args.queue {
        None => new_job(&args.kind, args.tenant.clone(), payload)?,
        Some(queue) => producer::NewJob::new(&args.kind, queue.clone(), args.tenant.clone(), payload),
    };
    job.priority = Priority::try_from(args.priority)?;
    job.run_at = args.run_at;
    job.max_attempts = args.max_attempts;
    job.timeout = Duration::from_secs(args.timeout);
    job.idempotency = args.idempotency_key.map(|key| Idempotency {
        key,
        scope: SCOPE.to_owned(),
        ttl: args.idempotency_ttl.map_or(client.settings().idempotency_ttl, Duration::from_secs),
        until: match args.idempotency_until {
            UntilArg::Accepted => Until::Accepted,
            UntilArg::Finished => Until::Finished,
        },
    });
    job.trace = telemetry::current_trace();
    let durability = match args.durability {
        DurabilityArg::Durable => Durability::Durable,
        DurabilityArg::Fast => Durability::Fast,
    };
    let receipt = client.enqueue(job, durability).await.map_err(|error| explained(error, &args.tenant))?;
    if receipt.duplicate {
        output::say("the same request was accepted before");
    }
    let mut answer =
        Answer { id: receipt.id, duplicate: receipt.duplicate, job: receipt.job.map(|job| *job) };
    let Some(seconds) = args.wait else {
        context.out.data(&answer, || match answer.job.as_ref().filter(|job| job.finished_at.is_some()) {
            Some(job) => ended(job),
            None => receipt.id.to_string(),
        })?;
        return Ok(Ending::Fine);
    };
    match client.wait(receipt.id, Duration::from_secs(seconds)).await {
        Ok(job) => {
            let good = job.state == "succeeded";
            answer.job = Some(job);
            context.out.data(&answer, || answer.job.as_ref().map(ended).unwrap_or_default())?;
            if !good {
                output::say(format!("see `flotilla jobs show {0}` and `flotilla dlq show {0}`", receipt.id));
            }
            Ok(Ending::fine_if(good))
        }
        Err(error @ WaitError::Unavailable { .. }) => Err(error.into()),
        Err(error) => {
            context.out.data(&answer, || receipt.id.to_string())?;
            Err(Refused(format!("{error}: is a worker running that serves its queue?")).into())
        }
    }
}

fn ended(job: &JobView) -> String {
    let took = job.finished_at.and_then(|end| between(job.created_at, end)).map(span).unwrap_or_default();
    let how = job.outcome.as_ref().map_or(String::new(), |outcome| format!(" ({outcome})"));
    let more = match (&job.result, &job.last_error) {
        (_, Some(error)) if job.state != "succeeded" => format!(": {error}"),
        (Some(result), _) => format!(": {result}"),
        _ => String::new(),
    };
    format!("{} {}{how} after {took}{more}", job.id, job.state)
}

/// A client over the ledger and the queue. A queue that is down is left to the relay: the ledger is enough.
pub async fn client(context: &Context) -> anyhow::Result<Client> {
    let postgres = context.postgres().await?;
    let settings = ClientSettings::from_lookup(|name| context.settings.get(name))?;
    let queue = context.dispatcher(&postgres).await?;
    Ok(Client::new(postgres, queue, settings))
}

/// The error of an enqueue, with what to do about it; what is the request's own fault is exit code 1.
pub fn explained(error: EnqueueError, tenant: &TenantId) -> anyhow::Error {
    match error {
        EnqueueError::UnknownTenant => tenants::unknown(tenant).into(),
        EnqueueError::BadRequest { .. } | EnqueueError::TooLarge { .. } | EnqueueError::Conflict { .. } => {
            Refused(error.to_string()).into()
        }
        other => other.into(),
    }
}

/// Reads a payload: JSON, `@FILE`, or `-` for stdin.
pub fn read_payload(given: &str) -> anyhow::Result<Value> {
    let (text, source) = match given.strip_prefix('@') {
        Some(path) => (std::fs::read_to_string(path).with_context(|| format!("can't read {path}"))?, path),
        None if given == "-" => {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).context("can't read stdin")?;
            (text, "stdin")
        }
        None => (given.to_owned(), "--payload"),
    };
    let value: Value = serde_json::from_str(&text).with_context(|| format!("{source} is no JSON"))?;
    if !value.is_object() {
        bail!("{source} must be a JSON object, such as {}", json!({ "document": "a.md", "text": "…" }));
    }
    Ok(value)
}

/// A time, or `+SECONDS` from now.
fn read_time(text: &str) -> Result<DateTime<Utc>, String> {
    if let Some(seconds) = text.strip_prefix('+') {
        let seconds: u32 =
            seconds.parse().map_err(|_| format!("{text:?}: after + a whole number of seconds is needed"))?;
        return Ok(Utc::now() + Duration::from_secs(seconds.into()));
    }
    DateTime::parse_from_rfc3339(text)
        .map(|time| time.with_timezone(&Utc))
        .map_err(|error| format!("{error}; write it like 2026-01-31T09:00:00Z, or +60 for a minute from now"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn times_are_absolute_or_relative() {
        assert_eq!(read_time("2026-01-31T10:00:00+01:00").unwrap().to_rfc3339(), "2026-01-31T09:00:00+00:00");
        let soon = read_time("+60").unwrap() - Utc::now();
        assert!((55..=60).contains(&soon.num_seconds()), "{soon}");
        assert!(read_time("tomorrow").unwrap_err().contains("+60 for a minute"));
    }

    #[test]
    fn a_payload_that_is_no_object_is_refused_with_an_example() {
        assert!(read_payload("[1]").unwrap_err().to_string().contains("must be a JSON object"));
        assert!(format!("{:#}", read_payload("{").unwrap_err()).contains("--payload is no JSON"));
        assert_eq!(read_payload(r#"{"a":1}"#).unwrap(), json!({"a": 1}));
    }
}
