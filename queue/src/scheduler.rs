//! Moves scheduled jobs to their lists when their time has come.

use std::{collections::HashMap, time::Duration};

use tokio::{
    task::JoinHandle,
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

use crate::{ids::QueueName, outage::Outage, queue::Queue};

/// How long a place that could not be looked at is left alone.
const REST: Duration = Duration::from_secs(1);

/// The scheduler. Every worker runs one; several do no harm.
pub struct Scheduler {
    queue: Queue,
    queues: Vec<QueueName>,
    /// When the next known job of a partition is due, by our clock.
    due: HashMap<(QueueName, u16), Instant>,
    turn: u16,
}

impl Scheduler {
    /// Until shutdown, looks at each partition when its next job is due, and at one partition of each queue, in turn,
    /// every second, because others may have scheduled something. A job is late by at most a second per partition.
    pub fn spawn(queue: Queue, queues: Vec<QueueName>, shutdown: CancellationToken) -> JoinHandle<()> {
        tokio::spawn(Self { queue, queues, due: HashMap::new(), turn: 0 }.run(shutdown))
    }

    async fn run(mut self, shutdown: CancellationToken) {
        let poll = self.queue.config().safety_poll;
        let mut outage = Outage::new("scheduler");
        let mut next_poll = Instant::now();
        loop {
            let wake = self.due.values().min().copied().map_or(next_poll, |due| due.min(next_poll));
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = sleep_until(wake) => {}
            }
            let now = Instant::now();
            let mut places: Vec<(QueueName, u16)> =
                self.due.iter().filter(|(_, due)| **due <= now).map(|(place, _)| place.clone()).collect();
            if next_poll <= now {
                let turn = self.queues.iter().map(|name| (name.clone(), self.turn));
                places.extend(turn.filter(|place| self.due.get(place).is_none_or(|due| *due > now)));
                self.turn = (self.turn + 1) % self.queue.config().partitions;
                next_poll = now + poll;
            }
            for place in places {
                let next = match self.queue.promote_partition(&place.0, place.1).await {
                    Ok((_, next)) => {
                        outage.over();
                        // At least a millisecond: Redis rounds times down.
                        next.map(|wait| wait.max(Duration::from_millis(1)))
                    }
                    Err(error) => {
                        // Only this place waits: the others may be on other nodes of a cluster.
                        outage.wait(&error);
                        Some(REST)
                    }
                };
                match next {
                    Some(wait) => self.due.insert(place, Instant::now() + wait),
                    None => self.due.remove(&place),
                };
            }
        }
    }
}
