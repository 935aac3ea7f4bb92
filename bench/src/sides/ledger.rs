//! This queue over the ledger in Postgres: an accepted job is committed, a claimed one is taken under a fence, a finished one
//! recorded.

use std::time::Duration;

use anyhow::{anyhow, ensure};
use apalis::{
    layers::WorkerBuilderExt,
    prelude::{BoxDynError, Data, WorkerBuilder},
};
use queue::{
    AckLayer, Acker, Claimer, ClaimerConfig, Envelope, Gates, Heartbeat, HeartbeatConfig, Job, Queue,
    QueueBackend, QueueName, Reaper, Scheduler, TenantId, WorkerId,
};
use sagas::stores::postgres::{Postgres, PostgresConfig, accept::NewJob, plain::PlainLedger};
use tokio_util::sync::CancellationToken;

use super::{BATCH, CONCURRENCY, Counter, ours};
use crate::payload::Payload;

const TENANT: &str = "tenant0";

async fn postgres(url: &str) -> anyhow::Result<Postgres> {
    let config = PostgresConfig { call_timeout: Duration::from_secs(30), ..PostgresConfig::new(url) };
    Postgres::connect(&config).await.map_err(|error| anyhow!("{}", error.message))
}

pub struct Producer {
    postgres: Postgres,
    queue: Queue,
    name: QueueName,
    tenant: TenantId,
}

impl Producer {
    /// Brings the schema up to date.
    pub async fn open(redis: &str, database: &str) -> anyhow::Result<Self> {
        let postgres = postgres(database).await?;
        postgres.migrate_up().await?;
        postgres.create_tenant(TENANT).await?;
        let queue = Queue::connect(ours::config(redis)).await?;
        Ok(Self { postgres, queue, name: ours::name()?, tenant: TenantId::new(TENANT)? })
    }

    /// One commit, then one push, as the producer does.
    pub async fn push(&self, payloads: &[Payload]) -> anyhow::Result<()> {
        let jobs = payloads.iter().map(|payload| {
            let request = serde_json::to_value(payload)?;
            anyhow::Ok(NewJob::new("noop", self.name.clone(), self.tenant.clone(), request))
        });
        let jobs: Vec<NewJob> = jobs.collect::<Result<_, _>>()?;
        self.postgres.accept(&jobs, true).await?;
        let envelopes: Vec<Envelope> = jobs
            .iter()
            .map(|job| Envelope {
                id: job.id,
                ..Envelope::new(job.kind.clone(), job.queue.clone(), job.tenant.clone())
            })
            .collect();
        self.queue.push(&envelopes).await?;
        Ok(())
    }

    /// Every job has succeeded in the ledger, and Redis has forgotten all.
    pub async fn check_all_ended(&self, jobs: u64) -> anyhow::Result<()> {
        let counts = self.postgres.job_counts(None).await?;
        let unfinished = counts.waiting + counts.running + counts.dead + counts.parked + counts.cancelled;
        ensure!(unfinished == 0, "of {jobs} jobs not all succeeded: {counts:?}");
        let stats = self.queue.stats(&self.name).await?;
        ensure!(stats.depth() + stats.in_flight == 0, "Redis still has jobs: {stats:?}");
        Ok(())
    }
}

async fn noop(job: Job, counter: Data<Counter>) -> Result<(), BoxDynError> {
    counter.handle(job.payload()?);
    Ok(())
}

pub async fn work(
    url: &str,
    database: &str,
    counter: Counter,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let worker = WorkerId::for_this_process();
    let ledger = PlainLedger::new(postgres(database).await?, worker.clone());
    let queue = Queue::connect(ours::config(url)).await?;
    let heartbeat = Heartbeat::spawn(ours::config(url), HeartbeatConfig::default())?;
    let acker = Acker::spawn(queue.clone(), heartbeat.clone());
    let queues = vec![ours::name()?];
    let _reaper = Reaper::spawn(queue.clone(), queues.clone(), stop.clone());
    let _scheduler = Scheduler::spawn(queue.clone(), queues.clone(), stop.clone());
    let slots = CONCURRENCY + 2 * BATCH;
    let claimer = ClaimerConfig { queues, worker, batch: BATCH, slots };
    let (claimer, jobs) = Claimer::spawn(queue, heartbeat, claimer, Gates::new(), stop);
    WorkerBuilder::new("bench")
        .backend(QueueBackend::new(claimer, jobs, acker.clone()))
        .layer(AckLayer::over(ledger, acker))
        .concurrency(CONCURRENCY)
        .data(counter)
        .build(noop)
        .run()
        .await?;
    Ok(())
}
