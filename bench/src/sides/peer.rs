//! apalis-redis 1.0, tuned: batches of 100, no locks (leases), no events, polled every 25 ms.
//!
//! Its traps: each push lands in the scheduled set, and one script promotes all of it at once, which fails on a large
//! backlog ("too many results to unpack"); so the backlog is promoted in chunks before a worker starts.

use std::time::Duration;

use apalis::{
    layers::WorkerBuilderExt,
    prelude::{BoxDynError, Data, WorkerBuilder},
};
use apalis_core::{
    backend::{TaskSink, ext::BackendExt},
    worker::context::WorkerContext,
};
use apalis_redis::{Config, RedisStorage};
use redis::aio::MultiplexedConnection;
use tokio_util::sync::CancellationToken;

use super::{BATCH, CONCURRENCY, Counter, connect};
use crate::payload::Payload;

const QUEUE: &str = "peer";
const POLL: Duration = Duration::from_millis(25);
/// Jobs promoted by one script call.
const CHUNK: usize = 1000;

fn config() -> Config {
    Config::default().queue(QUEUE).batch_size(BATCH).lock_tasks(false).emit_events(false)
}

fn storage(connection: MultiplexedConnection) -> RedisStorage<Payload, MultiplexedConnection> {
    RedisStorage::new(connection).with_config(config())
}

pub struct Producer {
    connection: MultiplexedConnection,
    storage: RedisStorage<Payload, MultiplexedConnection>,
}

impl Producer {
    pub async fn open(url: &str) -> anyhow::Result<Self> {
        let connection = connect(url).await?;
        Ok(Self { storage: storage(connection.clone()), connection })
    }

    pub async fn push(&self, payloads: Vec<Payload>) -> anyhow::Result<()> {
        let mut storage = self.storage.clone();
        storage.push_bulk(payloads).await?;
        Ok(())
    }

    pub async fn promote(&self) -> anyhow::Result<()> {
        let script = redis::Script::new(
            "local ids = redis.call('ZPOPMIN', KEYS[1], ARGV[1]) \
             local names = {} \
             for i = 1, #ids, 2 do names[#names + 1] = ids[i] end \
             if #names > 0 then redis.call('RPUSH', KEYS[2], unpack(names)) end \
             return #names",
        );
        let mut connection = self.connection.clone();
        loop {
            let moved: usize = script
                .key(config().scheduled_jobs_set())
                .key(config().active_jobs_list())
                .arg(CHUNK)
                .invoke_async(&mut connection)
                .await?;
            if moved < CHUNK {
                return Ok(());
            }
        }
    }

    pub async fn left(&self) -> anyhow::Result<u64> {
        let mut connection = self.connection.clone();
        let (active, scheduled): (u64, u64) = redis::pipe()
            .cmd("LLEN")
            .arg(config().active_jobs_list())
            .cmd("ZCARD")
            .arg(config().scheduled_jobs_set())
            .query_async(&mut connection)
            .await?;
        let inflight: Vec<String> = redis::cmd("KEYS")
            .arg(format!("{}:*", config().inflight_jobs_set()))
            .query_async(&mut connection)
            .await?;
        let mut left = active + scheduled;
        for set in inflight {
            left += redis::cmd("SCARD").arg(set).query_async::<u64>(&mut connection).await?;
        }
        Ok(left)
    }
}

async fn noop(payload: Payload, counter: Data<Counter>) -> Result<(), BoxDynError> {
    counter.handle(payload);
    Ok(())
}

pub async fn work(url: &str, counter: Counter, stop: CancellationToken) -> anyhow::Result<()> {
    let backend = storage(connect(url).await?).poll_with_interval(POLL);
    WorkerBuilder::new(format!("bench-{}", std::process::id()))
        .backend(backend)
        .concurrency(CONCURRENCY)
        .data(counter)
        .build(noop)
        .run_with_ctx(move |context: WorkerContext| {
            let stop = stop.clone();
            async move {
                stop.cancelled().await;
                context.stop()
            }
        })
        .await?;
    Ok(())
}
