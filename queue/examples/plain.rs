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
use queue::{Envelope, Job, Priority, Queue, QueueConfig, QueueName, Roles, RolesConfig, TenantId};
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
    run(QueueConfig { prefix: "plain-example".to_owned(), ..QueueConfig::from_env()? }).await
}

/// Enqueues, works, stops.
pub async fn run(config: QueueConfig) -> Result<(), BoxDynError> {
    let queue = Queue::connect(config).await?;
    let mails = QueueName::new("mails")?;
    let mut envelopes = Vec::new();
    for number in 0..10_u8 {
        let mail = Mail { to: format!("user{number}@example.org"), text: "Hello".to_owned() };
        envelopes.push(Envelope {
            priority: Priority::try_from(number % 3 * 4)?,
            fast: Some(serde_json::to_value(mail)?),
            ..Envelope::new("mail", mails.clone(), TenantId::new("acme")?)
        });
    }
    queue.push(&envelopes).await?;

    let shutdown = CancellationToken::new();
    // Twice the concurrency: what is claimed and waits here is kept from other workers.
    let config = RolesConfig { slots: 8, ..RolesConfig::new(vec![mails]) };
    let (roles, backend) = Roles::spawn(&queue, config, &shutdown)?;
    WorkerBuilder::new("mailer")
        .backend(backend)
        // Outside of the acks: a job that panics comes back when its lease has run out.
        .catch_panic()
        // What fails is tried again within five seconds, then ten, then twenty.
        .layer(roles.acks(Duration::from_secs(5)))
        .concurrency(4)
        .data(Outbox { left: Arc::new(AtomicU32::new(10)), shutdown })
        .build(send)
        .run()
        .await?;
    roles.join().await;
    println!("all sent");
    Ok(())
}
