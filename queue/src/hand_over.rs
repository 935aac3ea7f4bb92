//! Where claimed jobs wait for whoever runs them.
//!
//! A batch is handed over under one lock and with one wake-up, and taken one by one without waking the claimer. Unlike
//! what is in a channel, jobs that nobody has taken can be given back when either side ends.

use std::{
    collections::VecDeque,
    future::poll_fn,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    task::{Context, Poll, Waker},
};

use apalis_core::worker::context::WorkerContext;
use tokio::sync::Notify;

use crate::claimer::Job;

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// Told when the last waiting job was taken, and when the receiver is gone.
    claimer: Notify,
    /// The apalis worker that receives, if there is one.
    worker: OnceLock<WorkerContext>,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Job>,
    /// The receiver takes no more.
    closed: bool,
    /// The claimer hands nothing over any more.
    ended: bool,
    receiver: Option<Waker>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The claimer's side. When it is dropped, the receiver ends.
pub(crate) struct HandOver(Arc<Shared>);

/// Claimed jobs, in the order in which they were claimed. What was not received when this is dropped or
/// [closed](Self::close) goes back to its queue.
pub struct Jobs(Arc<Shared>);

pub(crate) fn hand_over() -> (HandOver, Jobs) {
    let shared = Arc::new(Shared::default());
    (HandOver(Arc::clone(&shared)), Jobs(shared))
}

impl HandOver {
    pub(crate) fn give(&self, jobs: impl IntoIterator<Item = Job>) {
        let mut state = self.0.lock();
        state.waiting.extend(jobs);
        let receiver = state.receiver.take();
        drop(state);
        if let Some(receiver) = receiver {
            receiver.wake();
        }
    }

    /// Whether every job was taken.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.lock().waiting.is_empty()
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.0.lock().closed
    }

    /// Whether the worker that receives takes nothing now, because it stops or pauses.
    pub(crate) fn is_at_rest(&self) -> bool {
        self.0.worker.get().is_some_and(|worker| worker.is_shutting_down() || worker.is_paused())
    }

    /// Returns when the last waiting job was taken, or when the receiver is gone; perhaps for nothing. Cancel-safe.
    pub(crate) async fn changed(&self) {
        self.0.claimer.notified().await;
    }

    /// Takes back what nobody has taken.
    pub(crate) fn take_back(&self) -> VecDeque<Job> {
        std::mem::take(&mut self.0.lock().waiting)
    }
}

impl Drop for HandOver {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.ended = true;
        let receiver = state.receiver.take();
        drop(state);
        if let Some(receiver) = receiver {
            receiver.wake();
        }
    }
}

impl Jobs {
    /// The next job; `None` when the claimer has ended. Cancel-safe.
    pub async fn recv(&mut self) -> Option<Job> {
        poll_fn(|cx| self.poll_recv(cx)).await
    }

    /// As [`recv`](Self::recv), by hand.
    pub fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<Option<Job>> {
        let mut state = self.0.lock();
        while let Some(job) = state.waiting.pop_front() {
            let was_last = state.waiting.is_empty();
            if was_last {
                self.0.claimer.notify_one();
            }
            // A lease may have been lost while the job waited here.
            if !job.lease.is_lost() {
                return Poll::Ready(Some(job));
            }
        }
        if state.ended || state.closed {
            return Poll::Ready(None);
        }
        state.receiver = Some(cx.waker().clone());
        Poll::Pending
    }

    /// While this worker stops or pauses, nothing is claimed, and what waits goes back.
    pub(crate) fn follow(&self, worker: &WorkerContext) {
        self.0.worker.get_or_init(|| worker.clone());
    }

    /// Takes no more jobs; the claimer ends and gives back what waits.
    pub fn close(&mut self) {
        self.0.lock().closed = true;
        self.0.claimer.notify_one();
    }
}

impl Drop for Jobs {
    fn drop(&mut self) {
        self.close();
    }
}

impl std::fmt::Debug for Jobs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Jobs").field("waiting", &self.0.lock().waiting.len()).finish_non_exhaustive()
    }
}
