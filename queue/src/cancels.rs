//! Tells handlers of plain jobs that a person wants the end of their job.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::{ids::JobId, ledger::Ledger};

/// Between two questions to the ledger.
const EVERY: Duration = Duration::from_secs(1);

/// The jobs that run here, each with what its handler hears of. While there are any, the ledger is asked once a second for all of
/// them together.
#[derive(Debug, Clone, Default)]
pub(crate) struct Cancels(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// By job and fence: an earlier delivery of the same job may not have noticed yet that it is over.
    running: HashMap<(JobId, i64), CancellationToken>,
    asking: bool,
}

/// A job that runs, until it is dropped.
#[derive(Debug)]
pub(crate) struct Watched {
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
    /// Watches over a job that runs under this fence.
    pub fn watch<L: Ledger>(&self, id: JobId, fence: i64, ledger: &L) -> Watched {
        let delivery = (id, fence);
        let token = CancellationToken::new();
        let begins = self.with(|state| {
            state.running.insert(delivery, token.clone());
            !std::mem::replace(&mut state.asking, true)
        });
        if begins {
            tokio::spawn(self.clone().ask(ledger.clone()));
        }
        Watched { delivery, cancels: self.clone(), token }
    }

    /// Until no job runs here.
    async fn ask<L: Ledger>(self, ledger: L) {
        loop {
            sleep(EVERY).await;
            let running: Vec<JobId> = self.with(|state| {
                state.asking = !state.running.is_empty();
                state.running.keys().map(|(id, _)| *id).collect()
            });
            if running.is_empty() {
                return;
            }
            match ledger.wanted_to_end(&running).await {
                Ok(wanted) => self.with(|state| {
                    for (_, token) in state.running.iter().filter(|((id, _), _)| wanted.contains(id)) {
                        token.cancel();
                    }
                }),
                Err(error) => tracing::debug!(%error, "can't look for requests to cancel"),
            }
        }
    }

    fn with<T>(&self, what: impl FnOnce(&mut State) -> T) -> T {
        what(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
