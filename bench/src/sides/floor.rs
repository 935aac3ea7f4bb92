//! Two minimal scripts: no leases, no priorities, no tenants, no second try. What a queue on Redis can't beat.

use std::{
    convert::Infallible,
    task::{Context, Poll, ready},
};

use apalis::{
    layers::WorkerBuilderExt,
    prelude::{BoxDynError, Data, WorkerBuilder},
};
use apalis_core::{
    backend::{Backend, BackendConfig, finalize::Ephemeral},
    task::{Task, builder::TaskBuilder, task_id::TaskId},
    worker::context::WorkerContext,
};
use redis::aio::MultiplexedConnection;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tower::layer::util::Identity;
use uuid::Uuid;

use super::{BATCH, CONCURRENCY, Counter, connect};
use crate::payload::Payload;

const LIST: &str = "{floor}:list";
const DATA: &str = "{floor}:data";
/// How long a fetcher that found nothing waits.
const PAUSE: std::time::Duration = std::time::Duration::from_millis(5);

pub struct Producer {
    connection: MultiplexedConnection,
    script: redis::Script,
}

impl Producer {
    pub async fn open(url: &str) -> anyhow::Result<Self> {
        let script = redis::Script::new(include_str!("../../lua/floor_push.lua"));
        Ok(Self { connection: connect(url).await?, script })
    }

    pub async fn push(&self, payloads: &[Payload]) -> anyhow::Result<()> {
        let mut call = self.script.key(LIST);
        call.key(DATA);
        for payload in payloads {
            call.arg(Uuid::now_v7().to_string()).arg(serde_json::to_vec(payload)?);
        }
        call.invoke_async::<u64>(&mut self.connection.clone()).await?;
        Ok(())
    }

    pub async fn left(&self) -> anyhow::Result<u64> {
        Ok(redis::cmd("LLEN").arg(LIST).query_async(&mut self.connection.clone()).await?)
    }
}

/// Pops batches.
struct Fetcher {
    connection: MultiplexedConnection,
    script: redis::Script,
}

impl Fetcher {
    async fn open(url: &str) -> anyhow::Result<Self> {
        let script = redis::Script::new(include_str!("../../lua/floor_pop.lua"));
        Ok(Self { connection: connect(url).await?, script })
    }

    async fn pop(&mut self) -> anyhow::Result<Vec<Payload>> {
        let mut call = self.script.key(LIST);
        call.key(DATA).arg(BATCH);
        let found: Vec<Vec<u8>> = call.invoke_async(&mut self.connection).await?;
        Ok(found.iter().map(|json| serde_json::from_slice(json)).collect::<Result<_, _>>()?)
    }
}

/// The same without apalis: one loop that pops and handles.
pub async fn work_plain(url: &str, counter: Counter, stop: CancellationToken) -> anyhow::Result<()> {
    let mut fetcher = Fetcher::open(url).await?;
    while !stop.is_cancelled() {
        let batch = fetcher.pop().await?;
        if batch.is_empty() {
            tokio::time::sleep(PAUSE).await;
        }
        for payload in batch {
            counter.handle(payload);
        }
    }
    Ok(())
}

/// One batch is fetched while another is handed over.
pub async fn work(url: &str, counter: Counter, stop: CancellationToken) -> anyhow::Result<()> {
    let (batches, receiver) = mpsc::channel(1);
    let mut fetcher = Fetcher::open(url).await?;
    let fetching = tokio::spawn(async move {
        while !stop.is_cancelled() {
            let batch = fetcher.pop().await?;
            if batch.is_empty() {
                tokio::time::sleep(PAUSE).await;
            } else if batches.send(batch).await.is_err() {
                break;
            }
        }
        anyhow::Ok(())
    });
    let backend = FloorBackend { batches: receiver, batch: Vec::new().into_iter() };
    let worker = WorkerBuilder::new("bench").backend(backend).concurrency(CONCURRENCY).data(counter);
    worker.build(noop).run().await?;
    fetching.await?
}

async fn noop(payload: Payload, counter: Data<Counter>) -> Result<(), BoxDynError> {
    counter.handle(payload);
    Ok(())
}

struct FloorBackend {
    batches: mpsc::Receiver<Vec<Payload>>,
    batch: std::vec::IntoIter<Payload>,
}

impl Backend for FloorBackend {
    type Task = Task<Payload>;
    type Error = Infallible;

    fn poll_ready(&mut self, _: &mut Context<'_>, _: &WorkerContext) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
        worker: &WorkerContext,
    ) -> Poll<Option<Result<Task<Payload>, Infallible>>> {
        loop {
            if let Some(payload) = self.batch.next() {
                let id = TaskId::from_string(payload.number.to_string());
                return Poll::Ready(Some(Ok(TaskBuilder::new(payload).task_id(id).build())));
            }
            let Some(batch) = ready!(self.batches.poll_recv(cx)) else {
                // The fetcher ended; a second stop says so, which is no news.
                worker.stop().ok();
                return Poll::Ready(None);
            };
            self.batch = batch.into_iter();
        }
    }

    fn poll_close(&mut self, _: &mut Context<'_>, _: &WorkerContext) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }
}

impl BackendConfig for FloorBackend {
    type Args = Payload;
    type Id = TaskId;
    type Kind = Ephemeral;
    type Config = ();
    type Layer = Identity;

    fn config(&self) -> &() {
        &()
    }

    fn middleware(&mut self, _: &mut WorkerContext) -> Identity {
        Identity::new()
    }
}
