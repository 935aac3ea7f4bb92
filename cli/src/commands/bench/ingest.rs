//! Documents per second through worker processes.

use std::{
    process::Stdio,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, anyhow, bail};
use devstack::Service;
use embedding::Embedder;
use futures::{StreamExt, TryStreamExt, stream};
use producer::{Client, ClientSettings, Durability, NewJob, new_job};
use qdrant_client::{
    Qdrant,
    qdrant::{CreateCollectionBuilder, Distance, PointStruct, UpsertPointsBuilder, VectorParamsBuilder},
};
use queue::TenantId;
use sagas::stores::postgres::{Postgres, inspect::JobFilter};
use serde_json::json;
use sqlx::PgPool;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    process::{Child, Command},
};
use uuid::Uuid;

use super::{Figure, Provider, Report, sandbox::Sandbox, texts::text};
use crate::{context::Context, output};

/// Documents under way at once in the plain loop.
const IN_FLIGHT: usize = 16;
/// The same in a worker: sagas that run side by side share their calls.
pub(super) const CONCURRENCY: u16 = 256;
/// How long the workers may take to be ready, and the whole run to end.
const READY_WITHIN: Duration = Duration::from_secs(60);
const ENDED_WITHIN: Duration = Duration::from_secs(600);
/// How often the ledger is asked how far the fleet is.
const ASK_EVERY: Duration = Duration::from_millis(50);
const TENANT: &str = "bench";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Documents to ingest
    #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(u32).range(1..=50_000))]
    pub(super) documents: u32,
    /// Words of a document; up to about 150 make one chunk
    #[arg(long, default_value_t = 120, value_parser = clap::value_parser!(u16).range(1..=5000))]
    pub(super) words: u16,
    /// Embedding provider
    #[arg(long, value_enum, default_value_t = Provider::Hash)]
    pub(super) embedder: Provider,
    /// Worker processes
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=16))]
    pub(super) workers: u8,
    /// Documents under way at once in each
    #[arg(long, default_value_t = CONCURRENCY, value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub(super) concurrency: u16,
}

pub async fn measure(args: Args, context: &Context) -> anyhow::Result<Report> {
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let settings = [
        ("FLOTILLA_EMBEDDER", args.embedder.name().to_owned()),
        ("FLOTILLA_POSTGRES_CONNECTIONS", IN_FLIGHT.to_string()),
    ];
    let results = Sandbox::with(&Service::ALL, &settings, context, |context| async move {
        let per_worker = (threads / usize::from(args.workers)).max(1);
        let (rate, times) = fleet(&args, per_worker, &context).await?;
        output::say("running the plain loop");
        let reference = plain_loop(&args, &context).await?;
        let name = format!("a plain loop, {IN_FLIGHT} in flight: embed, INSERT, upsert, SET; no saga");
        let figure = format!("ingest.{}.{}-workers", args.embedder.name(), args.workers);
        Ok(vec![Figure::new(figure, "documents/s", rate, times, (name, reference))])
    })
    .await?;
    Ok(Report { bench: "ingest".into(), results })
}

/// Documents per second of the fleet from the first enqueue to the last end, and each job's time in its worker.
async fn fleet(args: &Args, threads: usize, context: &Context) -> anyhow::Result<(f64, Vec<Duration>)> {
    let postgres = context.postgres().await?;
    postgres.create_tenant(TENANT).await?;
    let client = Client::new(postgres.clone(), Some(context.queue().await?), ClientSettings::default());
    output::say(format!("starting {} workers", args.workers));
    let mut workers = vec![];
    for _ in 0..args.workers {
        workers.push(start_worker(args, threads, context).await?);
    }
    let documents = args.documents as usize;
    output::say(format!("ingesting {documents} documents"));
    let begun = Instant::now();
    for first in (0..documents).step_by(500) {
        let batch: Vec<NewJob> = (first..(first + 500).min(documents))
            .map(|number| job(number as u64, args))
            .collect::<Result<_, _>>()?;
        for outcome in client.enqueue_many(batch, Durability::Durable).await? {
            outcome?;
        }
    }
    wait_for_end(&postgres, begun, &mut workers).await?;
    let rate = documents as f64 / begun.elapsed().as_secs_f64();
    for worker in &mut workers {
        worker.kill().await.context("a worker can't be ended")?;
    }
    Ok((rate, times_in_worker(&postgres).await?))
}

fn job(number: u64, args: &Args) -> anyhow::Result<NewJob> {
    let tenant = TenantId::new(TENANT).map_err(|error| anyhow!("{error}"))?;
    let payload = json!({ "document": format!("bench/{number}"), "text": text(number, args.words.into()) });
    Ok(new_job("ingest", tenant, payload)?)
}

async fn wait_for_end(postgres: &Postgres, begun: Instant, workers: &mut [Child]) -> anyhow::Result<()> {
    loop {
        let counts = postgres.job_counts(None).await?;
        if counts.dead + counts.parked + counts.cancelled > 0 {
            bail!("{} jobs did not succeed: {counts:?}", counts.dead + counts.parked + counts.cancelled);
        }
        if counts.waiting + counts.running == 0 {
            return Ok(());
        }
        for worker in &mut *workers {
            if let Some(status) = worker.try_wait()? {
                bail!("a worker ended early ({status})");
            }
        }
        if begun.elapsed() > ENDED_WITHIN {
            bail!("not done within {ENDED_WITHIN:?}: {counts:?}");
        }
        tokio::time::sleep(ASK_EVERY).await;
    }
}

async fn times_in_worker(postgres: &Postgres) -> anyhow::Result<Vec<Duration>> {
    let mut times = vec![];
    let mut before = None;
    loop {
        let page = postgres.jobs(&JobFilter { before, limit: 5000, ..JobFilter::default() }).await?;
        let Some(last) = page.last() else { return Ok(times) };
        before = Some(last.id);
        times.extend(page.iter().filter_map(|job| output::between(job.taken_at?, job.finished_at?)));
    }
}

/// A worker process of this same program that is ready. It ends with its handle.
async fn start_worker(args: &Args, threads: usize, context: &Context) -> anyhow::Result<Child> {
    let free = TcpListener::bind("127.0.0.1:0").await?;
    let addr = free.local_addr()?;
    drop(free);
    let names = [
        "DATABASE_URL",
        "REDIS_QUEUE_URL",
        "REDIS_CACHE_URL",
        "QDRANT_URL",
        "FLOTILLA_PREFIX",
        "FLOTILLA_EMBEDDER",
        "FLOTILLA_MODEL_DIR",
    ];
    let mut worker = Command::new(std::env::current_exe()?)
        .args(["worker", "--queues", "ingest", "--concurrency", &args.concurrency.to_string()])
        .envs(names.into_iter().filter_map(|name| Some((name, context.settings.get(name)?))))
        .env("FLOTILLA_WORKER_ADDR", addr.to_string())
        .env("FLOTILLA_EMBEDDER_THREADS", threads.to_string())
        .env("FLOTILLA_LOG", std::env::var("FLOTILLA_LOG").unwrap_or_else(|_| "warn".to_owned()))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .context("a worker can't be started")?;
    let deadline = Instant::now() + READY_WITHIN;
    while !is_ready(addr).await {
        if let Some(status) = worker.try_wait()? {
            bail!("a worker ended before it was ready ({status})");
        }
        if Instant::now() > deadline {
            bail!("a worker was not ready within {READY_WITHIN:?}");
        }
        tokio::time::sleep(ASK_EVERY).await;
    }
    Ok(worker)
}

async fn is_ready(addr: std::net::SocketAddr) -> bool {
    let ask = async {
        let mut stream = TcpStream::connect(addr).await?;
        stream.write_all(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok::<bool, std::io::Error>(answer.starts_with("HTTP/1.1 200"))
    };
    matches!(tokio::time::timeout(Duration::from_secs(2), ask).await, Ok(Ok(true)))
}

/// The same writes without a saga: no log, no staging, no publishing in one step, nothing to resume from.
async fn plain_loop(args: &Args, context: &Context) -> anyhow::Result<f64> {
    const COLLECTION: &str = "plain";
    let embedder: Arc<dyn Embedder> = args.embedder.open(context)?;
    let pool: PgPool = context.postgres().await?.pool().clone();
    sqlx::query(
        "CREATE TABLE public.plain (id uuid PRIMARY KEY, key text NOT NULL UNIQUE, body text NOT NULL)",
    )
    .execute(&pool)
    .await?;
    let qdrant = Qdrant::from_url(&context.settings.require("QDRANT_URL")?).build()?;
    let vectors = VectorParamsBuilder::new(embedder.dimensions() as u64, Distance::Cosine);
    qdrant.create_collection(CreateCollectionBuilder::new(COLLECTION).vectors_config(vectors)).await?;
    let redis = redis::Client::open(context.settings.require("REDIS_CACHE_URL")?)?;
    let redis = redis.get_multiplexed_async_connection().await?;

    let begun = Instant::now();
    stream::iter(0..u64::from(args.documents))
        .map(|number| {
            let (embedder, pool, qdrant, mut redis) = (&embedder, &pool, &qdrant, redis.clone());
            async move {
                let (id, key, body) =
                    (Uuid::now_v7(), format!("plain/{number}"), text(number, args.words.into()));
                let vector =
                    embedder.embed(vec![body.clone()]).await?.pop().context("no vector came back")?;
                sqlx::query("INSERT INTO public.plain VALUES ($1, $2, $3)")
                    .bind(id)
                    .bind(&key)
                    .bind(&body)
                    .execute(pool)
                    .await?;
                let point = PointStruct::new(id.to_string(), vector, [("key", key.clone().into())]);
                qdrant.upsert_points(UpsertPointsBuilder::new(COLLECTION, vec![point]).wait(true)).await?;
                redis::cmd("SET").arg(&key).arg(&body).query_async::<()>(&mut redis).await?;
                anyhow::Ok(())
            }
        })
        .buffer_unordered(IN_FLIGHT)
        .try_collect::<()>()
        .await?;
    Ok(f64::from(args.documents) / begun.elapsed().as_secs_f64())
}
