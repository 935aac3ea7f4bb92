//! Moves scheduled jobs to their lists when their time has come.

use std::time::Duration;

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::{ids::QueueName, queue::Queue, rounds::Rounds};

/// How long a place that could not be looked at is left alone.
const REST: Duration = Duration::from_secs(1);

/// The scheduler. Every worker runs one; several do no harm.
pub struct Scheduler {
    queue: Queue,
    rounds: Rounds,
}

impl Scheduler {
    /// Until shutdown, looks at each partition when its next job is due, and at one partition of each queue, in turn,
    /// every second, because others may have scheduled something. A job is late by at most a second per partition.
    pub fn spawn(queue: Queue, queues: Vec<QueueName>, shutdown: CancellationToken) -> JoinHandle<()> {
        let config = queue.config();
        let rounds = Rounds::new("scheduler", queues, config.partitions, config.safety_poll, REST);
        tokio::spawn(Self { queue, rounds }.run(shutdown))
    }

    async fn run(mut self, shutdown: CancellationToken) {
        while let Some(place) = self.rounds.next(&shutdown).await {
            let found = self.queue.promote_partition(&place.0, place.1).await;
            // At least a millisecond: Redis rounds times down.
            let next = found.map(|(_, next)| next.map(|wait| wait.max(Duration::from_millis(1))));
            self.rounds.looked(place, next);
        }
    }
}
