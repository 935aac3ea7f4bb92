//! Enqueues a text for ingestion and waits until readers see it:
//! `DATABASE_URL=… REDIS_QUEUE_URL=… cargo run -p producer --example enqueue -- TENANT DOCUMENT TEXT`
//!
//! Needs a tenant (`flotilla tenants create`) and a running worker.

use std::{env, error::Error, time::Duration};

use producer::{Client, ClientSettings, Durability, Idempotency, Until, new_job};
use queue::{Queue, QueueConfig, TenantId};
use sagas::stores::postgres::{Postgres, PostgresConfig};
use serde_json::json;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let [tenant, document, text] = env::args()
        .skip(1)
        .collect::<Vec<_>>()
        .try_into()
        .map_err(|_| "three arguments are needed: TENANT DOCUMENT TEXT")?;
    let url = env::var("DATABASE_URL")
        .map_err(|_| "DATABASE_URL is not set: postgres://user@host/database is needed")?;
    let postgres = Postgres::lazy(&PostgresConfig::new(url))?;
    let queue = Queue::lazy(QueueConfig::from_env()?)?;
    let client = Client::new(postgres, Some(queue), ClientSettings::default());

    let mut job = new_job("ingest", TenantId::new(tenant)?, json!({ "document": document, "text": text }))?;
    // Running this twice within a day ingests the text once; another text under the same key is refused.
    job.idempotency = Some(Idempotency {
        key: document.chars().take(256).collect(),
        scope: "example".to_owned(),
        ttl: Duration::from_secs(24 * 3600),
        until: Until::Accepted,
    });
    let receipt = client.enqueue(job, Durability::Durable).await?;
    println!("job {}{}", receipt.id, if receipt.duplicate { " (was there before)" } else { "" });
    let ended = client.wait(receipt.id, Duration::from_secs(60)).await?;
    println!("{}", ended.state);
    Ok(())
}
