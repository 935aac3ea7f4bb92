//! The worker process around the saga: its stores, its queues, and its end.

use std::{env, sync::Arc, time::Duration};

use anyhow::Context;
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
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;
use worker::WorkerSettings;

use crate::order::{self, Payments};

fn setting(name: &str) -> anyhow::Result<String> {
    env::var(name).with_context(|| format!("{name} is not set"))
}

/// The three stores of Flotilla's own sagas. They connect when they are first used.
fn stores() -> anyhow::Result<Stores> {
    Ok(Stores::new(
        Postgres::lazy(&PostgresConfig::new(setting("DATABASE_URL")?))?,
        Vectors::lazy(&VectorsConfig {
            url: setting("QDRANT_URL")?,
            api_key: None,
            call_timeout: Duration::from_secs(5),
        })?,
        Cache::lazy(&CacheConfig { url: setting("REDIS_CACHE_URL")?, ..CacheConfig::default() })?,
        embedding::open(&embedding::EmbedderConfig::Hashing)?,
        vec![],
        DocumentSettings::default(),
    ))
}

/// Serves the queues of orders and of Flotilla's own ingests until SIGINT. `sagas` registers what this worker knows of orders.
pub async fn serve(sagas: impl FnOnce(Registry, PgPool, Payments) -> Registry) -> anyhow::Result<()> {
    let stores = stores()?;
    let shop = PgPool::connect_lazy(&setting("SHOP_DATABASE_URL")?)?;
    let payments = order::Payments::new(setting("PAYMENTS_URL")?)?;

    let registry = sagas(stores.registry(), shop.clone(), payments.clone())
        .probe(order::SHOP, move || order::shop_answers(shop.clone()))
        .probe(order::PAYMENTS, move || payments.clone().answers());

    let queue = Queue::connect(QueueConfig::from_env()?).await?;
    let queues = vec![QueueName::new("order")?, QueueName::new("ingest")?];
    let mut settings = WorkerSettings::new(queues, queue.config().lease);
    settings.addr = env::var("FLOTILLA_WORKER_ADDR").ok().map(|addr| addr.parse()).transpose()?;
    let shutdown = CancellationToken::new();
    tokio::spawn({
        let shutdown = shutdown.clone();
        async move {
            if tokio::signal::ctrl_c().await.is_ok() {
                shutdown.cancel();
            }
        }
    });
    worker::run(settings, stores, registry, queue, Arc::new(String::new), shutdown).await?;
    Ok(())
}
