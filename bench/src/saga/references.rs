//! The same writes without queue, saga and log.

use std::time::Instant;

use futures::{StreamExt, TryStreamExt, stream};
use serde_json::Value;
use uuid::Uuid;

use super::three_step::{EXPIRES_S, Sinks, key, row, vector};

/// Rows of one insert, and inserts under way at once.
const BATCH: u64 = 128;
const FLUSHES: usize = 2;
/// Items of the loop under way at once.
const IN_FLIGHT: usize = 32;

/// What the stores themselves do: multi-row inserts and pipelines. Items per second.
pub async fn store(sinks: &Sinks, items: u64) -> anyhow::Result<f64> {
    let begun = Instant::now();
    stream::iter((0..items).step_by(BATCH as usize))
        .map(|first| async move {
            let numbers = first..(first + BATCH).min(items);
            let ids: Vec<Uuid> = numbers.clone().map(|_| Uuid::now_v7()).collect();
            let bodies: Vec<Value> = numbers.clone().map(row).collect();
            sinks.insert_rows(&ids, &bodies).await?;
            let vectors: Vec<Vec<u8>> = numbers.clone().map(vector).collect();
            sinks.insert_vectors(&ids, &vectors).await?;
            sinks.set(numbers).await?;
            anyhow::Ok(())
        })
        .buffer_unordered(FLUSHES)
        .try_collect::<()>()
        .await?;
    Ok(items as f64 / begun.elapsed().as_secs_f64())
}

/// What one writes without any of it: three writes for each item, one after the other. Items per second.
pub async fn plain_loop(sinks: &Sinks, items: u64) -> anyhow::Result<f64> {
    let pool = sqlx::postgres::PgPoolOptions::new()
        .max_connections(IN_FLIGHT as u32)
        .min_connections(IN_FLIGHT as u32)
        .connect_with(sinks.postgres.connect_options().as_ref().clone())
        .await?;
    let begun = Instant::now();
    stream::iter(0..items)
        .map(|number| {
            let (pool, mut redis) = (pool.clone(), sinks.redis.clone());
            let write = async move {
                let id = Uuid::now_v7();
                sqlx::query("INSERT INTO shop.rows (id, body) VALUES ($1, $2)")
                    .bind(id)
                    .bind(row(number))
                    .execute(&pool)
                    .await?;
                sqlx::query("INSERT INTO shop.vectors (id, vector) VALUES ($1, $2)")
                    .bind(id)
                    .bind(vector(number))
                    .execute(&pool)
                    .await?;
                let (key, value) = key(number);
                redis::cmd("SET")
                    .arg(key)
                    .arg(value)
                    .arg("EX")
                    .arg(EXPIRES_S)
                    .query_async::<()>(&mut redis)
                    .await?;
                anyhow::Ok(())
            };
            async move { tokio::spawn(write).await? }
        })
        .buffer_unordered(IN_FLIGHT)
        .try_collect::<()>()
        .await?;
    Ok(items as f64 / begun.elapsed().as_secs_f64())
}
