//! Circuit breakers, one for each dependency: while one is open nothing is asked of it but a probe, and the jobs that need it
//! wait without being charged (PROTOCOL.md 16).

use std::{collections::HashMap, sync::Arc, time::Duration};

use futures::future::BoxFuture;
use metrics::gauge;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::error::{Dependency, StoreError};

/// The state of one breaker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Calls pass.
    Closed,
    /// A probe is under way; calls wait.
    HalfOpen,
    /// Calls wait for the next probe.
    Open,
}

/// Asks a dependency whether it answers, within about a second, on a connection of its own.
pub type Probe = Arc<dyn Fn() -> BoxFuture<'static, Result<(), StoreError>> + Send + Sync>;

struct Breaker {
    state: watch::Sender<State>,
    probe: Probe,
    /// Many calls fail at once in an outage; one of them asks.
    asking: tokio::sync::Mutex<()>,
}

/// The process's breakers; clones share them.
#[derive(Clone)]
pub struct Breakers {
    breakers: Arc<HashMap<Dependency, Breaker>>,
    shutdown: CancellationToken,
}

/// Between probes of an open breaker.
const PROBE_EVERY: Duration = Duration::from_millis(250);

impl Breakers {
    /// Closed breakers with these probes. Their probing tasks end with `shutdown`.
    pub fn new(probes: impl IntoIterator<Item = (Dependency, Probe)>, shutdown: CancellationToken) -> Self {
        let breakers = probes
            .into_iter()
            .map(|(dependency, probe)| {
                report(dependency, State::Closed);
                (
                    dependency,
                    Breaker {
                        state: watch::Sender::new(State::Closed),
                        probe,
                        asking: tokio::sync::Mutex::default(),
                    },
                )
            })
            .collect();
        Self { breakers: Arc::new(breakers), shutdown }
    }

    /// Waits until the dependency's breaker is closed. Cancel-safe.
    pub async fn closed(&self, dependency: Dependency) {
        let Some(breaker) = self.breakers.get(&dependency) else { return };
        let mut state = breaker.state.subscribe();
        // The sender lives in `self`, so waiting can't fail.
        if state.wait_for(|s| *s == State::Closed).await.is_err() {
            tracing::debug!(%dependency, "breaker gone");
        }
    }

    /// The breaker's state now.
    pub fn state(&self, dependency: Dependency) -> State {
        self.breakers.get(&dependency).map_or(State::Closed, |b| *b.state.borrow())
    }

    /// Follows a breaker's state.
    pub fn watch(&self, dependency: Dependency) -> Option<watch::Receiver<State>> {
        self.breakers.get(&dependency).map(|b| b.state.subscribe())
    }

    /// After a call that failed as an outage does or had no answer: asks the dependency itself. Opens the breaker and
    /// returns `true` if the probe fails too. Otherwise the trouble was that call's alone.
    pub async fn confirm_outage(&self, dependency: Dependency, error: &StoreError) -> bool {
        let Some(breaker) = self.breakers.get(&dependency) else { return false };
        let _asking = breaker.asking.lock().await;
        if *breaker.state.borrow() != State::Closed {
            return true;
        }
        if (breaker.probe)().await.is_ok() {
            return false;
        }
        let opened = breaker.state.send_if_modified(|state| {
            let closed = *state == State::Closed;
            if closed {
                *state = State::Open;
            }
            closed
        });
        if opened {
            tracing::warn!(%dependency, %error, "circuit breaker opens: pausing the jobs that need it");
            report(dependency, State::Open);
            let this = self.clone();
            tokio::spawn(async move { this.probe_until_closed(dependency).await });
        }
        true
    }

    async fn probe_until_closed(&self, dependency: Dependency) {
        let Some(breaker) = self.breakers.get(&dependency) else { return };
        loop {
            tokio::select! {
                () = self.shutdown.cancelled() => return,
                () = tokio::time::sleep(PROBE_EVERY) => {}
            }
            let set = |state| {
                breaker.state.send_replace(state);
                report(dependency, state);
            };
            set(State::HalfOpen);
            match (breaker.probe)().await {
                Ok(()) => {
                    tracing::info!(%dependency, "circuit breaker closes: the dependency answers again");
                    return set(State::Closed);
                }
                Err(error) => {
                    tracing::debug!(%dependency, %error, "still down");
                    set(State::Open);
                }
            }
        }
    }
}

fn report(dependency: Dependency, state: State) {
    let value = match state {
        State::Closed => 0.0,
        State::HalfOpen => 1.0,
        State::Open => 2.0,
    };
    gauge!("circuit_breaker_state", "dependency" => dependency.name()).set(value);
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::error::Class;

    #[tokio::test(start_paused = true)]
    async fn opens_only_when_the_probe_fails_too_and_closes_by_a_probe() {
        let up = Arc::new(AtomicBool::new(true));
        let probe: Probe = {
            let up = Arc::clone(&up);
            Arc::new(move || {
                let up = up.load(Ordering::SeqCst);
                Box::pin(async move {
                    if up {
                        Ok(())
                    } else {
                        Err(StoreError::new(Dependency::Cache, Class::Unavailable, "down"))
                    }
                })
            })
        };
        let breakers = Breakers::new([(Dependency::Cache, probe)], CancellationToken::new());
        let error = StoreError::new(Dependency::Cache, Class::Unavailable, "reset");
        assert!(!breakers.confirm_outage(Dependency::Cache, &error).await);
        assert_eq!(breakers.state(Dependency::Cache), State::Closed);
        up.store(false, Ordering::SeqCst);
        assert!(breakers.confirm_outage(Dependency::Cache, &error).await);
        assert_ne!(breakers.state(Dependency::Cache), State::Closed);
        assert!(
            tokio::time::timeout(Duration::from_secs(60), breakers.closed(Dependency::Cache)).await.is_err()
        );
        up.store(true, Ordering::SeqCst);
        tokio::time::timeout(Duration::from_secs(60), breakers.closed(Dependency::Cache)).await.unwrap();
    }
}
