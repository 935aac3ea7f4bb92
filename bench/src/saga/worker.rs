//! A worker process with the workload's saga in its registry, and nothing else.

use std::{sync::Arc, time::Duration};

use anyhow::anyhow;
use queue::{Queue, QueueConfig, QueueName};
use sagas::{
    Registry,
    kinds::{DocumentSettings, Stores},
    stores::{
        cache::{Cache, CacheConfig},
        postgres::{Postgres, PostgresConfig},
        vectors::{Vectors, VectorsConfig},
    },
};
use sqlx::postgres::PgPoolOptions;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio_util::sync::CancellationToken;
use worker::WorkerSettings;

use super::three_step::{self, KEYS, KIND, Sinks, ThreeStep};
use crate::{sides::connect, worker::used};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The ledger's and the user's Postgres
    #[arg(long)]
    database: String,
    /// The queue's Redis
    #[arg(long)]
    redis: String,
    /// The user's Redis
    #[arg(long)]
    cache: String,
    /// Sagas under way at once
    #[arg(long)]
    concurrency: usize,
    /// Threads of the runtime
    #[arg(long)]
    threads: usize,
    /// Share of the steps' calls that fail and would succeed when tried again
    #[arg(long, default_value_t = 0.0)]
    errors: f64,
}

/// Runs until stdin ends, then drains.
pub fn run(args: Args) -> anyhow::Result<()> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(args.threads.max(1)).enable_all().build()?.block_on(serve(args))
}

async fn serve(args: Args) -> anyhow::Result<()> {
    let shutdown = CancellationToken::new();
    tokio::spawn({
        let shutdown = shutdown.clone();
        async move {
            let mut lines = BufReader::new(tokio::io::stdin()).lines();
            while let Ok(Some(_)) = lines.next_line().await {}
            shutdown.cancel();
        }
    });
    let stores = stores(&args)?;
    let sinks = Sinks {
        postgres: PgPoolOptions::new().max_connections(8).connect_lazy(&args.database)?,
        redis: connect(&args.cache).await?,
    };
    let cache = args.cache.clone();
    let registry = Registry::default()
        .with(ThreeStep::new(&sinks, args.errors))
        .probe(KEYS, move || three_step::keys_answer(cache.clone()));
    let queue = Queue::connect(QueueConfig { url: args.redis, ..QueueConfig::default() }).await?;
    let mut settings = WorkerSettings::new(vec![QueueName::new(KIND)?], queue.config().lease);
    settings.concurrency = args.concurrency;
    settings.addr = Some(([127, 0, 0, 1], 0).into());
    worker::run(settings, stores, registry, queue, Arc::new(String::new), shutdown).await?;
    let used = used()?;
    println!("ended {} {}", used.cpu.as_micros(), used.peak_rss_kb);
    Ok(())
}

/// A worker has the stores of Flotilla's own sagas. None is reached but the ledger.
fn stores(args: &Args) -> anyhow::Result<Stores> {
    let call_timeout = Duration::from_secs(5);
    let postgres =
        Postgres::lazy(&PostgresConfig::new(&args.database)).map_err(|error| anyhow!("{error}"))?;
    let vectors = VectorsConfig { url: "http://127.0.0.1:1".to_owned(), api_key: None, call_timeout };
    Ok(Stores::new(
        postgres,
        Vectors::lazy(&vectors)?,
        Cache::lazy(&CacheConfig { url: args.cache.clone(), ..CacheConfig::default() })?,
        embedding::open(&embedding::EmbedderConfig::Hashing)?,
        vec![],
        DocumentSettings::default(),
    ))
}
