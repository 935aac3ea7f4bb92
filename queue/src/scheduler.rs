//! Moves scheduled jobs to their lists when their time has come.

use std::{collections::HashMap, time::Duration};

use tokio::{
    task::JoinHandle,
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;

use crate::{error::QueueError, ids::QueueName, outage::Outage, queue::Queue};

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
            match self.look(next_poll <= Instant::now()).await {
                Ok(()) => outage.over(),
                Err(error) => {
                    let pause: Duration = outage.wait(&error);
                    self.due.clear();
                    next_poll = Instant::now() + pause;
                    continue;
                }
            }
            if next_poll <= Instant::now() {
                next_poll = Instant::now() + poll;
            }
        }
    }

    async fn look(&mut self, poll: bool) -> Result<(), QueueError> {
        let now = Instant::now();
        let mut places: Vec<(QueueName, u16)> =
            self.due.iter().filter(|(_, due)| **due <= now).map(|(place, _)| place.clone()).collect();
        if poll {
            for name in &self.queues {
                let place = (name.clone(), self.turn);
                if !places.contains(&place) {
                    places.push(place);
                }
            }
            self.turn = (self.turn + 1) % self.queue.config().partitions;
        }
        for place in places {
            let (_, next) = self.queue.promote_partition(&place.0, place.1).await?;
            match next {
                // At least a millisecond: Redis rounds times down.
                Some(wait) => self.due.insert(place, Instant::now() + wait.max(Duration::from_millis(1))),
                None => self.due.remove(&place),
            };
        }
        Ok(())
    }
}
