//! Circuit breakers, one for each dependency: while one is open nothing is asked of it but a probe, and the jobs that need it
//! wait without being charged (PROTOCOL.md 16).
//!
//! A breaker is this process's own: it opens when a call and then a probe fail *here*, and closes when a probe succeeds *here*.
//! What other processes tell through [`Breakers::share`] only moves the moment at which it is probed here, so a process that
//! alone is cut off opens nobody's breaker but its own.

use std::{
    collections::HashMap,
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::{
    FutureExt,
    future::{BoxFuture, select_all},
};
use metrics::{counter, gauge};
use queue::{BreakerBoard, BreakerNews, BreakerReport, Queue, QueueError, WorkerId};
use tokio::{
    sync::{Notify, watch},
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::error::{Class, Dependency, StoreError};

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
    /// Another process may have opened its breaker.
    elsewhere_open: Notify,
    /// Another process has closed its breaker.
    elsewhere_closed: Notify,
}

/// The process's breakers; clones share them.
#[derive(Clone)]
pub struct Breakers {
    by_dependency: Arc<HashMap<Dependency, Breaker>>,
    board: Option<Arc<Board>>,
    shutdown: CancellationToken,
}

/// Between probes of an open breaker, give or take a fifth.
const PROBE_EVERY: Duration = Duration::from_millis(250);
/// What a probe that has not ended by then is taken to say: down.
const PROBE_WITHIN: Duration = Duration::from_secs(3);
/// Who hears news probes within this time, not all at the same moment.
const SPREAD: Duration = Duration::from_millis(100);
/// News of one dependency is looked into at most so often, however often others open and close.
const LOOK_GAP: Duration = Duration::from_secs(1);
/// Looks at the board although no news came, give or take a fifth: news may get lost.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// The board has to answer within this time; a process that waits for it would see an outage or its end too late.
const BOARD_WITHIN: Duration = Duration::from_millis(300);
/// After a failure of the board it is left alone for so long.
const BOARD_REST: Duration = Duration::from_secs(1);

/// What the processes share, in the queue's Redis.
struct Board {
    queue: Queue,
    worker: WorkerId,
    rests_until: Mutex<Option<Instant>>,
}

impl Board {
    /// `None`: Redis is away, so this process goes by what it sees itself.
    async fn report(&self, dependency: Dependency, report: BreakerReport) -> Option<BreakerBoard> {
        let rests = *self.rests_until.lock().unwrap_or_else(PoisonError::into_inner);
        if rests.is_some_and(|until| Instant::now() < until) {
            return None;
        }
        let asked = self.queue.report_breaker(&self.worker, dependency.name(), report);
        let late = |_| Err(QueueError::Unavailable(format!("no answer within {BOARD_WITHIN:?}")));
        match timeout(BOARD_WITHIN, asked).await.unwrap_or_else(late) {
            Ok(board) => Some(board),
            Err(error) => {
                tracing::debug!(%dependency, %error, "the board of circuit breakers is away");
                let until = Instant::now() + BOARD_REST;
                *self.rests_until.lock().unwrap_or_else(PoisonError::into_inner) = Some(until);
                None
            }
        }
    }
}

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
                        elsewhere_open: Notify::new(),
                        elsewhere_closed: Notify::new(),
                    },
                )
            })
            .collect();
        Self { by_dependency: Arc::new(breakers), board: None, shutdown }
    }

    /// Shares what these breakers see with those of other processes over the same queue: they open together, and one
    /// process at a time probes for all. Call it before cloning. Its tasks end with the shutdown given to
    /// [`new`](Self::new). While that Redis is away each process probes for itself.
    #[must_use]
    pub fn share(mut self, queue: Queue, worker: WorkerId) -> Self {
        let news = queue.breaker_news(worker.clone(), self.shutdown.clone());
        self.board = Some(Arc::new(Board { queue, worker, rests_until: Mutex::default() }));
        for dependency in self.by_dependency.keys().copied() {
            let this = self.clone();
            tokio::spawn(async move {
                tokio::select! {
                    () = this.shutdown.cancelled() => {}
                    () = this.look_out(dependency) => {}
                }
            });
        }
        let this = self.clone();
        tokio::spawn(async move { this.hear(news).await });
        self
    }

    async fn hear(&self, mut news: tokio::sync::mpsc::Receiver<BreakerNews>) {
        let named = |name: &str| self.by_dependency.iter().find(|(dependency, _)| dependency.name() == name);
        while let Some(one) = news.recv().await {
            match one {
                BreakerNews::Opened(name) => {
                    if let Some((_, breaker)) = named(&name) {
                        breaker.elsewhere_open.notify_one();
                    }
                }
                BreakerNews::Closed(name) => {
                    if let Some((_, breaker)) = named(&name)
                        && *breaker.state.borrow() != State::Closed
                    {
                        breaker.elsewhere_closed.notify_one();
                    }
                }
                BreakerNews::Listening => {
                    self.by_dependency.values().for_each(|breaker| breaker.elsewhere_open.notify_one());
                }
            }
        }
    }

    /// While others report a dependency down, makes sure by a probe whether it is down here, too.
    async fn look_out(&self, dependency: Dependency) {
        let Some(breaker) = self.by_dependency.get(&dependency) else { return };
        let Some(board) = &self.board else { return };
        loop {
            tokio::select! {
                () = breaker.elsewhere_open.notified() => {}
                () = sleep(about(LOOK_EVERY)) => {}
            }
            if *breaker.state.borrow() == State::Closed
                && board.report(dependency, BreakerReport::Look).await.is_some_and(|board| board.open > 0)
            {
                sleep(SPREAD.mul_f64(rand::random_range(0.0..=1.0))).await;
                if !self.confirm(dependency, &"another worker reports it down").await {
                    tracing::debug!(%dependency, "another worker reports it down, but it answers here");
                }
                sleep(LOOK_GAP).await;
            }
        }
    }

    /// Waits until the dependency's breaker is closed. Cancel-safe.
    pub async fn closed(&self, dependency: Dependency) {
        let Some(breaker) = self.by_dependency.get(&dependency) else { return };
        let mut state = breaker.state.subscribe();
        // The sender lives in `self`, so waiting can't fail.
        if state.wait_for(|s| *s == State::Closed).await.is_err() {
            tracing::debug!(%dependency, "breaker gone");
        }
    }

    /// Waits until one of the breakers is not closed. Cancel-safe.
    pub async fn any_open(&self) {
        let opens = self.by_dependency.values().map(|breaker| {
            let mut state = breaker.state.subscribe();
            // The sender lives in `self`.
            async move { state.wait_for(|state| *state != State::Closed).await.is_ok() }.boxed()
        });
        let opens: Vec<_> = opens.collect();
        if opens.is_empty() {
            return std::future::pending().await;
        }
        select_all(opens).await;
    }

    /// The breaker's state now.
    pub fn state(&self, dependency: Dependency) -> State {
        self.by_dependency.get(&dependency).map_or(State::Closed, |b| *b.state.borrow())
    }

    /// What has a breaker: Flotilla's own dependencies, and those of the user's own that have a probe.
    pub fn dependencies(&self) -> Vec<Dependency> {
        let mut all: Vec<Dependency> = self.by_dependency.keys().copied().collect();
        all.sort_unstable();
        all
    }

    /// Follows a breaker's state.
    pub fn watch(&self, dependency: Dependency) -> Option<watch::Receiver<State>> {
        self.by_dependency.get(&dependency).map(|b| b.state.subscribe())
    }

    /// After a call that failed as an outage does or had no answer: asks the dependency itself. Opens the breaker and
    /// returns `true` if the probe fails too. Otherwise the trouble was that call's alone.
    pub async fn confirm_outage(&self, dependency: Dependency, error: &StoreError) -> bool {
        self.confirm(dependency, error).await
    }

    async fn confirm(&self, dependency: Dependency, why: &(dyn std::fmt::Display + Sync)) -> bool {
        let Some(breaker) = self.by_dependency.get(&dependency) else { return false };
        let _asking = breaker.asking.lock().await;
        if *breaker.state.borrow() != State::Closed {
            return true;
        }
        if breaker.asked(dependency).await.is_ok() {
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
            tracing::warn!(%dependency, %why, "circuit breaker opens: pausing the jobs that need it");
            report(dependency, State::Open);
            let this = self.clone();
            tokio::spawn(async move { this.probe_until_closed(dependency).await });
        }
        true
    }

    async fn probe_until_closed(&self, dependency: Dependency) {
        let Some(breaker) = self.by_dependency.get(&dependency) else { return };
        let set = |state| {
            breaker.state.send_replace(state);
            report(dependency, state);
        };
        // Tells the others.
        let mut closed_before =
            self.report(dependency, BreakerReport::Open).await.map(|board| board.closed_ms);
        let mut pause = about(PROBE_EVERY);
        loop {
            let told = tokio::select! {
                () = self.shutdown.cancelled() => return,
                () = breaker.elsewhere_closed.notified() => true,
                () = sleep(pause) => false,
            };
            pause = about(PROBE_EVERY);
            if told {
                sleep(SPREAD.mul_f64(rand::random_range(0.0..=1.0))).await;
            } else if let Some(board) = self.report(dependency, BreakerReport::Open).await {
                let closed_meanwhile = closed_before.replace(board.closed_ms) != Some(board.closed_ms);
                let ours = self.board.as_ref().map(|board| &board.worker) == board.turn.as_ref();
                if !ours && !closed_meanwhile {
                    pause = board.next_turn + SPREAD.mul_f64(rand::random_range(0.0..=1.0));
                    continue;
                }
            }
            set(State::HalfOpen);
            match breaker.asked(dependency).await {
                Ok(()) => {
                    tracing::info!(%dependency, "circuit breaker closes: the dependency answers again");
                    set(State::Closed);
                    self.report(dependency, BreakerReport::Closed).await;
                    return;
                }
                Err(error) => {
                    tracing::debug!(%dependency, %error, "still down");
                    set(State::Open);
                }
            }
        }
    }

    async fn report(&self, dependency: Dependency, report: BreakerReport) -> Option<BreakerBoard> {
        self.board.as_ref()?.report(dependency, report).await
    }
}

impl Breaker {
    async fn asked(&self, dependency: Dependency) -> Result<(), StoreError> {
        let down = |why: &str| Err(StoreError::new(dependency, Class::Unavailable, why));
        // A user's own may hang, or panic: whoever waited for it would wait for ever.
        let asked = AssertUnwindSafe(async { (self.probe)().await }).catch_unwind();
        let answer = match timeout(PROBE_WITHIN, asked).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => down("its probe panicked"),
            Err(_) => down("its probe has no answer"),
        };
        let outcome = if answer.is_ok() { "up" } else { "down" };
        counter!("circuit_breaker_probes_total", "dependency" => dependency.name(), "outcome" => outcome)
            .increment(1);
        answer
    }
}

/// This time, give or take a fifth, so that processes don't act in step.
fn about(time: Duration) -> Duration {
    time.mul_f64(rand::random_range(0.8..=1.2))
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

    #[tokio::test(start_paused = true)]
    async fn a_probe_that_panics_or_hangs_says_down_and_is_asked_again() {
        for hangs in [false, true] {
            let asked = Arc::new(std::sync::atomic::AtomicU32::new(0));
            let probe: Probe = {
                let asked = Arc::clone(&asked);
                Arc::new(move || {
                    let times = asked.fetch_add(1, Ordering::SeqCst);
                    Box::pin(async move {
                        match (times, hangs) {
                            (0 | 1, true) => std::future::pending().await,
                            (0 | 1, false) => panic!("a bug in a user's probe"),
                            _ => Ok(()),
                        }
                    })
                })
            };
            let breakers = Breakers::new([(Dependency::Cache, probe)], CancellationToken::new());
            let error = StoreError::new(Dependency::Cache, Class::Unavailable, "reset");
            assert!(breakers.confirm_outage(Dependency::Cache, &error).await);
            breakers.any_open().await;
            breakers.closed(Dependency::Cache).await;
            assert_eq!(asked.load(Ordering::SeqCst), 3);
        }
    }

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
