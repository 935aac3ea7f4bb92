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
        for dependency in engine.breakers().dependencies() {
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::{
        sync::atomic::{AtomicBool, Ordering},
        time::Duration,
    };

    use queue::WorkerId;
    use sagas::{
        Class, Registry, Saga, Step, StepError, StoreError, TakenJob,
        engine::{Breakers, EngineSettings, Probe},
        stores::postgres::{Postgres, PostgresConfig},
    };
    use serde_json::Value;

    use super::*;

    const SHOP: Dependency = Dependency::Other("shop");

    struct Order(Vec<Arc<dyn Step<Value>>>);

    impl Saga for Order {
        type Data = Value;
        fn kind(&self) -> &'static str {
            "order"
        }
        fn version(&self) -> i32 {
            1
        }
        fn steps(&self) -> &[Arc<dyn Step<Value>>] {
            &self.0
        }
        fn pivot(&self) -> usize {
            0
        }
        fn needs(&self) -> &[Dependency] {
            &[Dependency::Postgres, SHOP]
        }
        fn prepare(&self, _: &TakenJob) -> Result<Value, StepError> {
            Ok(Value::Null)
        }
    }

    #[tokio::test]
    async fn protocol_16_a_queue_waits_for_a_store_of_the_users_own_and_for_no_longer() {
        let shutdown = CancellationToken::new();
        let _stop = shutdown.clone().drop_guard();
        let away = |name| StoreError::new(Dependency::Other(name), Class::Unavailable, "away");
        let up = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&up);
        let probe: Probe = Arc::new(move || {
            let answer = if seen.load(Ordering::SeqCst) { Ok(()) } else { Err(away("shop")) };
            Box::pin(async move { answer })
        });
        let breakers = Breakers::new([(SHOP, probe)], shutdown.clone());
        // Never asked.
        let postgres = Postgres::lazy(&PostgresConfig::new("postgres://u@127.0.0.1:1/none")).unwrap();
        let registry = Registry::default().with(Order(vec![]));
        let settings = EngineSettings::default();
        let engine = Engine::new(postgres, breakers.clone(), WorkerId::new("w"), settings, registry);
        let (gates, order) = (Gates::new(), QueueName::new("order").unwrap());
        Gatekeeper::spawn(&engine, std::slice::from_ref(&order), &gates, &shutdown);
        let mut closed = gates.watch();
        let within = Duration::from_secs(30);

        assert!(breakers.confirm_outage(SHOP, &away("shop")).await);
        tokio::time::timeout(within, closed.wait_for(|closed| closed.contains_key(&order)))
            .await
            .unwrap()
            .unwrap();
        up.store(true, Ordering::SeqCst);
        tokio::time::timeout(within, closed.wait_for(|closed| !closed.contains_key(&order)))
            .await
            .unwrap()
            .unwrap();
    }
}
