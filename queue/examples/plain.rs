//! A plain apalis worker on this queue: no sagas, no Postgres, a job type of one's own.
//!
//! ```sh
//! REDIS_QUEUE_URL=redis://127.0.0.1:6379 cargo run -p queue --example plain
//! ```
//!
//! The server needs `maxmemory-policy noeviction`. The example enqueues ten mails, sends them, and stops.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use apalis::{
    layers::WorkerBuilderExt,
    prelude::{BoxDynError, Data, WorkerBuilder},
};
use queue::{
    AckLayer, Acker, Claimer, ClaimerConfig, Envelope, Gates, Heartbeat, HeartbeatConfig, Job, Priority,
    Queue, QueueBackend, QueueConfig, QueueName, Reaper, Scheduler, TenantId, WorkerId,
};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

/// The job type. It travels in the envelope's `fast` field, because there is no ledger to keep it.
#[derive(Debug, Serialize, Deserialize)]
struct Mail {
    to: String,
    text: String,
}

/// What the handlers share.
#[derive(Clone)]
struct Outbox {
    left: Arc<AtomicU32>,
    shutdown: CancellationToken,
}

async fn send(job: Job, outbox: Data<Outbox>) -> Result<(), BoxDynError> {
    let mail: Mail = serde_json::from_value(job.envelope.fast.clone().unwrap_or_default())?;
    println!("priority {}: to {}: {}", job.envelope.priority, mail.to, mail.text);
    if outbox.left.fetch_sub(1, Ordering::AcqRel) == 1 {
        outbox.shutdown.cancel();
    }
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), BoxDynError> {
    let config = QueueConfig { prefix: "plain-example".to_owned(), ..QueueConfig::from_env()? };
    let queue = Queue::connect(config.clone()).await?;
    let mails = QueueName::new("mails")?;

    // Enqueue.
    let mut envelopes = Vec::new();
    for number in 0..10_u8 {
        let mail = Mail { to: format!("user{number}@example.org"), text: "Hello".to_owned() };
        envelopes.push(Envelope {
            priority: Priority::try_from(number % 3 * 4)?,
            fast: Some(serde_json::to_value(mail)?),
            ..Envelope::new("mail", mails.clone(), TenantId::new("acme")?)
        });
    }
    let pushed = queue.push(&envelopes).await?;
    println!("enqueued {} mails", pushed.len());

    // The roles of a worker.
    let shutdown = CancellationToken::new();
    let heartbeat = Heartbeat::spawn(config, HeartbeatConfig::default())?;
    let acker = Acker::spawn(queue.clone(), heartbeat.clone());
    let queues = vec![mails];
    let _reaper = Reaper::spawn(queue.clone(), queues.clone(), shutdown.clone());
    let _scheduler = Scheduler::spawn(queue.clone(), queues.clone(), shutdown.clone());
    let claimer = ClaimerConfig { queues, worker: WorkerId::for_this_process(), batch: 16, slots: 8 };
    let (claimer, jobs) = Claimer::spawn(queue, heartbeat, claimer, Gates::new(), shutdown.clone());

    // apalis, with its layers. `AckLayer` acks what succeeds and tries the rest again after five seconds.
    let outbox = Outbox { left: Arc::new(AtomicU32::new(10)), shutdown };
    WorkerBuilder::new("mailer")
        .backend(QueueBackend::new(claimer, jobs, acker.clone()))
        // Outside of the acks: a job that panics comes back when its lease has run out.
        .catch_panic()
        .layer(AckLayer::new(acker, Duration::from_secs(5)))
        .concurrency(4)
        .data(outbox)
        .build(send)
        .run()
        .await?;
    println!("all sent");
    Ok(())
}
