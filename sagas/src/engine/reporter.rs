//! The reporter: writes what running jobs say of their progress, a few times a second for all of them together.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use queue::JobId;
use tokio::sync::Notify;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::stores::postgres::{Postgres, progress::Progress};

/// Between two writes. A job's progress is so never written more often, however often it is told; the last word wins.
pub(super) const EVERY: Duration = Duration::from_millis(500);

/// A handle; the loop ends with the last one.
#[derive(Clone)]
pub(super) struct Reporter {
    shared: Arc<Shared>,
}

struct Shared {
    inbox: Arc<Inbox>,
    postgres: Postgres,
    /// Stops the loop; set by the first report, so that a process without any runs no loop.
    running: Mutex<Option<DropGuard>>,
}

#[derive(Default)]
struct Inbox {
    latest: Mutex<HashMap<JobId, Progress>>,
    came: Notify,
}

impl Inbox {
    // A plain mutex: it is held for a map's insert and never across an await.
    fn latest(&self) -> MutexGuard<'_, HashMap<JobId, Progress>> {
        self.latest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Reporter {
    pub fn new(postgres: Postgres) -> Self {
        Self { shared: Arc::new(Shared { inbox: Arc::default(), postgres, running: Mutex::default() }) }
    }

    /// Takes a job's newest word; it is written within [`EVERY`]. Needs a tokio runtime.
    pub fn report(&self, progress: Progress) {
        let Shared { inbox, postgres, running } = &*self.shared;
        inbox.latest().insert(progress.job, progress);
        inbox.came.notify_one();
        running.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(|| {
            let stop = CancellationToken::new();
            tokio::spawn(run(Arc::clone(inbox), postgres.clone(), stop.clone()));
            stop.drop_guard()
        });
    }
}

async fn run(inbox: Arc<Inbox>, postgres: Postgres, stop: CancellationToken) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = inbox.came.notified() => {}
        }
        let reports: Vec<Progress> = std::mem::take(&mut *inbox.latest()).into_values().collect();
        let write = tokio::time::timeout(postgres.call_timeout(), postgres.record_progress(&reports));
        match write.await {
            Ok(Ok(written)) if written.len() < reports.len() => {
                tracing::debug!(
                    refused = reports.len() - written.len(),
                    "progress of jobs that are not ours any more"
                );
            }
            Ok(Ok(_)) => {}
            Ok(Err(error)) => {
                tracing::debug!(%error, "progress can't be written now");
                put_back(&inbox, reports);
            }
            Err(_) => put_back(&inbox, reports),
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(EVERY) => {}
        }
    }
}

/// The last word stands, also through an outage; a newer one replaces it.
fn put_back(inbox: &Inbox, reports: Vec<Progress>) {
    let mut latest = inbox.latest();
    for report in reports {
        latest.entry(report.job).or_insert(report);
    }
    inbox.came.notify_one();
}
