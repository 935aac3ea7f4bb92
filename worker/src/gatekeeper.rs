//! Pauses a queue while a circuit breaker that its jobs need is open: its jobs are neither claimed nor charged.

use queue::{Gates, QueueName};
use sagas::{
    Dependency,
    engine::{Breakers, Engine, breaker::State},
};
use tokio_util::sync::CancellationToken;

/// Follows the breakers until `shutdown`.
pub(crate) fn spawn(engine: &Engine, queues: &[QueueName], gates: &Gates, shutdown: &CancellationToken) {
    for queue in queues {
        let needs = engine.queue_needs(queue.as_str());
        for need in &needs {
            tokio::spawn(follow(
                engine.breakers().clone(),
                *need,
                needs.clone(),
                queue.clone(),
                gates.clone(),
                shutdown.clone(),
            ));
        }
    }
}

async fn follow(
    breakers: Breakers,
    need: Dependency,
    needs: Vec<Dependency>,
    queue: QueueName,
    gates: Gates,
    shutdown: CancellationToken,
) {
    let Some(mut state) = breakers.watch(need) else { return };
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            changed = state.changed() => if changed.is_err() { return },
        }
        let down: Vec<&str> =
            needs.iter().filter(|d| breakers.state(**d) != State::Closed).map(|d| d.name()).collect();
        if down.is_empty() {
            gates.open(&queue);
        } else {
            gates.close(&queue, format!("{} down", down.join(", ")));
        }
    }
}
