//! How fast this queue moves jobs that do nothing: push, then claim and ack through the roles of a worker.
//!
//! ```sh
//! REDIS_QUEUE_URL=redis://127.0.0.1:6379 cargo run --release -p queue --example throughput -- 200000 4
//! ```
//!
//! Arguments: jobs (default 100,000), tenants (default 1). Uses the prefix `throughput-example` and leaves nothing there.

use std::time::{Duration, Instant};

use queue::{
    Acker, Claimer, ClaimerConfig, Done, Envelope, Gates, Heartbeat, HeartbeatConfig, Queue, QueueConfig,
    QueueName, TenantId, WorkerId, queue::CHUNK,
};
use tokio_util::sync::CancellationToken;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1).map(|arg| arg.parse::<usize>());
    let jobs = args.next().transpose()?.unwrap_or(100_000);
    let tenants = args.next().transpose()?.unwrap_or(1).max(1);
    let config = QueueConfig { prefix: "throughput-example".to_owned(), ..QueueConfig::from_env()? };
    let queue = Queue::connect(config.clone()).await?;
    let name = QueueName::new("bench")?;

    let mut envelopes = Vec::with_capacity(jobs);
    for number in 0..jobs {
        let tenant = TenantId::new(format!("tenant{}", number % tenants))?;
        envelopes.push(Envelope::new("noop", name.clone(), tenant));
    }
    let begun = Instant::now();
    for chunk in envelopes.chunks(8 * CHUNK) {
        queue.push(chunk).await?;
    }
    rate("pushed", jobs, begun.elapsed());

    let shutdown = CancellationToken::new();
    let heartbeat = Heartbeat::spawn(config, HeartbeatConfig::default())?;
    let acker = Acker::spawn(queue.clone(), heartbeat.clone());
    let claimer = ClaimerConfig {
        queues: vec![name.clone()],
        worker: WorkerId::for_this_process(),
        batch: 200,
        slots: 400,
    };
    let begun = Instant::now();
    let (claimer, mut inbox) =
        Claimer::spawn(queue.clone(), heartbeat, claimer, Gates::new(), shutdown.clone());
    for _ in 0..jobs {
        let Some(job) = inbox.recv().await else { break };
        acker.done(&job.lease, Done::Ack).await;
    }
    acker.flush().await;
    rate("claimed and acked", jobs, begun.elapsed());
    shutdown.cancel();
    claimer.join().await;
    println!("left: {:?}", queue.stats(&name).await?.depth());
    Ok(())
}

fn rate(what: &str, jobs: usize, took: Duration) {
    println!("{what} {jobs} jobs in {took:.2?}: {:.0} a second", jobs as f64 / took.as_secs_f64());
}
