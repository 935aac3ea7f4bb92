//! Jobs accepted per second.

use std::time::{Duration, Instant};

use anyhow::anyhow;
use devstack::Service;
use futures::{StreamExt, TryStreamExt, stream};
use producer::{Client, ClientSettings, Durability, NewJob};
use queue::{QueueName, TenantId};
use serde_json::{Value, json};
use sqlx::PgPool;
use uuid::Uuid;

use super::{Figure, Report, sandbox::Sandbox, texts::text};
use crate::context::Context;

/// Callers at once of the one-by-one figure, and connections to Postgres for both sides.
const CALLERS: usize = 32;
/// Jobs of one batch.
const BATCH: usize = 100;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Jobs for each figure
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(100..=40_000))]
    pub(super) jobs: u32,
}

pub async fn measure(args: Args, context: &Context) -> anyhow::Result<Report> {
    let settings = [("FLOTILLA_POSTGRES_CONNECTIONS", CALLERS.to_string())];
    let services = [Service::Postgres, Service::RedisQueue];
    let results = Sandbox::with(&services, &settings, context, |context| async move {
        let postgres = context.postgres().await?;
        postgres.create_tenant("bench").await?;
        let client = Client::new(postgres.clone(), Some(context.queue().await?), ClientSettings::default());
        let jobs = args.jobs as usize;
        let plain = Plain::prepare(postgres.pool()).await?;

        let (rate, times) = one_by_one(jobs, |number| {
            let client = client.clone();
            async move {
                client.enqueue(job(number)?, Durability::Durable).await?;
                Ok(())
            }
        })
        .await?;
        let (reference, _) = one_by_one(jobs, |number| {
            let plain = plain.clone();
            async move { plain.insert(&[payload(number)]).await }
        })
        .await?;
        let name = format!("one INSERT a commit, {CALLERS} connections, no queue");
        let single = Figure::new("enqueue.single", "jobs/s", rate, times, (name, reference));

        let (rate, times) = in_batches(jobs, |numbers| {
            let client = client.clone();
            async move {
                let batch: Vec<NewJob> = numbers.map(job).collect::<Result<_, _>>()?;
                for outcome in client.enqueue_many(batch, Durability::Durable).await? {
                    outcome?;
                }
                Ok(())
            }
        })
        .await?;
        let (same, _) = in_batches(jobs, |numbers| {
            let plain = plain.clone();
            async move { plain.insert_jobs(&numbers.map(payload).collect::<Vec<_>>()).await }
        })
        .await?;
        let (reference, _) = in_batches(jobs, |numbers| {
            let plain = plain.clone();
            async move { plain.insert(&numbers.map(payload).collect::<Vec<_>>()).await }
        })
        .await?;
        let name =
            |table: &str| format!("{BATCH} rows an INSERT and commit into {table}, one connection, no queue");
        let same = (name("the ledger's table"), same);
        let batched = Figure::new("enqueue.batched", "jobs/s", rate, times.clone(), same);
        let bare = Figure::new(
            "enqueue.batched.bare",
            "jobs/s",
            rate,
            times,
            (name("a table of id and payload"), reference),
        );
        Ok(vec![single, batched, bare])
    })
    .await?;
    Ok(Report { bench: "enqueue".into(), results })
}

fn payload(number: u64) -> Value {
    json!({ "number": number, "text": text(number, 100) })
}

fn job(number: u64) -> anyhow::Result<NewJob> {
    let name = |error: &dyn std::fmt::Display| anyhow!("{error}");
    let queue = QueueName::new("bench").map_err(|e| name(&e))?;
    let tenant = TenantId::new("bench").map_err(|e| name(&e))?;
    Ok(NewJob::new("bench", queue, tenant, payload(number)))
}

async fn one_by_one<F>(jobs: usize, call: impl Fn(u64) -> F) -> anyhow::Result<(f64, Vec<Duration>)>
where
    F: Future<Output = anyhow::Result<()>>,
{
    let begun = Instant::now();
    let times: Vec<Duration> = stream::iter(0..jobs as u64)
        .map(|number| timed(call(number)))
        .buffer_unordered(CALLERS)
        .try_collect()
        .await?;
    Ok((jobs as f64 / begun.elapsed().as_secs_f64(), times))
}

async fn in_batches<F>(
    jobs: usize,
    call: impl Fn(std::ops::Range<u64>) -> F,
) -> anyhow::Result<(f64, Vec<Duration>)>
where
    F: Future<Output = anyhow::Result<()>>,
{
    let begun = Instant::now();
    let mut times = vec![];
    for first in (0..jobs as u64).step_by(BATCH) {
        times.push(timed(call(first..(first + BATCH as u64).min(jobs as u64))).await?);
    }
    Ok((jobs as f64 / begun.elapsed().as_secs_f64(), times))
}

async fn timed(call: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<Duration> {
    let begun = Instant::now();
    call.await?;
    Ok(begun.elapsed())
}

/// What a service would do without a ledger: insert rows into a table of its own.
#[derive(Clone)]
struct Plain(PgPool);

impl Plain {
    async fn prepare(pool: &PgPool) -> anyhow::Result<Self> {
        sqlx::query("CREATE TABLE public.plain (id uuid PRIMARY KEY, payload jsonb NOT NULL)")
            .execute(pool)
            .await?;
        Ok(Self(pool.clone()))
    }

    /// The rows that an enqueue makes, with all their indexes, and nothing else.
    async fn insert_jobs(&self, payloads: &[Value]) -> anyhow::Result<()> {
        sqlx::query(
            "INSERT INTO flotilla.jobs (id, kind, queue, priority, tenant, payload, timeout_ms, dispatched_at)
             SELECT id, 'bench', 'bench', 5, 'bench', payload, 300000, now() FROM unnest($1::uuid[], $2::jsonb[]) AS j (id, payload)",
        )
        .bind(payloads.iter().map(|_| Uuid::now_v7()).collect::<Vec<_>>())
        .bind(payloads)
        .execute(&self.0)
        .await?;
        Ok(())
    }

    async fn insert(&self, payloads: &[Value]) -> anyhow::Result<()> {
        sqlx::query("INSERT INTO public.plain SELECT * FROM unnest($1::uuid[], $2::jsonb[])")
            .bind(payloads.iter().map(|_| Uuid::now_v7()).collect::<Vec<_>>())
            .bind(payloads)
            .execute(&self.0)
            .await?;
        Ok(())
    }
}
