//! This queue in fast mode: the roles of a worker as in `queue/examples/plain.rs`.

use std::time::Duration;

use anyhow::bail;
use apalis::{
    layers::WorkerBuilderExt,
    prelude::{BoxDynError, Data, WorkerBuilder},
};
use queue::{
    AckLayer, Acker, Claimer, ClaimerConfig, Envelope, Gates, Heartbeat, HeartbeatConfig, Job, Priority,
    Pushed, Queue, QueueBackend, QueueConfig, QueueName, Reaper, Scheduler, TenantId, WorkerId,
};
use tokio_util::sync::CancellationToken;

use super::{BATCH, CONCURRENCY, Counter, Spread};
use crate::payload::Payload;

/// Claimed jobs of one worker: those that run, one batch that is ready, and one that is being claimed.
const SLOTS: usize = CONCURRENCY + 2 * BATCH;

pub(super) fn config(url: &str) -> QueueConfig {
    QueueConfig {
        url: url.to_owned(),
        prefix: "bench".to_owned(),
        // A machine that is busy with other things must not look like an outage.
        response_timeout: Duration::from_secs(30),
        ..QueueConfig::default()
    }
}

pub(super) fn name() -> anyhow::Result<QueueName> {
    Ok(QueueName::new("noop")?)
}

pub struct Producer {
    queue: Queue,
    name: QueueName,
    tenants: Vec<TenantId>,
    priorities: u8,
}

impl Producer {
    pub async fn open(url: &str, spread: Spread) -> anyhow::Result<Self> {
        let tenants = (0..spread.tenants).map(|number| TenantId::new(format!("tenant{number}")));
        Ok(Self {
            queue: Queue::connect(config(url)).await?,
            name: name()?,
            tenants: tenants.collect::<Result<_, _>>()?,
            priorities: spread.priorities,
        })
    }

    pub async fn push(&self, payloads: &[Payload]) -> anyhow::Result<()> {
        let envelopes: Vec<Envelope> =
            payloads.iter().map(|payload| self.envelope(*payload)).collect::<anyhow::Result<_>>()?;
        if let Some(other) = self.queue.push(&envelopes).await?.into_iter().find(|one| *one != Pushed::Queued)
        {
            bail!("a push was answered {other:?}");
        }
        Ok(())
    }

    fn envelope(&self, payload: Payload) -> anyhow::Result<Envelope> {
        let tenants = self.tenants.len() as u64;
        let tenant = &self.tenants[(payload.number % tenants) as usize];
        let mut envelope = Envelope::new("noop", self.name.clone(), tenant.clone());
        if self.priorities > 1 {
            let level = payload.number / tenants % u64::from(self.priorities);
            envelope.priority = Priority::try_from(level as i64)?;
        }
        envelope.fast = Some(serde_json::to_value(payload)?);
        Ok(envelope)
    }

    pub async fn left(&self) -> anyhow::Result<u64> {
        let stats = self.queue.stats(&self.name).await?;
        Ok(stats.depth() + stats.in_flight + stats.scheduled)
    }
}

async fn noop(job: Job, counter: Data<Counter>) -> Result<(), BoxDynError> {
    counter.handle(job.payload()?);
    Ok(())
}

/// Runs a worker until told to stop; every job that it handled is acked then.
pub async fn work(url: &str, counter: Counter, stop: CancellationToken) -> anyhow::Result<()> {
    let queue = Queue::connect(config(url)).await?;
    let heartbeat = Heartbeat::spawn(config(url), HeartbeatConfig::default())?;
    let acker = Acker::spawn(queue.clone(), heartbeat.clone());
    let queues = vec![name()?];
    let _reaper = Reaper::spawn(queue.clone(), queues.clone(), stop.clone());
    let _scheduler = Scheduler::spawn(queue.clone(), queues.clone(), stop.clone());
    let claimer = ClaimerConfig { queues, worker: WorkerId::for_this_process(), batch: BATCH, slots: SLOTS };
    let (claimer, jobs) = Claimer::spawn(queue, heartbeat, claimer, Gates::new(), stop);
    WorkerBuilder::new("bench")
        .backend(QueueBackend::new(claimer, jobs, acker.clone()))
        .layer(AckLayer::new(acker, Duration::from_secs(5)))
        .concurrency(CONCURRENCY)
        .data(counter)
        .build(noop)
        .run()
        .await?;
    Ok(())
}
