//! Tells running jobs that a person wants their end.

use std::{
    collections::HashMap,
    fmt::Display,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures::{FutureExt, TryFutureExt, future::BoxFuture};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::ids::JobId;

/// Between two questions to the ledger.
const EVERY: Duration = Duration::from_secs(1);

/// The jobs that run in this process, each with what it hears of. While there are any, the ledger is asked once a second for all
/// of them together. Clones share everything.
#[derive(Clone)]
pub struct Cancels(Arc<Shared>);

/// Those of the jobs whose end is wanted, or why nobody knows.
type Answer = BoxFuture<'static, Result<Vec<JobId>, String>>;

struct Shared {
    ask: Box<dyn Fn(Vec<JobId>) -> Answer + Send + Sync>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// By job and fence: an earlier delivery of the same job may not have noticed yet that it is over.
    running: HashMap<(JobId, i64), CancellationToken>,
    asking: bool,
}

impl std::fmt::Debug for Cancels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Cancels").field(&self.0.state).finish()
    }
}

/// A delivery that runs, until this is dropped.
#[derive(Debug)]
pub struct Watched {
    delivery: (JobId, i64),
    cancels: Cancels,
    /// Cancelled when a person wants the job's end.
    pub token: CancellationToken,
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.cancels.with(|state| state.running.remove(&self.delivery));
    }
}

impl Cancels {
    /// `ask` answers which of these jobs a person wants to end. Its errors are logged; it is asked again.
    pub fn new<F, E>(ask: impl Fn(Vec<JobId>) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = Result<Vec<JobId>, E>> + Send + 'static,
        E: Display,
    {
        let ask = Box::new(move |jobs| ask(jobs).map_err(|error| error.to_string()).boxed());
        Self(Arc::new(Shared { ask, state: Mutex::default() }))
    }

    /// Watches over a job that runs under this fence. Needs a tokio runtime.
    pub fn watch(&self, id: JobId, fence: i64) -> Watched {
        let delivery = (id, fence);
        let token = CancellationToken::new();
        let begins = self.with(|state| {
            state.running.insert(delivery, token.clone());
            !std::mem::replace(&mut state.asking, true)
        });
        if begins {
            tokio::spawn(self.clone().ask());
        }
        Watched { delivery, cancels: self.clone(), token }
    }

    /// Until no job runs here.
    async fn ask(self) {
        loop {
            sleep(EVERY).await;
            let running: Vec<JobId> = self.with(|state| {
                state.asking = !state.running.is_empty();
                state.running.keys().map(|(id, _)| *id).collect()
            });
            if running.is_empty() {
                return;
            }
            match (self.0.ask)(running).await {
                Ok(wanted) => self.with(|state| {
                    for (_, token) in state.running.iter().filter(|((id, _), _)| wanted.contains(id)) {
                        token.cancel();
                    }
                }),
                Err(error) => tracing::debug!(error, "can't look for requests to cancel"),
            }
        }
    }

    fn with<T>(&self, what: impl FnOnce(&mut State) -> T) -> T {
        what(&mut self.0.state.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::convert::Infallible;

    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn the_end_of_a_lost_delivery_leaves_the_next_one_of_the_same_job_watched() {
        let cancels = Cancels::new(async |jobs| Ok::<_, Infallible>(jobs));
        let job = JobId::new();
        let (lost, next) = (cancels.watch(job, 1), cancels.watch(job, 2));
        drop(lost);
        timeout(Duration::from_secs(10), next.token.cancelled()).await.unwrap();
    }
}
