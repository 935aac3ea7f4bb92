//! Hears at once when a queue stops being empty.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures::StreamExt;
use tokio::{
    sync::Notify,
    time::{Instant, sleep, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;

use crate::{error::QueueError, ids::QueueName, outage::Outage, partition::wake_channel, queue::Queue};

/// How often an idle subscription is checked; a peer that vanished silently would never say anything again. The
/// worker's safety poll covers the time between.
const CHECK_EVERY: Duration = Duration::from_secs(15);

/// The partitions that one claimer serves, and which of them may hold something to claim.
pub(crate) struct Places {
    pub spots: Vec<(QueueName, u16)>,
    hot: Vec<AtomicBool>,
    changed: Notify,
}

impl Places {
    pub(crate) fn new(queues: &[QueueName], partitions: u16) -> Self {
        // Partition by partition, so that taking places in turn takes queues in turn.
        let spots: Vec<_> = (0..partitions)
            .flat_map(|partition| queues.iter().map(move |queue| (queue.clone(), partition)))
            .collect();
        let hot = spots.iter().map(|_| AtomicBool::new(true)).collect();
        Self { spots, hot, changed: Notify::new() }
    }

    pub(crate) fn is_hot(&self, index: usize) -> bool {
        self.hot[index].load(Ordering::Acquire)
    }

    pub(crate) fn heat(&self, index: usize) {
        self.hot[index].store(true, Ordering::Release);
        self.changed.notify_one();
    }

    /// Call it before claiming: a wake-up that comes after the claim ran must not be wiped out.
    pub(crate) fn cool(&self, index: usize) {
        self.hot[index].store(false, Ordering::Release);
    }

    pub(crate) fn heat_all(&self) {
        for hot in &self.hot {
            hot.store(true, Ordering::Release);
        }
        self.changed.notify_one();
    }

    /// Returns after `heat` or `heat_all` since the last return. Cancel-safe.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }
}

/// Listens, on one connection for all places, until stopped; connects again by itself.
pub(crate) async fn listen(queue: Queue, places: Arc<Places>, stop: CancellationToken) {
    let mut outage = Outage::new("wake-ups");
    loop {
        let heard = tokio::select! {
            () = stop.cancelled() => return,
            heard = subscription(&queue, &places, &mut outage) => heard,
        };
        let Err(error) = heard;
        let pause = outage.wait(&error);
        tokio::select! {
            () = stop.cancelled() => return,
            () = sleep(pause) => {}
        }
    }
}

/// One subscription, until it breaks.
async fn subscription(
    queue: &Queue,
    places: &Places,
    outage: &mut Outage,
) -> Result<std::convert::Infallible, QueueError> {
    let config = queue.config();
    let channels: HashMap<String, usize> = places
        .spots
        .iter()
        .enumerate()
        .map(|(index, (queue, partition))| (wake_channel(config, queue, *partition), index))
        .collect();
    let late = |_| QueueError::Unavailable("no subscription in time".to_owned());
    let (mut sink, mut messages) = queue.subscribe().await?.split();
    let names: Vec<&String> = channels.keys().collect();
    timeout(config.response_timeout, sink.subscribe(&names)).await.map_err(late)??;
    // What was pushed before the subscription began made no sound here.
    places.heat_all();
    outage.over();
    let mut next_check = Instant::now() + CHECK_EVERY;
    loop {
        match timeout_at(next_check, messages.next()).await {
            Ok(Some(message)) => {
                if let Some(index) = channels.get(message.get_channel_name()) {
                    places.heat(*index);
                }
            }
            Ok(None) => return Err(QueueError::Unavailable("the subscription ended".to_owned())),
            Err(_) => {
                let pong: redis::Value =
                    timeout(config.response_timeout, sink.ping()).await.map_err(late)??;
                tracing::trace!(?pong, "the subscription stands");
                next_check = Instant::now() + CHECK_EVERY;
            }
        }
    }
}
