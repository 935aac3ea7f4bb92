//! Lets a circuit breaker stop and resume the claims of a queue.

use std::{collections::HashMap, sync::Arc};

use tokio::sync::watch;

use crate::ids::QueueName;

/// Which queues may be claimed from. All are open at first. Cheap to clone; all clones see the same gates.
#[derive(Debug, Clone)]
pub struct Gates {
    closed: Arc<watch::Sender<HashMap<QueueName, String>>>,
}

impl Default for Gates {
    fn default() -> Self {
        Self { closed: Arc::new(watch::Sender::new(HashMap::new())) }
    }
}

impl Gates {
    /// All gates open.
    pub fn new() -> Self {
        Self::default()
    }

    /// Claims nothing from the queue from now on; jobs that were claimed already go on. The reason is for people.
    pub fn close(&self, queue: &QueueName, reason: impl Into<String>) {
        let reason = reason.into();
        self.closed.send_if_modified(|closed| {
            closed.insert(queue.clone(), reason.clone()).as_ref() != Some(&reason)
        });
    }

    /// Claims from the queue again, at once.
    pub fn open(&self, queue: &QueueName) {
        self.closed.send_if_modified(|closed| closed.remove(queue).is_some());
    }

    /// Whether the queue may be claimed from.
    pub fn is_open(&self, queue: &QueueName) -> bool {
        !self.closed.borrow().contains_key(queue)
    }

    /// Why the queue is closed; `None` if it is open.
    pub fn reason(&self, queue: &QueueName) -> Option<String> {
        self.closed.borrow().get(queue).cloned()
    }

    /// Tells of every change; the value maps closed queues to their reasons.
    pub fn watch(&self) -> watch::Receiver<HashMap<QueueName, String>> {
        self.closed.subscribe()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_closed_gate_tells_its_reason_and_who_watches_hears_of_changes_only() {
        let (gates, queue) = (Gates::new(), QueueName::new("embed").unwrap());
        let mut watch = gates.watch();
        assert!(gates.is_open(&queue));
        gates.close(&queue, "qdrant is down");
        assert!(watch.has_changed().unwrap());
        watch.mark_unchanged();
        gates.close(&queue, "qdrant is down");
        assert!(!watch.has_changed().unwrap(), "closing twice is no change");
        assert_eq!(gates.clone().reason(&queue).as_deref(), Some("qdrant is down"));
        gates.open(&queue);
        assert!(gates.is_open(&queue) && watch.has_changed().unwrap());
    }
}
