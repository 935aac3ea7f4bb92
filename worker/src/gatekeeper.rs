//! Pauses a queue while a circuit breaker that its jobs need is open: its jobs are neither claimed nor charged.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use queue::{Gates, QueueName};
use sagas::{
    Dependency,
    engine::{Engine, breaker::State},
};
use tokio_util::sync::CancellationToken;

/// Closes and opens the gates of the queues that this process serves.
pub(crate) struct Gatekeeper {
    engine: Engine,
    gates: Gates,
    /// What each queue's jobs need: the kinds that wait there by default, and those that were seen there.
    needs: Mutex<HashMap<QueueName, BTreeSet<Dependency>>>,
}

impl Gatekeeper {
    /// Follows the breakers until `shutdown`.
    pub fn spawn(
        engine: &Engine,
        queues: &[QueueName],
        gates: &Gates,
        shutdown: &CancellationToken,
    ) -> Arc<Self> {
        let needs = queues
            .iter()
            .map(|queue| (queue.clone(), engine.queue_needs(queue.as_str()).into_iter().collect()))
            .collect();
        let this = Arc::new(Self { engine: engine.clone(), gates: gates.clone(), needs: Mutex::new(needs) });
        for dependency in Dependency::ALL {
            let (this, shutdown) = (Arc::clone(&this), shutdown.clone());
            tokio::spawn(async move {
                let Some(mut state) = this.engine.breakers().watch(dependency) else { return };
                loop {
                    tokio::select! {
                        () = shutdown.cancelled() => return,
                        changed = state.changed() => if changed.is_err() { return },
                    }
                    let needs = this.needs();
                    needs.iter().for_each(|(queue, needs)| this.settle(queue, needs));
                }
            });
        }
        this
    }

    /// Notes that jobs of this kind wait in a queue, which need not be the kind's own.
    pub fn saw(&self, queue: &QueueName, kind: &str) {
        let mut all = self.needs();
        let Some(needs) = all.get_mut(queue) else { return };
        let known = needs.len();
        needs.extend(self.engine.needs(kind));
        if needs.len() > known {
            self.settle(queue, needs);
        }
    }

    fn settle(&self, queue: &QueueName, needs: &BTreeSet<Dependency>) {
        let breakers = self.engine.breakers();
        let down: Vec<&str> =
            needs.iter().filter(|d| breakers.state(**d) != State::Closed).map(|d| d.name()).collect();
        if down.is_empty() {
            self.gates.open(queue);
        } else {
            self.gates.close(queue, format!("{} down", down.join(", ")));
        }
    }

    fn needs(&self) -> MutexGuard<'_, HashMap<QueueName, BTreeSet<Dependency>>> {
        self.needs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
